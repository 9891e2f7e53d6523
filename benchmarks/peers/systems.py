"""Structures that every model of a comparison sees: the same atoms, the same edges, whoever asks.

Edges are searched here, once and outside of every clock. Imports only what each environment of a comparison holds.
"""
# Shapes: B structures, N atoms, E edges.

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.collections import s22
from torch import Tensor
from vesin import NeighborList

CUTOFF = 5.0  # Å, of every model
RATTLE = 0.05  # Å
DENSITIES = {"dense": 0.1, "sparse": 0.01}  # atoms/Å^3: organic matter; a gas whose atoms have few, uneven neighbours
SITE_DISTANCE = 0.1 ** (-1 / 3)  # Å, of the grid on which the atoms of a box stand
ORGANIC = {1: 0.5, 6: 0.32, 8: 0.09, 7: 0.085, 16: 0.005}  # shares of the elements


@dataclass
class Batch:
    """Structures packed one after the other.

    Attributes:
        node_type: [N] atomic numbers.
        positions: [N,3] Å.
        graph_index: [N] structure of each atom, ascending.
        edge_index: [2,E] source j and destination i, sorted by destination.
        edge_shift: [E,3] Å, r_ij = positions[j] + edge_shift - positions[i].
        cell: [B,3,3] Å, rows; zero where open.
        pbc: [B,3] bool.
    """

    node_type: Tensor
    positions: Tensor
    graph_index: Tensor
    edge_index: Tensor
    edge_shift: Tensor
    cell: Tensor
    pbc: Tensor

    @property
    def num_graphs(self) -> int:
        return len(self.cell)

    @property
    def num_nodes_B(self) -> Tensor:
        return torch.bincount(self.graph_index, minlength=self.num_graphs)

    def to(self, target: torch.device | torch.dtype | str) -> Batch:
        """On another device, or its floating-point tensors in another type."""
        moved = (getattr(self, field.name) for field in fields(self))
        if isinstance(target, torch.dtype):
            return Batch(*(t.to(target) if t.is_floating_point() else t for t in moved))
        return Batch(*(t.to(target) for t in moved))


def batch_of(structures: list[Atoms], dtype: torch.dtype = torch.float32) -> Batch:
    """Packs structures and finds all pairs, periodic images included, closer than the cutoff.

    A structure is periodic in three directions or in none.
    """
    sizes = [len(atoms) for atoms in structures]
    starts = np.cumsum([0, *sizes[:-1]])
    edges = [_edges(atoms) for atoms in structures]
    index = np.concatenate([pair + start for (pair, _), start in zip(edges, starts, strict=True)], axis=1)
    return Batch(
        node_type=torch.from_numpy(np.concatenate([atoms.numbers for atoms in structures])).long(),
        positions=torch.from_numpy(np.concatenate([atoms.positions for atoms in structures])).to(dtype),
        graph_index=torch.repeat_interleave(torch.tensor(sizes)),
        edge_index=torch.from_numpy(index).long(),
        edge_shift=torch.from_numpy(np.concatenate([shift for _, shift in edges])).to(dtype),
        cell=torch.from_numpy(np.stack([np.array(atoms.cell) for atoms in structures])).to(dtype),
        pbc=torch.from_numpy(np.stack([atoms.pbc for atoms in structures])),
    )


def _edges(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """[2,E] source and destination, sorted by destination, and [E,3] shift in Å."""
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ValueError(f"{atoms} is periodic in some directions only")
    periodic = bool(atoms.pbc.all())
    cell = np.array(atoms.cell) if periodic else np.eye(3)
    search = NeighborList(cutoff=CUTOFF, full_list=True)
    i, j, images = search.compute(points=atoms.positions, box=cell, periodic=periodic, quantities="ijS")
    order = np.lexsort((*images.T, j, i))  # vesin promises no order
    shift = images[order] @ cell if periodic else np.zeros((len(order), 3))
    return np.stack([j[order], i[order]]).astype(np.int64), shift


def molecules(num: int) -> list[Atoms]:
    """Dimers of the S22 set (Jurečka et al. 2006, doi:10.1039/b600027d), 6 to 30 atoms each, over and over, rattled."""
    rng = np.random.default_rng(0)
    return [_rattled(s22[s22.names[index % len(s22.names)]], rng) for index in range(num)]


def silicon() -> list[Atoms]:
    """A rattled cell of 96 atoms, about 28 neighbours each."""
    return [_rattled(bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 3), np.random.default_rng(0))]


def box(num_atoms: int, kind: str) -> list[Atoms]:
    """A periodic cube of atoms on random sites of a jittered grid."""
    rng = np.random.default_rng(num_atoms)
    length = (num_atoms / DENSITIES[kind]) ** (1 / 3)
    a_side = max(int(length / SITE_DISTANCE), int(np.ceil(num_atoms ** (1 / 3) - 1e-9)))
    site = rng.choice(a_side**3, size=num_atoms, replace=False)
    grid = np.stack(np.unravel_index(site, (a_side,) * 3), axis=-1) + 0.5
    positions = (grid + rng.uniform(-0.15, 0.15, grid.shape)) * (length / a_side)
    numbers = rng.choice(list(ORGANIC), p=list(ORGANIC.values()), size=num_atoms)
    return [Atoms(numbers, positions=positions, cell=[length] * 3, pbc=True)]


def _rattled(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    moved = atoms.copy()
    moved.positions += rng.normal(0, RATTLE, moved.positions.shape)
    return moved


KINDS = {"molecules": molecules, **{kind: partial(box, kind=kind) for kind in DENSITIES}}


def structures_of(case: str) -> list[Atoms]:
    """The structures of a case: "silicon", "molecules 8", "dense 2000", "sparse 2000"."""
    if case == "silicon":
        return silicon()
    kind, _, size = case.partition(" ")
    if kind not in KINDS or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"case {case!r} is not silicon, or one of {', '.join(KINDS)} and a number")
    return KINDS[kind](int(size))
