"""Fine-tuning to one property of a corpus: data, model, training, and a test beside embarrassing baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moiety.adapters.adapter import (
    ADAPTERS,
    AdapterSettings,
    add_adapter,
    load_base,
    require_export,
    save_adapter,
    trainable_share,
)
from moiety.adapters.baselines import baselines, known, labels_of
from moiety.adapters.tasks import Spread, TaskConfig
from moiety.data.shards import Corpus
from moiety.data.subset import Subset
from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction
from moiety.tokens.batch import collate, with_neighbors
from moiety.tokens.labels import Label
from moiety.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainingConfig
from moiety.training.export import save_model
from moiety.training.files import write_json
from moiety.training.loop import fit
from moiety.training.mixture import Mixture, Source
from moiety.training.run import Run

METHODS = {  # and what results call them
    "lora": "pretrained + LoRA",
    "rslora": "pretrained + rsLoRA",
    "dora": "pretrained + DoRA",
    "ia3": "pretrained + IA3",
    "full": "pretrained, all weights",
    "head": "pretrained, head only",
    "scratch": "from scratch",
}
Array = np.ndarray


@dataclass(frozen=True)
class LabelledDataConfig:
    """Labels for training and a test set, from two splits that pretraining did not see."""

    corpus: str
    train_split: str = "val"
    num_train: int = 1000
    test_split: str = "test"
    num_test: int = 5000
    node_budget: int = 320
    edge_budget: int = 8000
    micro_batches: int = 2
    seed: int = 0  # of the choice of training structures, and of their order


@dataclass(frozen=True)
class FinetuneConfig:
    """`method`: lora | rslora | dora | ia3 | full | head (trunk frozen) | scratch (random weights, all trained)."""

    model: str  # export directory of a pretrained model
    task: TaskConfig
    data: LabelledDataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    method: str = "lora"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class LabelledData:
    """Training and test structures with their labels."""

    train: Subset
    test: Subset
    spread: Spread  # of the training labels

    @classmethod
    def open(cls, config: LabelledDataConfig, task: TaskConfig) -> LabelledData:
        """Chooses `num_train` structures at random and the first `num_test` of the test split.

        Raises:
            InputError: a missing corpus, split or label; fewer structures than asked for.
        """
        chosen = {}
        for split, count in ((config.train_split, config.num_train), (config.test_split, config.num_test)):
            corpus = Corpus.open(config.corpus, split=split)
            labelled = _labelled(corpus, task.target)
            if len(labelled) < count:
                raise InputError(
                    f"{config.corpus}: split {split!r} has {len(labelled)} structures with the label {task.label!r}, "
                    f"{count} are asked for; lower data.num_{'train' if split == config.train_split else 'test'}"
                )
            if split == config.train_split:
                labelled = np.random.default_rng(config.seed).permutation(labelled)
            chosen[split] = Subset(corpus, labelled[:count])
        train, test = chosen[config.train_split], chosen[config.test_split]
        values = labels_of(task, train.read(range(len(train)), whole=True))
        return cls(train, test, task.spread(values[known(values)]))

    def mixture(self, config: LabelledDataConfig) -> Mixture:
        data = DataConfig(
            sources=(SourceConfig(config.corpus),),
            node_budget=config.node_budget,
            edge_budget=config.edge_budget,
            micro_batches=config.micro_batches,
            split=config.train_split,
            seed=config.seed,
        )
        return Mixture([Source(self.train, Path(config.corpus).name, data, 0)], data)


def _labelled(corpus: Corpus, label: Label) -> Array:
    """Indices of the structures that have a label.

    Raises:
        InputError: none has a number of that name; those that there are are named.
    """
    if not label.per_node and not label.shape:
        return np.flatnonzero(np.isfinite(corpus.scalar(label.name)))
    return np.array([index for index, s in enumerate(corpus) if label.of(s) is not None], dtype=np.int64)


def build_model(config: FinetuneConfig, tasks: dict[str, Any]) -> nn.Module:
    """The network to train: what is trainable is what the method trains."""
    torch.manual_seed(config.training.seed)
    if config.method == "scratch":
        require_export(config.model)
        return MoietyForPrediction(MoietyConfig.from_pretrained(config.model, tasks=tasks))
    model = load_base(config.model, tasks)
    if config.method in ADAPTERS:
        return add_adapter(model, config.adapter, config.method)
    if config.method == "head":
        model.moiety.requires_grad_(False)
    return model


def finetune(run: Run, config: FinetuneConfig) -> dict[str, Any] | None:
    """Trains, tests, and writes metrics.json, predictions.json and the model or adapter; rank 0 returns the metrics."""
    task = config.task
    data = LabelledData.open(config.data, task)
    tasks = {task.label: task.head(data.spread)}
    model = build_model(config, tasks)
    trainable, total = trainable_share(model)
    run.progress.note(f"{config.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})")
    fit(run, model, data.mixture(config.data), [task.objective(data.spread)], config.optimizer, config.training)
    weights = run.weights()
    if weights is None:
        return None
    trained = build_model(config, tasks)
    trained.load_state_dict(weights, strict=False)
    if config.method in ADAPTERS:
        save_adapter(trained, run.path / "adapter", config.model, tasks)  # type: ignore[arg-type]
    else:
        save_model(trained, run.path / "export")  # type: ignore[arg-type]
    output = predict(trained, MoietyConfig.from_pretrained(config.model).cutoff, data.test, task)
    sizes = {"trainable_parameters": trainable, "parameters": total}
    return write_results(run.path, config, data, task.answer(output), sizes)


@torch.no_grad()
def predict(model: nn.Module, cutoff: float, subset: Subset, task: TaskConfig, batch_nodes: int = 4096) -> Array:
    """Output [items, ...] of a head for the structures of a subset, or for all their nodes, in its order."""
    model.eval()
    order = np.argsort(subset.num_nodes, kind="stable")  # like sizes together: less padding
    cuts = np.flatnonzero(np.diff(np.cumsum(subset.num_nodes[order]) // batch_nodes)) + 1
    parts: list[Array] = [np.empty(0)] * len(subset)
    for indices in np.split(order, cuts):
        batch = with_neighbors(collate(subset.read(indices)), cutoff)
        values = model(**batch.inputs()).predictions[task.label].double().numpy()
        ends = np.cumsum(subset.num_nodes[indices] if task.target.per_node else np.ones(len(indices), dtype=np.int64))
        for index, part in zip(indices, np.split(values, ends[:-1]), strict=True):
            parts[index] = part
    return np.concatenate(parts)


def write_results(
    path: Path, config: FinetuneConfig, data: LabelledData, answered: Array, sizes: dict[str, int]
) -> dict[str, Any]:
    """metrics.json and predictions.json, with the baselines that need no training."""
    task = config.task
    train, test = (subset.read(range(len(subset)), whole=True) for subset in (data.train, data.test))
    true = labels_of(task, test)
    error = task.error(answered, true)
    others = {name: task.error(answers, true) for name, answers in baselines(task, train, test).items()}
    name = METHODS[config.method]
    metrics = {
        "target": task.label,
        "metric": task.metric,
        "unit": task.metric_unit,
        "results": {name: error, **others},
        "num_train": len(data.train),
        "num_test": len(data.test),
        "steps": config.training.steps,
        "seed": config.training.seed,
        **sizes,
    }
    write_json(path / "metrics.json", metrics)
    there = np.isfinite(true)
    predictions = {
        "target": task.label,
        "unit": task.unit,
        "split": config.data.test_split,
        "method": name,
        "true": true[there].tolist(),
        "predicted": answered[there].tolist(),
        "metrics": {task.metric: error},
        "baselines": others,
    }
    write_json(path / "predictions.json", predictions)
    return metrics
