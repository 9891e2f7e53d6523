"""Two small structures, and what a model says of them: whoever holds a copy sees whether it still says the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moiety.data.structure import Structure
from moiety.tokens.batch import collate, with_neighbors

PROBE: list[dict[str, Any]] = [  # methanol, and rock salt in its primitive cell; Å
    {
        "node_type": [6, 8, 1, 1, 1, 1],
        "positions": [
            [-0.0469, 0.6636, 0.0], [-0.0469, -0.7586, 0.0], [-1.0930, 0.9693, 0.0],
            [0.8790, -1.0583, 0.0], [0.4376, 1.0718, 0.8914], [0.4376, 1.0718, -0.8914],
        ],
        "cell": None,
        "pbc": None,
        "domain": "molecule",
    },
    {
        "node_type": [11, 17],
        "positions": [[0.0, 0.0, 0.0], [2.82, 0.0, 0.0]],
        "cell": [[0.0, 2.82, 2.82], [2.82, 0.0, 2.82], [2.82, 2.82, 0.0]],
        "pbc": [True, True, True],
        "domain": "crystal",
    },
]  # fmt: skip


def probe_structures() -> list[Structure]:
    return [probe_structure(**fields) for fields in PROBE]


def probe_structure(node_type: list[int], positions: list[Any], cell: Any, pbc: Any, domain: str) -> Structure:
    """An entry of PROBE, or of a probe.json, as a structure."""
    structure = Structure(np.array(node_type), np.array(positions), domain=domain)
    if cell is not None:
        structure.cell, structure.pbc = np.array(cell), np.array(pbc)
    return structure


@torch.no_grad()
def probe_numbers(model: nn.Module, device: torch.device) -> dict[str, list[float]]:
    """Mean and root mean square of every tensor that a model in training says of the probe structures.

    A collective under ZeRO-3, whose weights are gathered for it.
    """
    batch = with_neighbors(collate(probe_structures()), model.config.cutoff).to(device)  # type: ignore[union-attr]
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled again for this
        output = model(**batch.inputs())
    model.train(was_training)
    named = {n: t.double().nan_to_num() for n, t in tensors_of(output) if t.is_floating_point() and t.numel()}
    return {name: [float(t.mean()), float(t.square().mean().sqrt())] for name, t in named.items()}


def probe_difference(now: Mapping[str, list[float]], before: Mapping[str, list[float]]) -> float:
    """Largest difference of two sets of probe numbers, relative to the root mean squares; inf for other tensors."""
    if now.keys() != before.keys():
        return math.inf
    return max(
        abs(value - kept) / max(before[name][1], 1e-12)
        for name in now
        for value, kept in zip(now[name], before[name], strict=True)
    )


def tensors_of(output: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's output, however nested, with its name."""
    for name, value in output.items():
        if isinstance(value, Mapping):
            yield from tensors_of(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value
