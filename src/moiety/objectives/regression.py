"""Supervised regression and classification of labels, of structures or of their nodes."""
# Shapes: B structures, N nodes, K classes.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.objectives.base import Objective, sum_by_structure
from moiety.tokens.batch import Batch
from moiety.tokens.labels import Label

ELBOW = 0.1  # of the Huber loss, in spreads of the label


class Supervised(Objective):
    """What all learning from labels has in common: structures and nodes without the label are not scored."""

    def __init__(self, task: str, label: Label, weight: float = 1.0):
        self.name, self.label, self.weight = task, label, weight
        self.labels = (label,)

    def target(self, batch: Batch) -> Tensor:
        """[B, ...] or [N, ...], NaN where it is not known."""
        return (batch.node_targets if self.label.per_node else batch.targets)[self.label.name]

    def known(self, batch: Batch) -> Tensor:
        """[B] or [N] bool: what has all of the label."""
        return ~self.target(batch).isnan().flatten(1).any(1) if self.label.shape else ~self.target(batch).isnan()

    def by_structure(self, values: Tensor, batch: Batch) -> Tensor:
        """[B] from [B] or [N]."""
        return sum_by_structure(values, batch) if self.label.per_node else values

    def scored(self, batch: Batch) -> Tensor:
        return self.by_structure(self.known(batch).to(batch.positions), batch)


class Regression(Supervised):
    """Huber loss between prediction and label, both divided by the label's spread; a mean over the components.

    With `per_atom` the spread is that of a structure's label divided by its number of nodes.
    """

    def __init__(self, task: str, label: Label, std: float, weight: float = 1.0, per_atom: bool = False):
        super().__init__(task, label, weight)
        self.std, self.per_atom = std, per_atom

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        known, target = self.known(batch), self.target(batch)
        predicted = output.predictions[self.name]
        shown = known.reshape(-1, *[1] * (target.ndim - 1))  # what is not known may be NaN on both sides
        difference = torch.where(shown, predicted - target, 0.0)  # of total energies: in the precision of the target
        scale = self.std * batch.num_nodes_B if self.per_atom else self.std
        error = (difference / scale).to(batch.positions.dtype)
        loss = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=ELBOW)
        loss = loss.flatten(1).mean(1) if self.label.shape else loss
        return self.by_structure(loss / ELBOW, batch)  # slope 1 beyond the elbow


class Classification(Supervised):
    """Cross-entropy (nats) of the logits [N, K] or [B, K] of a task; a label is the number of its class."""

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        known = self.known(batch)
        target = torch.nan_to_num(self.target(batch)).long()
        loss = F.cross_entropy(output.predictions[self.name], target, reduction="none")
        return self.by_structure(loss * known, batch)
