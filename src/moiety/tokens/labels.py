"""Labels of structures as targets of a batch: of a structure or of its nodes, a number or a tensor."""
# Shapes: B structures, N nodes.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import AMINO_ACIDS, FIRST_RESIDUE

RESIDUE = "residue"  # the label that every chain has: the types of its residues


@dataclass(frozen=True)
class Label:
    """The name of a label, and the shape of one value.

    A structure's numbers are its `energy` and `scalars`, its tensors `stress`, `dipole` and `tensors`; its nodes'
    numbers are `residue` (0 to 19, the amino acids in the order of the vocabulary) and `node_scalars`, their tensors
    `forces` and `node_tensors`. One name can be two labels: a dipole and its norm.
    """

    name: str
    shape: tuple[int, ...] = ()
    per_node: bool = False
    align: Callable[[Structure, Any], Any] | None = None  # brings values of several sources to the terms of one

    @property
    def column(self) -> str:
        """Of a shard, that holds it."""
        if self.per_node and not self.shape and self.name == RESIDUE:
            return "node_type"
        fields, prefix = {
            (False, False): (("energy",), "scalar:"),
            (False, True): (("stress", "dipole"), "tensor:"),
            (True, False): ((), "node_scalar:"),
            (True, True): (("forces",), "node_tensor:"),
        }[self.per_node, bool(self.shape)]
        return self.name if self.name in fields else prefix + self.name

    def of(self, structure: Structure) -> Any:
        """The value, None where the structure does not have it."""
        kind, named, name = self.column.rpartition(":")
        if name == "node_type":
            number = structure.node_type - FIRST_RESIDUE
            return np.where((number >= 0) & (number < len(AMINO_ACIDS)), number, math.nan)
        value = getattr(structure, f"{kind}s").get(name) if named else getattr(structure, name)
        return value if value is None or self.align is None else self.align(structure, value)

    def values(self, structures: Sequence[Structure]) -> Tensor:
        """[B, ...] or [N, ...] float64 (total energies need it), NaN where a structure does not have the label."""
        parts = []
        for structure in structures:
            shape = (structure.num_nodes if self.per_node else 1, *self.shape)
            value = self.of(structure)
            parts.append(np.full(shape, math.nan) if value is None else np.asarray(value, np.float64).reshape(shape))
        return torch.from_numpy(np.concatenate(parts))
