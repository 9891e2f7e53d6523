"""Denoising beside learning from labels: micro-batches with labels of the tasks stay as they are."""
# Shapes: B structures.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moiety.objectives.base import Objective
from moiety.objectives.regression import Supervised
from moiety.tokens.batch import Batch


class OnUnlabelled(Objective):
    """An objective that spoils and scores the micro-batches alone in which no task knows a label."""

    def __init__(self, objective: Objective, tasks: Sequence[Supervised], name: str = "", weight: float = 1.0):
        self.objective, self.tasks = objective, tasks
        self.name, self.weight, self.labels = name or objective.name, weight * objective.weight, objective.labels

    def is_labelled(self, batch: Batch) -> bool:
        return any(bool(task.known(batch).any()) for task in self.tasks)

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        return batch if self.is_labelled(batch) else self.objective.corrupt(batch, rng)

    def scored(self, batch: Batch) -> Tensor:
        if self.is_labelled(batch):
            return batch.positions.new_zeros(batch.num_structures)
        return self.objective.scored(batch)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        return self.scored(batch) if self.is_labelled(batch) else self.objective.loss_sum(output, batch)

    def trivial_loss(self, node_type: Tensor) -> float:
        return self.objective.trivial_loss(node_type)
