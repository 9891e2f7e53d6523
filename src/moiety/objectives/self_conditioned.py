"""Self-conditioned denoising: a first look at a nearly clean copy says what the noised structure is to become.

The trunk's pooled features of the copy, without a gradient, are a condition of the denoising pass (Perez and
Gomez-Bombarelli 2026, arXiv 2603.17196). Pooled features that help are rewarded, which plain denoising, a matter of
each node's neighbourhood, does not do. A step costs one more forward pass.
"""
# Shapes: B structures, N nodes.

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety.objectives.base import log_uniform, remove_mean
from moiety.objectives.coordinates import CoordinateDenoising, CoordinateDenoisingConfig
from moiety.tokens.batch import Batch


@dataclass(frozen=True)
class SelfConditionedDenoisingConfig(CoordinateDenoisingConfig):
    hint_sigma: float = 0.01  # Å, largest noise of the copy
    hide_hint: float = 0.2  # share of structures that are denoised without


class SelfConditionedDenoising(CoordinateDenoising):
    """Coordinate denoising, with the positions of a nearly clean copy in the batch: the model takes its hint there."""

    name = "self_conditioned"
    config: SelfConditionedDenoisingConfig

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        config = self.config
        noised = super().corrupt(batch, rng)
        sigma_B = log_uniform(batch.num_structures, config.hint_sigma / 10, config.hint_sigma, rng)
        noise_N3 = remove_mean(torch.randn(batch.positions.shape, generator=rng).to(batch.positions), batch)
        shown_B = torch.rand(batch.num_structures, generator=rng) >= config.hide_hint
        copy_N3 = batch.positions + sigma_B.to(noise_N3)[batch.graph_index, None] * noise_N3
        return noised.replace(hint_positions=torch.where(shown_B[batch.graph_index, None], copy_N3, torch.nan))
