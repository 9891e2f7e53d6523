"""Replay: what the base was pretrained on, mixed into fine-tuning, so that it is not forgotten; and how much of it is.

The base comes back beside the model, frozen: its heads of pretraining define what it could do, and its features of
replayed structures are labels of what it knew of them (as the logits in Li and Hoiem 2016, arXiv 1606.09282).
Micro-batches of the replayed corpora are spoilt as in pretraining; labelled ones are left as they are.
"""
# Shapes: B structures.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moiety.data.shards import Corpus
from moiety.data.structure import Array, Structure
from moiety.data.subset import Subset
from moiety.errors import InputError
from moiety.models.modeling_moiety import MoietyForPreTraining, MoietyModel
from moiety.models.vocabulary_moiety import DOMAINS
from moiety.objectives import Objective, build_objectives
from moiety.objectives.regression import Supervised
from moiety.objectives.unlabelled import OnUnlabelled
from moiety.tokens.batch import Batch, collate, with_neighbors
from moiety.tokens.labels import Label
from moiety.training.config import SourceConfig
from moiety.training.multitask import MultitaskOutput, WithPretrainingHeads

BATCH = 32  # structures that are asked at a time
PRETRAINING: dict[str, dict[str, Any]] = {"coordinates": {}, "types": {}, "cell": {}}


@dataclass(frozen=True)
class ReplayConfig:
    """Which corpora are replayed, and how much of them."""

    sources: tuple[SourceConfig, ...]
    share: float = 0.5  # of the micro-batches
    weight: float = 1.0  # of the losses of pretraining, beside those of the tasks
    features: float = 100.0  # of the change of the base's features, beside those
    objectives: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(PRETRAINING))

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"replay.share is {self.share}; it is a share of the micro-batches, between 0 and 1")
        build_objectives(self.objectives)
        if unfit := sorted({"dens", "self_conditioned"} & set(self.objectives)):
            raise InputError(
                f"replay.objectives: {', '.join(unfit)} takes forces or a second pass; replay coordinates or blocks"
            )


def replayed(config: ReplayConfig, learned: Sequence[Supervised]) -> list[Objective]:
    """The objectives of pretraining and the base's features, beside what is learned from labels."""
    objectives = [*build_objectives(config.objectives), *([KeptFeatures(config.features)] if config.features else [])]
    return [OnUnlabelled(objective, learned, f"replayed {objective.name}", config.weight) for objective in objectives]


class KeptFeatures(Objective):
    """The mean squared change of a structure's pooled features, in mean squares of those of the base."""

    name = "features"

    def __init__(self, weight: float):
        self.weight = weight

    def scored(self, batch: Batch) -> Tensor:
        return batch.positions.new_ones(batch.num_structures)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        change_BC = output.graph_features - output.base_features
        return change_BC.square().mean(-1) / output.base_features.square().mean(-1)


class BesideBase(WithPretrainingHeads):
    """A model, and the base with its heads of pretraining, which are not trained."""

    def __init__(self, model: nn.Module, base: MoietyForPreTraining):
        super().__init__(model, base.requires_grad_(False))
        self.base = base.moiety

    def forward(self, **inputs: Any) -> MultitaskOutput:
        output = super().forward(**inputs)
        with torch.no_grad():
            output["base_features"] = self.base(**inputs).graph_features
        return output


@torch.no_grad()
def forgetting(
    model_dir: str | Path, trained: nn.Module, structures: Sequence[Structure], objectives: Sequence[Objective]
) -> dict[str, dict[str, dict[str, float]]]:
    """Losses of pretraining with the base's trunk and with the trained one, its own heads on both, the same noise.

    Returns:
        domain -> objective -> {"base", "now", "change": relative}.
    """
    base = MoietyForPreTraining.from_pretrained(str(model_dir)).eval()
    models = {"base": base, "now": WithPretrainingHeads(trained, base).eval()}
    sums = {name: np.zeros((len(DOMAINS), len(objectives), 2)) for name in models}
    rng = torch.Generator().manual_seed(0)
    for start in range(0, len(structures), BATCH):
        batch = collate(list(structures[start : start + BATCH]))
        for objective in objectives:
            batch = objective.corrupt(batch, rng)
        batch = with_neighbors(batch, base.config.cutoff)
        for name, model in models.items():
            output = model(**batch.inputs())
            for number, objective in enumerate(objectives):
                scored = objective.scored(batch)
                loss = torch.where(scored > 0, objective.loss_sum(output, batch), 0.0)
                terms = torch.stack([loss, scored.to(loss)], dim=-1).double().numpy()
                np.add.at(sums[name][:, number], batch.domain.numpy(), terms)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for d, domain in enumerate(DOMAINS):
        for o, objective in enumerate(objectives):
            counts = sums["base"][d, o, 1]
            if counts:
                before, now = (float(sums[name][d, o, 0] / counts) for name in models)
                found.setdefault(domain, {})[objective.name] = {"base": before, "now": now, "change": now / before - 1}
    return found


@torch.no_grad()
def off_task(
    model_dir: str | Path,
    trained: nn.Module,
    label: Label,
    train: Sequence[Structure],
    test: Sequence[Structure],
) -> dict[str, float]:
    """What became of a property that was not trained on, by linear probes (ridge) of the pooled features.

    Returns:
        MAE on the test structures: "base", of the base's features and probe; "now", of the trained trunk's features
        with the base's probe; "refit", with a probe of their own; "mean", of the mean label.
    """
    sets = [[s for s in structures if label.of(s) is not None] for structures in (train, test)]
    learned, asked = (label.values(structures).numpy() for structures in sets)
    base = MoietyModel.from_pretrained(str(model_dir)).eval()
    before, now = ([pooled(model, structures) for structures in sets] for model in (base, trained))
    answers = {
        "base": probe(before[0], learned, before[1]),
        "now": probe(before[0], learned, now[1]),
        "refit": probe(now[0], learned, now[1]),
        "mean": np.full(len(asked), learned.mean()),
    }
    return {name: float(np.abs(answer - asked).mean()) for name, answer in answers.items()}


def probe(features: Array, labels: Array, asked: Array) -> Array:
    """[m] ridge regression from features [n, C] and labels [n] to features [m, C]."""
    mean, middle = features.mean(0), labels.mean()
    centred = features - mean
    normal = centred.T @ centred
    normal += 1e-3 * np.trace(normal) / len(normal) * np.eye(len(normal))
    return (asked - mean) @ np.linalg.solve(normal, centred.T @ (labels - middle)) + middle


def pooled(model: nn.Module, structures: Sequence[Structure]) -> Array:
    """[n, C] float64 graph features."""
    cutoff: float = model.eval().config.cutoff  # type: ignore[union-attr,assignment]
    parts = []
    for start in range(0, len(structures), BATCH):
        batch = with_neighbors(collate(list(structures[start : start + BATCH])), cutoff)
        parts.append(model(**batch.inputs()).graph_features.double().numpy())
    return np.concatenate(parts)


def held_out(config: ReplayConfig | None, test: Subset, num: int = 256) -> list[Structure]:
    """What forgetting is measured on: the replayed corpora's val split, without replay the test structures."""
    if config is None:
        return test.read(range(min(num, len(test))))
    found = []
    for source in config.sources:
        corpus = Corpus.open(source.path)
        splits = corpus.manifest["splits"]
        corpus = Corpus.open(source.path, split="val") if "val" in splits else corpus
        found += corpus.read(range(min(num // len(config.sources), len(corpus))))
    return found
