"""Supervised regression of a label, in the standard units of its task head."""
# Shapes: B structures.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.objectives.base import Objective
from moiety.tokens.batch import Batch


class Regression(Objective):
    """Huber loss between the prediction of a task and a scalar label of the corpus, both divided by the label's spread.

    Structures without the label are not scored.
    """

    weight = 1.0

    def __init__(self, task: str, label: str, std: float):
        self.name, self.label, self.std = task, label, std

    def scored(self, batch: Batch) -> Tensor:
        return (~batch.targets[self.label].isnan()).to(batch.positions)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        target_B = torch.nan_to_num(batch.targets[self.label])
        error_B = F.huber_loss(
            output.predictions[self.name] / self.std, target_B / self.std, reduction="none", delta=0.1
        )
        return error_B * self.scored(batch) * 10  # slope 1 beyond the elbow
