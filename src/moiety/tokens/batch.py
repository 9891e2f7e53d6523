"""A batch: the model's inputs, what should be predicted, and which structures they are."""
# Shapes: B structures, N nodes, E edges.

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moiety.data.structure import Structure
from moiety.models.feature_extraction_moiety import neighbor_list, pack, to_tensors
from moiety.tokens.labels import Label

NOT_TENSORS = ("targets", "node_targets", "ids")


@dataclass(frozen=True)
class Batch:
    """Structures packed one after the other; immutable, so an objective returns a changed copy."""

    node_type: Tensor  # [N] vocabulary ids
    positions: Tensor  # [N, 3] Å
    graph_index: Tensor  # [N] structure of each node, ascending
    cell: Tensor  # [B, 3, 3] Å, rows
    pbc: Tensor  # [B, 3] bool
    charge: Tensor  # [B] e
    spin: Tensor  # [B] multiplicity
    domain: Tensor  # [B] index into DOMAINS
    role: Tensor  # [N] index into ROLES
    node_vectors: Tensor  # [N, 4, 3] Å
    edge_index: Tensor | None = None  # [2, E] source j, destination i, sorted by i
    edge_shift: Tensor | None = None  # [E, 3] Å
    noise_level: Tensor | None = None  # [B] Å, NaN = not told
    hint_positions: Tensor | None = None  # [N, 3] Å, of a nearly clean copy; NaN where it is not shown
    targets: dict[str, Tensor] = field(default_factory=dict)  # [B, ...]
    node_targets: dict[str, Tensor] = field(default_factory=dict)  # [N, ...]
    ids: list[str] = field(default_factory=list)

    @property
    def num_structures(self) -> int:
        return len(self.domain)

    @property
    def num_nodes_B(self) -> Tensor:
        return torch.bincount(self.graph_index, minlength=self.num_structures)

    def replace(self, **changes: object) -> Batch:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def select_nodes(self, keep: Tensor) -> Batch:
        """The batch without the nodes where `keep` [N] is False; node-wise targets shrink with it."""
        node_fields = ("node_type", "positions", "graph_index", "role", "node_vectors")
        changes = {name: getattr(self, name)[keep] for name in node_fields}
        node_targets = {name: target[keep] for name, target in self.node_targets.items()}
        return self.replace(**changes, node_targets=node_targets, edge_index=None, edge_shift=None)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model's forward."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_TENSORS}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Any], Any]) -> Batch:
        """The batch with every tensor, or what stands in its place, changed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_TENSORS}
        changed = {name: change(value) for name, value in fields.items() if value is not None}
        targets = {name: change(value) for name, value in self.targets.items()}
        node_targets = {name: change(value) for name, value in self.node_targets.items()}
        return self.replace(**changed, targets=targets, node_targets=node_targets)


def collate(structures: list[Structure], dtype: torch.dtype = torch.float32, labels: Iterable[Label] = ()) -> Batch:
    """Packs structures into one batch; their labels become targets, NaN where one is missing.

    Edges come last, from `with_neighbors`, once the positions are final.
    """
    targets, node_targets = {}, {}
    for label in labels:
        (node_targets if label.per_node else targets)[label.name] = label.values(structures)
    inputs = to_tensors(pack([vars(s) for s in structures]), dtype)
    return Batch(**inputs, targets=targets, node_targets=node_targets, ids=[s.id for s in structures])


def with_neighbors(batch: Batch, cutoff: float) -> Batch:
    """The batch with its neighbour list at `cutoff` Å (between atoms; residues reach twice as far)."""
    edge_index, edge_shift = neighbor_list(
        batch.positions.double().numpy(),
        batch.node_type.numpy(),
        batch.graph_index.numpy(),
        batch.cell.double().numpy(),
        batch.pbc.numpy(),
        cutoff,
    )
    return batch.replace(
        edge_index=torch.from_numpy(edge_index), edge_shift=torch.from_numpy(edge_shift).to(batch.positions.dtype)
    )
