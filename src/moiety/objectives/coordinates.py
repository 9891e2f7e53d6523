"""Coordinate denoising: recover the noise that was added to the positions.

Predicting unit-variance noise is, up to scale, learning the score of the data distribution; near equilibrium
structures that score is a force field (Zaidi et al. 2022, arXiv 2206.00133, eq. 5).
"""
# Shapes: B structures, N nodes.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiety.objectives.base import Objective, log_uniform, remove_mean, sum_by_structure
from moiety.tokens.batch import Batch


@dataclass(frozen=True)
class CoordinateDenoisingConfig:
    sigma_min: float = 0.01  # Å
    sigma_max: float = 0.30  # Å
    hide_sigma: float = 0.2  # share of structures that are not told their noise level
    clean: float = 0.0  # share of structures that stay as they are, and are not told so: what fine-tuning shows
    weight: float = 1.0


def clean_and_told(batch: Batch, config: CoordinateDenoisingConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two [B] bool: which structures stay as they are, and which are told their noise level."""
    draw_B = torch.rand(batch.num_structures, generator=rng)
    return draw_B < config.clean, draw_B >= config.clean + config.hide_sigma


def displaced(batch: Batch) -> Tensor:
    """[B] 1 where a node has any noise, else 0."""
    return (sum_by_structure(batch.node_targets["noise"].abs().sum(-1), batch) > 0).to(batch.positions)


class CoordinateDenoising(Objective):
    """Adds centred Gaussian noise to every position; reads it back from the vector head.

    The noise level is one number a structure and the head is shared, so domains mix freely. Removing the mean leaves
    N - 1 of N degrees of freedom; the error is scaled by N / (N - 1), so that predicting zero scores 1 on average.
    """

    name = "coordinates"
    config: CoordinateDenoisingConfig
    displaces = True

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        config = self.config
        sigma_B = log_uniform(batch.num_structures, config.sigma_min, config.sigma_max, rng).to(batch.positions)
        noise_N3 = remove_mean(torch.randn(batch.positions.shape, generator=rng).to(batch.positions), batch)
        clean_B, told_B = clean_and_told(batch, config, rng)
        noise_N3 = torch.where(clean_B[batch.graph_index, None], 0.0, noise_N3)
        return batch.replace(
            positions=batch.positions + sigma_B[batch.graph_index, None] * noise_N3,
            noise_level=torch.where(told_B, sigma_B, torch.nan),
            node_targets=batch.node_targets | {"noise": noise_N3},
        )

    def scored(self, batch: Batch) -> Tensor:
        return displaced(batch)  # a lone atom is not: it has no noise left once its mean is removed

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        error_N = (output.noise - batch.node_targets["noise"]).square().mean(-1)
        return self.scored(batch) * sum_by_structure(error_N, batch) / (batch.num_nodes_B - 1).clamp(min=1)
