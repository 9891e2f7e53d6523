"""Denoising of structures away from equilibrium: the forces say which structure the noise is to be taken from (DeNS).

Noise alone is ill-posed where the clean structure is not a minimum. Liao et al. 2024 (arXiv 2403.09549) give the
forces of the clean structure to the nodes that were displaced, and ask the others for theirs.
"""
# Shapes: B structures, N nodes.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiety.objectives.base import log_uniform, sum_by_structure
from moiety.objectives.coordinates import CoordinateDenoising, CoordinateDenoisingConfig
from moiety.tokens.batch import Batch
from moiety.tokens.labels import Label

FORCES = Label("forces", (3,), per_node=True)
NOT_DISPLACED = 1e-3  # Å: the noise level that a structure is told in which nothing moved


@dataclass(frozen=True)
class ForceDenoisingConfig(CoordinateDenoisingConfig):
    displaced: float = 0.5  # share of the structures with forces in which nodes are displaced
    nodes: float = 0.5  # share of the nodes of those that are
    force_unit: float = 1.0  # eV/Å that count as much as a unit of noise


class ForceDenoising(CoordinateDenoising):
    """In structures with forces, displaced nodes are told theirs, as the first of the node vectors, and asked for the
    noise; the others are asked for their force. Structures without are denoised as by `CoordinateDenoising`.

    One vector head says both, as near equilibrium they are the same but for a factor.
    """

    name = "dens"
    config: ForceDenoisingConfig
    labels = (FORCES,)

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        config, num = self.config, batch.num_structures
        plain = super().corrupt(batch, rng)
        sigma_B = log_uniform(num, config.sigma_min, config.sigma_max, rng).to(batch.positions)
        noise_N3 = torch.randn(batch.positions.shape, generator=rng).to(batch.positions)
        chosen_B = torch.rand(num, generator=rng) < config.displaced
        moved_N = (torch.rand(len(batch.node_type), generator=rng) < config.nodes) & chosen_B[batch.graph_index]
        level_B = torch.where(chosen_B, sigma_B, NOT_DISPLACED)

        forces_N3 = batch.node_targets[FORCES.name]
        with_forces_B = sum_by_structure(forces_N3.isnan().any(-1).float(), batch) == 0
        known_N = with_forces_B[batch.graph_index]
        forces_N3 = torch.where(known_N[:, None], forces_N3 / config.force_unit, 0.0).to(batch.positions)
        moved_N1, known_N1 = (moved_N & known_N)[:, None], known_N[:, None]
        displaced_N3 = batch.positions + torch.where(moved_N1, sigma_B[batch.graph_index, None] * noise_N3, 0.0)
        told_N43 = batch.node_vectors.clone()
        told_N43[:, 0] = torch.where(moved_N1, forces_N3, told_N43[:, 0])
        asked_N3 = torch.where(moved_N1, noise_N3, forces_N3)
        assert plain.noise_level is not None
        return plain.replace(
            positions=torch.where(known_N1, displaced_N3, plain.positions),
            node_vectors=told_N43,
            noise_level=torch.where(with_forces_B, level_B, plain.noise_level),
            node_targets=plain.node_targets | {"noise": torch.where(known_N1, asked_N3, plain.node_targets["noise"])},
            targets=plain.targets | {"with_forces": with_forces_B},
        )

    def scored(self, batch: Batch) -> Tensor:
        return torch.where(batch.targets["with_forces"], 1.0, super().scored(batch))

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        error_N = (output.noise - batch.node_targets["noise"]).square().mean(-1)
        mean_B = sum_by_structure(error_N, batch) / batch.num_nodes_B.clamp(min=1)
        return torch.where(batch.targets["with_forces"], mean_B, super().loss_sum(output, batch))
