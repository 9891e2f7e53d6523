"""Labels of structures as targets of a batch: of a structure or of its nodes, a number or a tensor."""
# Shapes: B structures, N nodes.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.data.structure import Structure


@dataclass(frozen=True)
class Label:
    """The name of a label, and the shape of one value.

    A structure's numbers are its `energy` and `scalars`, its tensors `stress`, `dipole` and `tensors`; its nodes'
    numbers are `node_scalars`, their tensors `forces` and `node_tensors`. One name can be two labels: a dipole and its
    norm.
    """

    name: str
    shape: tuple[int, ...] = ()
    per_node: bool = False

    def of(self, structure: Structure) -> Any:
        """The value, None where the structure does not have it."""
        if self.per_node:
            fields, named = (("forces",), structure.node_tensors) if self.shape else ((), structure.node_scalars)
        else:
            fields, named = (
                (("stress", "dipole"), structure.tensors) if self.shape else (("energy",), structure.scalars)
            )
        return getattr(structure, self.name) if self.name in fields else named.get(self.name)

    def values(self, structures: Sequence[Structure], dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, ...] or [N, ...], NaN where a structure does not have the label."""
        parts = []
        for structure in structures:
            shape = (structure.num_nodes if self.per_node else 1, *self.shape)
            value = self.of(structure)
            parts.append(np.full(shape, math.nan) if value is None else np.asarray(value, np.float64).reshape(shape))
        return torch.from_numpy(np.concatenate(parts)).to(dtype)
