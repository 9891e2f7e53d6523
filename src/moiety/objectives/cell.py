"""Cell denoising: recover the strain that was put on a crystal.

The cell and the positions are deformed together by 1 + E with E symmetric, so that neither rotation nor translation
is asked for; near equilibrium the answer is a stress, as the coordinate noise is a force.
"""
# Shapes: B structures.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiety.objectives.base import Objective, log_uniform
from moiety.tokens.batch import Batch


@dataclass(frozen=True)
class CellDenoisingConfig:
    sigma_min: float = 0.01
    sigma_max: float = 0.03
    weight: float = 0.5


class CellDenoising(Objective):
    """Strains fully periodic structures; reads the strain back, in units of its sigma, from the strain head."""

    name = "cell"
    config: CellDenoisingConfig

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        config = self.config
        sigma_B = log_uniform(batch.num_structures, config.sigma_min, config.sigma_max, rng).to(batch.positions)
        raw_B33 = torch.randn(batch.num_structures, 3, 3, generator=rng).to(batch.positions)
        # six independent numbers, each of unit variance
        upper = torch.triu(raw_B33)
        unit_B33 = upper + torch.triu(raw_B33, diagonal=1).transpose(1, 2)
        unit_B33 = unit_B33 * batch.pbc.all(-1)[:, None, None]
        deform_B33 = torch.eye(3).to(batch.positions) + sigma_B[:, None, None] * unit_B33
        return batch.replace(
            positions=torch.einsum("na,nab->nb", batch.positions, deform_B33[batch.graph_index]),
            cell=batch.cell @ deform_B33,
            targets=batch.targets | {"strain": unit_B33},
        )

    def scored(self, batch: Batch) -> Tensor:
        return batch.pbc.all(-1).to(batch.positions)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        error_B33 = (output.strain - batch.targets["strain"]).square()
        six = torch.triu(torch.ones(3, 3)).to(error_B33) / 6
        return self.scored(batch) * (error_B33 * six).sum(dim=(1, 2))
