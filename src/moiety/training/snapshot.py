"""A run's training state as a checkpoint holds it: copied out of an engine, and put back into any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiety.errors import InputError
from moiety.training.checkpoint import Pieces, Snapshot
from moiety.training.engine import WeightAverage
from moiety.training.files import differences
from moiety.training.fragments import (
    MOMENTS,
    Fragment,
    local_fragments,
    master_weights,
    optimizer_state,
    own_share,
    parameter_shapes,
    publish_masters,
)
from moiety.training.probe import probe_difference, probe_numbers

LOOSE = 1e-3  # of what the model says of the probe: another machine rounds differently, other weights say other things


@torch.no_grad()
def take_snapshot(engine: Any, average: WeightAverage, step: int, facts: dict[str, Any]) -> Snapshot:
    """Copies this rank's share of the state to the CPU. A collective under ZeRO-3, for the probe."""
    kinds = state_tensors(engine, average)
    share = own_share(engine, local_fragments(engine))
    tensors = {kind: _copied(of_masters, share) for kind, of_masters in kinds.items()}
    updates = {float(state["step"]) for state in optimizer_state(engine)}
    assert len(updates) == 1, "the optimizer updates all weights at every step, or none"
    said = probe_numbers(engine.module, engine.device)
    return Snapshot(
        step=step,
        spans=[fragment.span for fragment in share],
        tensors=tensors,
        facts={**facts, "updates": updates.pop(), "probe": said, "world_size": torch.distributed.get_world_size()},
        shapes=parameter_shapes(engine.module),
        config=engine.module.config.to_json_string(),
    )


def _copied(of_masters: Sequence[Tensor], share: Sequence[Fragment]) -> Tensor:
    """The fragments one after the other, on the CPU; none where a rank holds nothing but padding."""
    parts = [of_masters[f.master].view(-1)[f.offset : f.offset + f.span.length] for f in share]
    return torch.cat(parts).cpu() if parts else torch.empty(0)


@torch.no_grad()
def restore(engine: Any, average: WeightAverage, folder: Path, manifest: dict[str, Any]) -> None:
    """Puts a verified checkpoint into an engine, whatever its ZeRO stage and number of ranks. A collective.

    Raises:
        InputError: other parameters, or a model that says something else of the probe than it did.
    """
    refuse_other_parameters(parameter_shapes(engine.module), manifest["parameters"], folder)
    pieces = Pieces(folder, manifest["world_size"])
    for kind, of_masters in state_tensors(engine, average).items():
        for fragment in local_fragments(engine):
            flat = of_masters[fragment.master].view(-1)
            pieces.fill(flat[fragment.offset : fragment.offset + fragment.span.length], fragment.span, kind)
    for state in optimizer_state(engine):
        state["step"].fill_(manifest["updates"])
    publish_masters(engine)
    off_by = probe_difference(probe_numbers(engine.module, engine.device), manifest["probe"])
    if off_by > LOOSE:
        raise InputError(
            f"{folder}: the weights are what was written, but the model says other things of the probe than it did "
            f"(by {off_by:.1e} of their size): its code, or weights that are not trained, have changed. "
            "Use the versions and files in run.json, or --fresh"
        )


def state_tensors(engine: Any, average: WeightAverage) -> dict[str, list[Tensor]]:
    """Kind of number -> a tensor for each master weight."""
    states = optimizer_state(engine)
    kinds = {"weight": master_weights(engine)} | {moment: [s[moment] for s in states] for moment in MOMENTS}
    return kinds | ({"average": average.means} if average.means else {})


def refuse_other_parameters(now: dict[str, list[int]], before: dict[str, list[int]], folder: Path) -> None:
    """InputError with the names that were added, removed, or have another shape."""
    changed = differences({n: str(s) for n, s in before.items()}, {n: str(s) for n, s in now.items()})
    if changed:
        lines = [f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items()]
        more = f"\n  ... {len(lines) - 10} more" if len(lines) > 10 else ""
        raise InputError(f"{folder}: of another model; its parameters:{''.join(lines[:10])}{more}\nuse --fresh")
