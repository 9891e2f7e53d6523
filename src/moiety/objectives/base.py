"""What an objective is: something that spoils a batch, and a score for how well it was restored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moiety.tokens.batch import Batch
from moiety.tokens.labels import Label


class Objective(ABC):
    """One training signal. Randomness comes in as an argument; nothing depends on which domains a batch holds."""

    name: str
    weight: float
    labels: tuple[Label, ...] = ()  # of the structures, that a batch must have as targets
    displaces: bool = False  # sets the noise level and asks the vector head: a recipe has one of these

    def __init__(self, config: Any) -> None:
        """`config` is the objective's own dataclass; every one has a weight."""
        self.config = config
        self.weight = config.weight

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The batch as the model will see it, with what it should say in its targets. Default: unchanged."""
        return batch

    @abstractmethod
    def scored(self, batch: Batch) -> Tensor:
        """How many items of each structure are scored [B]; 0 where the objective does not apply."""

    @abstractmethod
    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        """Loss summed over the scored items of each structure [B].

        Sums and counts are added up over all ranks and divided once, so the mean is the global one.
        """

    def trivial_loss(self, node_type: Tensor) -> float:
        """Mean loss of the best answer that ignores the geometry, given a sample of node types [N]: what to beat."""
        return 1.0


def sum_by_structure(values_N: Tensor, batch: Batch) -> Tensor:
    """[B] sums of node values."""
    return values_N.new_zeros(batch.num_structures).index_add(0, batch.graph_index, values_N)


def remove_mean(values_N3: Tensor, batch: Batch) -> Tensor:
    """Node vectors without their mean over each structure: the centre-of-mass part cannot be recovered."""
    total_B3 = values_N3.new_zeros(batch.num_structures, 3).index_add(0, batch.graph_index, values_N3)
    return values_N3 - (total_B3 / batch.num_nodes_B.clamp(min=1)[:, None])[batch.graph_index]


def log_uniform(num: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """[num] draws whose logarithm is uniform between low and high."""
    return low * (high / low) ** torch.rand(num, generator=rng)
