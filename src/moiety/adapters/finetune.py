"""Fine-tuning to one property of a corpus: data, model, training, and a test beside embarrassing baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moiety.adapters.lora import LoraSettings, add_lora, load_base, require_export, save_adapter, trainable_share
from moiety.data.shards import Corpus
from moiety.data.subset import Subset
from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, TaskHead
from moiety.models.vocabulary_moiety import VOCAB_SIZE
from moiety.objectives.regression import Regression
from moiety.tokens.batch import collate, with_neighbors
from moiety.tokens.labels import Label
from moiety.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainingConfig
from moiety.training.export import save_model
from moiety.training.files import write_json
from moiety.training.loop import fit
from moiety.training.mixture import Mixture, Source
from moiety.training.run import Run

METHODS = ("lora", "full", "head", "scratch")


@dataclass(frozen=True)
class TaskConfig:
    """`label` is a scalar of the corpus, `kind` how the head reads it off the nodes (see TaskHead)."""

    label: str
    kind: str
    unit: str


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
    """`method`: lora | full | head (trunk frozen) | scratch (same network, random weights, all trained)."""

    model: str  # export directory of a pretrained model
    task: TaskConfig
    data: LabelledDataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adapter: LoraSettings = field(default_factory=LoraSettings)
    method: str = "lora"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        if self.task.kind not in TaskHead.KINDS:
            raise InputError(f"task.kind is {self.task.kind!r}; it must be one of {', '.join(TaskHead.KINDS)}")


@dataclass(frozen=True)
class LabelledData:
    """Training and test structures with their labels."""

    train: Subset
    test: Subset
    mean: float  # of the training labels, in the task's unit
    std: float

    @classmethod
    def open(cls, config: LabelledDataConfig, label: str) -> LabelledData:
        """Chooses `num_train` structures at random and the first `num_test` of the test split.

        Raises:
            InputError: a missing corpus, split or label; fewer structures than asked for.
        """
        chosen = {}
        for split, count in ((config.train_split, config.num_train), (config.test_split, config.num_test)):
            corpus = Corpus.open(config.corpus, split=split)
            labelled = np.flatnonzero(np.isfinite(corpus.scalar(label)))
            if len(labelled) < count:
                raise InputError(
                    f"{config.corpus}: split {split!r} has {len(labelled)} structures with the label {label!r}, "
                    f"{count} are asked for; lower data.num_{'train' if split == config.train_split else 'test'}"
                )
            if split == config.train_split:
                labelled = np.random.default_rng(config.seed).permutation(labelled)
            chosen[split] = Subset(corpus, labelled[:count])
        train, test = chosen[config.train_split], chosen[config.test_split]
        values = train.scalar(label)
        return cls(train=train, test=test, mean=float(values.mean()), std=float(values.std()))

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


def build_model(config: FinetuneConfig, tasks: dict[str, Any]) -> nn.Module:
    """The network to train: what is trainable is what the method trains."""
    torch.manual_seed(config.training.seed)
    if config.method == "scratch":
        require_export(config.model)
        return MoietyForPrediction(MoietyConfig.from_pretrained(config.model, tasks=tasks))
    model = load_base(config.model, tasks)
    if config.method == "lora":
        return add_lora(model, config.adapter)
    if config.method == "head":
        model.moiety.requires_grad_(False)
    return model


def finetune(run: Run, config: FinetuneConfig) -> dict[str, Any] | None:
    """Trains, tests, and writes metrics.json, predictions.json and the model or adapter; rank 0 returns the metrics."""
    task = config.task
    data = LabelledData.open(config.data, task.label)
    tasks = {task.label: {"kind": task.kind, "mean": data.mean, "std": data.std, "unit": task.unit}}
    model = build_model(config, tasks)
    trainable, total = trainable_share(model)
    run.progress.note(f"{config.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})")
    objective = Regression(task.label, Label(task.label), data.std)
    fit(run, model, data.mixture(config.data), [objective], config.optimizer, config.training)
    weights = run.weights()
    if weights is None:
        return None
    trained = build_model(config, tasks)
    trained.load_state_dict(weights, strict=False)
    if config.method == "lora":
        save_adapter(trained, run.path / "adapter", config.model, tasks)  # type: ignore[arg-type]
    else:
        save_model(trained, run.path / "export")  # type: ignore[arg-type]
    predicted = predict(trained, MoietyConfig.from_pretrained(config.model).cutoff, data.test, task.label)
    return write_results(run.path, config, data, predicted, trainable, total)


@torch.no_grad()
def predict(model: nn.Module, cutoff: float, subset: Subset, task: str, batch_nodes: int = 4096) -> np.ndarray:
    """Predictions [n] for the structures of a subset, in its order."""
    model.eval()
    order = np.argsort(subset.num_nodes, kind="stable")  # like sizes together: less padding
    cuts = np.flatnonzero(np.diff(np.cumsum(subset.num_nodes[order]) // batch_nodes)) + 1
    out = np.empty(len(subset))
    for indices in np.split(order, cuts):
        batch = with_neighbors(collate(subset.read(indices)), cutoff)
        out[indices] = model(**batch.inputs()).predictions[task].double().numpy()
    return out


def write_results(
    path: Path, config: FinetuneConfig, data: LabelledData, predicted: np.ndarray, trainable: int, total: int
) -> dict[str, Any]:
    """metrics.json and predictions.json, with the baselines that need no training."""
    label = config.task.label
    true = data.test.scalar(label)
    mae = float(np.abs(predicted - true).mean())
    baselines = {
        "mean predictor": float(np.abs(data.mean - true).mean()),
        "linear in composition": float(np.abs(composition_baseline(data, label) - true).mean()),
    }
    name = {"lora": "pretrained + LoRA", "full": "pretrained, all weights", "head": "pretrained, head only"}.get(
        config.method, "from scratch"
    )
    metrics = {
        "target": label,
        "metric": "MAE",
        "unit": config.task.unit,
        "results": {name: mae, **baselines},
        "num_train": len(data.train),
        "num_test": len(data.test),
        "steps": config.training.steps,
        "seed": config.training.seed,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    write_json(path / "metrics.json", metrics)
    predictions = {
        "target": label,
        "unit": config.task.unit,
        "split": config.data.test_split,
        "method": name,
        "true": true.tolist(),
        "predicted": predicted.tolist(),
        "metrics": {"MAE": mae},
        "baselines": baselines,
    }
    write_json(path / "predictions.json", predictions)
    return metrics


def composition_baseline(data: LabelledData, label: str) -> np.ndarray:
    """Ridge regression on the numbers of atoms of each element: what no geometry at all can do."""
    train, test = (_composition(subset) for subset in (data.train, data.test))
    normal = train.T @ train + np.eye(train.shape[1])
    return test @ np.linalg.solve(normal, train.T @ data.train.scalar(label))


def _composition(subset: Subset) -> np.ndarray:
    counts = np.zeros((len(subset), VOCAB_SIZE))
    for row, structure in enumerate(subset.read(np.arange(len(subset)))):
        counts[row] = np.bincount(structure.node_type, minlength=VOCAB_SIZE)
    return np.concatenate([counts, np.ones((len(subset), 1))], axis=1)
