"""Rigid-block denoising: recover how rings, groups and stretches of a chain were moved against each other.

Every block is shifted and turned as a whole (Jiao et al. 2024, arXiv 2402.12714), so what is learned is how blocks
stand to each other, along the soft motions that independent noise hardly reaches. The noise of a node is what its
block's motion does to it, to first order: the one vector head serves this noise too.
"""
# Shapes: B structures, N nodes, K blocks, P pairs of atoms.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ase.data
import networkx
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor

from moiety.models.vocabulary_moiety import FIRST_RESIDUE, MASK
from moiety.objectives.base import Objective, log_uniform, remove_mean, sum_by_structure
from moiety.objectives.coordinates import CoordinateDenoisingConfig, clean_and_told, displaced
from moiety.tokens.batch import Batch

TURN = 2.5  # rad per Å of shift: 0.1 rad go with 0.04 Å, as in the paper
BOND_REACH = 1.25  # bond lengths over the sum of covalent radii
LONGEST_BOND = 3.5  # Å
APART = 1e4  # Å between structures, so that one tree of points serves the batch
STILL = 1e-3  # a structure whose blocks move less, in shifts, is one block


@dataclass(frozen=True)
class BlockDenoisingConfig(CoordinateDenoisingConfig):
    """`sigma` is the root mean square of what a coordinate moves."""

    residues: float = 6.0  # mean length of a stretch of residues


class BlockDenoising(Objective):
    """Shifts and turns rigid blocks; reads the displacement of every node back from the vector head.

    Blocks are, in open structures, what hangs together without the bonds between heavy atoms that are in no ring, and
    stretches of residues, frames included; in periodic ones every atom. Shift and turn of the whole are taken out, and
    the noise is scaled to unit mean square in every structure, so that predicting zero scores 1.
    """

    name = "blocks"
    config: BlockDenoisingConfig
    displaces = True

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        config = self.config
        block = torch.from_numpy(blocks_of(batch, config.residues, rng))
        sigma_B = log_uniform(batch.num_structures, config.sigma_min, config.sigma_max, rng).to(batch.positions)
        clean_B, told_B = clean_and_told(batch, config, rng)
        num_blocks = int(block.max()) + 1
        shift_K3, turn_K3 = torch.randn(2, num_blocks, 3, generator=rng).to(batch.positions)
        centre_K3 = _means(batch.positions, block, num_blocks)
        arm_N3 = batch.positions - centre_K3[block]
        noise_N3, turn_N3 = without_rigid_motion(
            shift_K3[block] + TURN * torch.linalg.cross(turn_K3[block], arm_N3), TURN * turn_K3[block], batch
        )
        size_B = (sum_by_structure(noise_N3.square().mean(-1), batch) / batch.num_nodes_B.clamp(min=1)).sqrt()
        factor_B = torch.where((size_B > STILL) & ~clean_B, 1 / size_B.clamp(min=STILL), 0.0)
        noise_N3, turn_N3 = (part * factor_B[batch.graph_index, None] for part in (noise_N3, turn_N3))
        sigma_N1 = sigma_B[batch.graph_index, None]
        rotation_N33 = torch.linalg.matrix_exp(_cross_matrix(sigma_N1 * turn_N3))
        moved_K3 = _means(noise_N3, block, num_blocks)
        return batch.replace(
            positions=centre_K3[block] + sigma_N1 * moved_K3[block] + torch.einsum("nab,nb->na", rotation_N33, arm_N3),
            node_vectors=torch.einsum("nab,nkb->nka", rotation_N33, batch.node_vectors),
            noise_level=torch.where(told_B, sigma_B, torch.nan),
            node_targets=batch.node_targets | {"noise": noise_N3},
        )

    def scored(self, batch: Batch) -> Tensor:
        return displaced(batch)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        error_N = (output.noise - batch.node_targets["noise"]).square().mean(-1)
        return self.scored(batch) * sum_by_structure(error_N, batch) / batch.num_nodes_B.clamp(min=1)


def without_rigid_motion(moved_N3: Tensor, turn_N3: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Displacements, and turns of what stands at each node, less those of the structure as a whole.

    Those cannot be recovered. A crystal is not turned: its cell says where it points.
    """
    moved_N3, arm_N3 = remove_mean(moved_N3, batch), remove_mean(batch.positions, batch)
    momentum_N3 = torch.linalg.cross(arm_N3, moved_N3)
    identity = torch.eye(3).to(arm_N3)
    inertia_N33 = arm_N3.square().sum(-1)[:, None, None] * identity - arm_N3[:, :, None] * arm_N3[:, None, :]
    num = batch.num_structures
    momentum_B3 = momentum_N3.new_zeros(num, 3).index_add(0, batch.graph_index, momentum_N3)
    inertia_B33 = inertia_N33.new_zeros(num, 3, 3).index_add(0, batch.graph_index, inertia_N33)
    # of a line of atoms the turn about itself is no motion
    spin_B3 = torch.einsum("bij,bj->bi", torch.linalg.pinv(inertia_B33, rtol=1e-4, hermitian=True), momentum_B3)
    spin_N3 = (spin_B3 * ~batch.pbc.any(-1)[:, None])[batch.graph_index]
    return moved_N3 - torch.linalg.cross(spin_N3, arm_N3), turn_N3 - spin_N3


def blocks_of(batch: Batch, residues: float, rng: torch.Generator) -> np.ndarray:
    """[N] number of the block of each node, from 0."""
    num = len(batch.node_type)
    types, structure = batch.node_type.numpy(), batch.graph_index.numpy()
    is_residue = (types >= FIRST_RESIDUE) & (types < MASK)
    starts = torch.rand(num, generator=rng).numpy() < 1 / residues
    same = (structure[1:] == structure[:-1]) & is_residue[1:] & is_residue[:-1] & ~starts[1:]
    stretches = np.flatnonzero(same)
    is_open = ~batch.pbc.any(-1).numpy()[structure]
    joined = np.concatenate(
        [np.stack([stretches, stretches + 1], axis=1), _rigid_bonds(batch, ~is_residue & is_open & (types <= MASK))]
    )
    graph = coo_array((np.ones(len(joined)), (joined[:, 0], joined[:, 1])), shape=(num, num))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _rigid_bonds(batch: Batch, asked: np.ndarray) -> np.ndarray:
    """[P, 2] bonds that do not turn, between nodes that are asked for: those of hydrogens, and those in rings."""
    nodes = np.flatnonzero(asked)
    if not len(nodes):
        return np.empty((0, 2), dtype=np.int64)
    types = batch.node_type.numpy()[nodes]
    elements = np.where(types < len(ase.data.covalent_radii), types, 6)  # of a masked atom nobody knows it
    apart = batch.positions.double().numpy()[nodes] + APART * batch.graph_index.numpy()[nodes, None]
    pairs = KDTree(apart).query_pairs(LONGEST_BOND, output_type="ndarray")
    length = np.linalg.norm(apart[pairs[:, 0]] - apart[pairs[:, 1]], axis=1)
    bonds = pairs[length < BOND_REACH * ase.data.covalent_radii[elements[pairs]].sum(axis=1)]
    heavy = (elements[bonds] > 1).all(axis=1)
    graph = networkx.Graph(map(tuple, bonds[heavy].tolist()))
    turns = {frozenset(bond) for bond in networkx.bridges(graph)}
    kept = np.array([frozenset(bond) not in turns for bond in bonds.tolist()], dtype=bool).reshape(-1)
    return nodes[bonds[kept]]


def _means(values_N3: Tensor, block: Tensor, num: int) -> Tensor:
    """[K, 3]"""
    counts = torch.bincount(block, minlength=num)[:, None]
    return values_N3.new_zeros(num, 3).index_add(0, block, values_N3) / counts


def _cross_matrix(axis_N3: Tensor) -> Tensor:
    """[N, 3, 3] with cross_matrix(a) b = a x b."""
    x, y, z = axis_N3.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
