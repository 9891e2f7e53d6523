"""Fine-tuning to properties of a corpus: data, model, training, and a test beside embarrassing baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moiety
from moiety.adapters.adapter import (
    ADAPTERS,
    AdapterSettings,
    add_adapter,
    load_base,
    require_export,
    save_adapter,
    trainable_share,
)
from moiety.adapters.baselines import baselines
from moiety.adapters.outputs import predict
from moiety.adapters.references import unknown_elements
from moiety.adapters.replay import (
    PRETRAINING,
    BesideBase,
    ReplayConfig,
    forgetting,
    held_out,
    off_task,
    replayed,
)
from moiety.adapters.starts import Start, find_starts, start_heads
from moiety.adapters.tasks import DERIVED, Task, TaskConfig, lines_of, require_consistent
from moiety.data.shards import Corpus
from moiety.data.subset import Subset, Unlabelled
from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.tokens.labels import Label
from moiety.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainingConfig
from moiety.training.engine import optimizer_bytes
from moiety.training.export import save_model
from moiety.training.files import write_json
from moiety.training.loop import fit
from moiety.training.mixture import Mixture, Source
from moiety.training.multitask import own_weights
from moiety.training.run import Run
from moiety.training.validation import Validation

METHODS = {  # and what results call them
    "lora": "pretrained + LoRA",
    "rslora": "pretrained + rsLoRA",
    "dora": "pretrained + DoRA",
    "ia3": "pretrained + IA3",
    "full": "pretrained, all weights",
    "head": "pretrained, head only",
    "scratch": "from scratch",
}
PROBED = 1000  # structures that a linear probe is fitted to, and tested on
RESAMPLES = 1000  # of the test structures, for an interval
Array = np.ndarray


@dataclass(frozen=True)
class LabelledDataConfig:
    """Labels for training and a test set, from two splits that pretraining did not see."""

    corpus: str
    train_split: str = "val"
    num_train: int = 1000
    test_split: str = "test"
    num_test: int = 5000
    test_corpus: str = ""  # default: the corpus
    val_split: str = "val"
    num_val: int = 0  # scored at every checkpoint: the best weights are taken, and a run ends that gets no better
    patience: int = 4  # scores without a better one before a run ends
    node_budget: int = 320
    edge_budget: int = 8000
    micro_batches: int = 2
    seed: int = 0  # of the choice of training structures, and of their order


@dataclass(frozen=True)
class FinetuneConfig:
    """`method`: lora | rslora | dora | ia3 | full | head (trunk frozen) | scratch (random weights, all trained).

    The `model` is that of the package where a recipe names none.
    """

    tasks: tuple[TaskConfig, ...]
    data: LabelledDataConfig
    training: TrainingConfig
    model: str = field(default_factory=lambda: str(moiety.weights()))  # an exported model
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    method: str = "lora"
    replay: ReplayConfig | None = None
    off_task: str = ""  # a label that is not trained on, asked of a linear probe before and after

    def __post_init__(self) -> None:
        require_consistent(self.tasks)
        if self.replay and self.method == "scratch":
            raise InputError("replay with method=scratch: there is nothing to forget; leave one of them out")
        if self.replay and any(task.kind == "residues" for task in self.tasks):
            raise InputError("replay with a task of kind residues, which hides the residues that replay asks for")
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class LabelledData:
    """Training and test structures, and what the training labels say of each task."""

    train: Subset
    test: Subset
    tasks: tuple[Task, ...]
    val: Subset | None = None
    without_reference: tuple[str, ...] = ()  # elements for which test structures were left out
    starts: dict[str, Start] = field(default_factory=dict)  # task -> the head of the base that its own starts as

    @classmethod
    def open(cls, config: LabelledDataConfig, tasks: Sequence[TaskConfig]) -> LabelledData:
        """Chooses `num_train` structures at random and the first `num_test` of the test split.

        A structure needs one of the labels; what it does not have is not scored. Test structures of elements that have
        no reference energy are left out.

        Raises:
            InputError: a missing corpus, split or label; fewer structures than asked for; a unit that is not the
                corpus'.
        """
        train, rest = _chosen(config.corpus, config.train_split, tasks, config.num_train, "num_train", config.seed)
        test, _ = _chosen(config.test_corpus or config.corpus, config.test_split, tasks, config.num_test, "num_test")
        val = None
        if config.num_val and config.val_split == config.train_split:
            val = _first(rest, config.num_val, "num_val")
        elif config.num_val:
            val, _ = _chosen(config.corpus, config.val_split, tasks, config.num_val, "num_val")
        structures = train.read(range(len(train)), whole=True)
        units = train.manifest.get("units", {})
        fitted = tuple(Task.fit(task.in_units_of(units, config.corpus), structures) for task in tasks)
        missing: set[str] = set()
        for references in (task.references for task in fitted if task.references):
            test, strange = _with_references(test, references.elements)
            missing |= strange
            val = _with_references(val, references.elements)[0] if val else None
        return cls(train, test, fitted, val, tuple(sorted(missing)))

    @property
    def heads(self) -> dict[str, Any]:
        """MoietyConfig.tasks."""
        fresh = {name: head for task in self.tasks for name, head in task.head().items()}
        return fresh | {name: start.head for name, start in self.starts.items()}

    def started_from(self, config: FinetuneConfig) -> LabelledData:
        """With heads that start as the base's own where those say enough; from scratch none does."""
        if config.method == "scratch":
            return self
        require_export(config.model)
        return replace(self, starts=find_starts(config.model, self.tasks, self.train))

    def mixture(self, config: LabelledDataConfig, replay: ReplayConfig | None = None) -> Mixture:
        """Labelled structures, and those that are replayed."""
        sources = [SourceConfig(config.corpus)]
        if replay:
            total = sum(source.weight for source in replay.sources)
            sources = [SourceConfig(config.corpus, 1 - replay.share)]
            sources += [SourceConfig(s.path, replay.share * s.weight / total) for s in replay.sources]
        data = DataConfig(
            sources=tuple(sources),
            node_budget=config.node_budget,
            edge_budget=config.edge_budget,
            micro_batches=config.micro_batches,
            split=config.train_split,
            seed=config.seed,
        )
        corpora: list[Any] = [self.train]
        corpora += [Unlabelled(Corpus.open(source.path, split="train")) for source in sources[1:]]
        names = [Path(source.path).name for source in sources]
        return Mixture([Source(c, n, data, i) for i, (c, n) in enumerate(zip(corpora, names, strict=True))], data)


def _chosen(
    path: str, split: str, tasks: Sequence[TaskConfig], count: int, key: str, seed: int | None = None
) -> tuple[Subset, Subset]:
    """`count` structures that have the label of a task, and the rest: in their order, or in any with a seed."""
    corpus = Corpus.open(path, split=split)
    labelled = _labelled(corpus, tasks)
    if seed is not None:
        labelled = np.random.default_rng(seed).permutation(labelled)
    subset = Subset(corpus, labelled)
    return _first(subset, count, key), Subset(corpus, labelled[count:])


def _first(subset: Subset, count: int, key: str) -> Subset:
    if len(subset) < count:
        raise InputError(
            f"{subset.corpus.path}: split {subset.corpus.split!r} has {len(subset)} structures with a label for "
            f"data.{key}={count}; lower it"
        )
    return Subset(subset.corpus, subset.indices[:count])


def _with_references(subset: Subset, elements: dict[str, float]) -> tuple[Subset, set[str]]:
    """The structures all of whose elements have a reference energy, and the elements that have none."""
    strange = [unknown_elements(s, elements) for s in subset.read(range(len(subset)))]
    missing = {name for names in strange for name in names}
    kept = Subset(subset.corpus, subset.indices[[not names for names in strange]])
    if not len(kept):
        raise InputError(
            f"{subset.corpus.path}: every structure of split {subset.corpus.split!r} has an element that no training "
            f"label has ({', '.join(sorted(missing))}); raise data.num_train"
        )
    return kept, missing


def _labelled(corpus: Corpus, tasks: Sequence[TaskConfig]) -> Array:
    """Indices of the structures that have the label of a task.

    Raises:
        InputError: none has one of that name; those that there are are named.
    """
    there = np.zeros(len(corpus), dtype=bool)
    for task in tasks:
        of_task = corpus.known(Task(task).label.column)
        if not of_task.any():
            raise InputError(
                f"{corpus.path}: no structure of split {corpus.split!r} has a label {task.label!r} for kind "
                f"{task.kind!r}; there are {', '.join(corpus.label_names) or 'none'}"
            )
        there |= of_task
    return np.flatnonzero(there)


def build_model(config: FinetuneConfig, data: LabelledData) -> nn.Module:
    """The network to train: what is trainable is what the method trains."""
    heads = data.heads
    torch.manual_seed(config.training.seed)
    if config.method == "scratch":
        require_export(config.model)
        model = MoietyForPrediction(MoietyConfig.from_pretrained(config.model, tasks=heads))
    else:
        model = load_base(config.model, heads)
        start_heads(model, config.model, data.starts)
    model.derives &= any(task.kind in DERIVED for task in config.tasks)
    if config.method in ADAPTERS:
        return add_adapter(model, config.adapter, config.method)
    if config.method == "head":
        model.moiety.requires_grad_(False)
    return model


def finetune(run: Run, config: FinetuneConfig, data: LabelledData | None = None) -> list[dict[str, Any]] | None:
    """Trains, tests, and writes metrics.json, predictions.json and the model or adapter; rank 0 returns the metrics."""
    data = data or LabelledData.open(config.data, config.tasks)
    probed = Label(config.off_task).column
    if config.off_task and not all(part.corpus.known(probed).any() for part in (data.train, data.test)):
        raise InputError(f"off_task: {config.off_task!r} is no number that {data.train.corpus.path} has of structures")
    data = data.started_from(config)
    for line in told(data):
        run.progress.note(line)
    model = build_model(config, data)
    trainable, total = trainable_share(model)
    source = "random weights" if config.method == "scratch" else config.model
    run.progress.note(f"trunk from {source}")
    for name in data.heads:
        run.progress.note(f"head of {name}: starts as {data.starts.get(name, 'random weights')}")
    run.progress.note(f"{config.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})")
    objectives: list[Any] = [task.objective() for task in data.tasks]
    if config.replay:
        model = BesideBase(model, MoietyForPreTraining.from_pretrained(config.model))
        objectives = [*replayed(config.replay, objectives), *objectives]
    validation = None
    if data.val is not None:
        validation = Validation(run, partial(validation_score, config, data), config.data.patience)
    mixture = data.mixture(config.data, config.replay)
    fit(run, model, mixture, objectives, config.optimizer, config.training, validation)
    kept = optimizer_bytes(run.engine)
    run.progress.note(f"optimizer state: {kept:,} bytes a process; of all weights it would be {8 * total:,} in all")
    weights = run.weights()
    if weights is None:
        return None
    trained = load_trained(config, data, validation.best_weights() if validation else weights)
    if config.method in ADAPTERS:
        save_adapter(trained, run.path / "adapter", config.model, data.heads)  # type: ignore[arg-type]
    else:
        save_model(trained, run.path / "export")  # type: ignore[arg-type]
    output = predict(trained, MoietyConfig.from_pretrained(config.model).cutoff, data.test, data.tasks)
    facts: dict[str, Any] = {"trainable_parameters": trainable, "parameters": total}
    if validation:
        facts |= {"best_step": validation.best_step, "validation": validation.best_score}
    facts |= measure_forgetting(run, config, data, trained)
    return write_results(run.path, config, data, output, facts)


def load_trained(config: FinetuneConfig, data: LabelledData, weights: dict[str, Tensor]) -> nn.Module:
    """The network with what a checkpoint holds."""
    model = build_model(config, data)
    found = model.load_state_dict(own_weights(weights) if config.replay else weights, strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not found.unexpected_keys and not trained & set(found.missing_keys), "frozen ones alone are not kept"
    return model


def measure_forgetting(run: Run, config: FinetuneConfig, data: LabelledData, trained: nn.Module) -> dict[str, Any]:
    """`forgetting` and `off_task` of moiety.adapters.replay, told and returned; none where the trunk is nobody's."""
    hidden = any(task.kind == "residues" for task in data.tasks)  # the trunk sees other inputs than the base did
    if config.method in ("scratch", "head") or hidden:
        return {}
    settings = config.replay.objectives if config.replay else PRETRAINING
    structures = held_out(config.replay, data.test)
    losses = forgetting(config.model, trained, structures, build_objectives(settings))
    for domain, by_objective in losses.items():
        changes = ", ".join(f"{name} {e['base']:.3f} -> {e['now']:.3f}" for name, e in by_objective.items())
        run.progress.note(f"losses of pretraining, {domain}, base -> fine-tuned: {changes}")
    if not config.off_task:
        return {"forgetting": losses}
    sets = (subset.read(range(min(PROBED, len(subset))), whole=True) for subset in (data.train, data.test))
    errors = off_task(config.model, trained, Label(config.off_task), *sets)
    changes = f"MAE {errors['base']:.3g} -> {errors['now']:.3g}, fitted anew {errors['refit']:.3g}"
    run.progress.note(f"off task, linear probe of the base for {config.off_task}: {changes}")
    return {"forgetting": losses, "off_task": errors}


def validation_score(config: FinetuneConfig, data: LabelledData, weights: dict[str, Tensor]) -> float:
    """Mean over the tasks, by weight, of MAE over spread; of classes, of the share that is wrong."""
    assert data.val is not None
    model = load_trained(config, data, weights)
    output = predict(model, model.config.cutoff, data.val, data.tasks)  # type: ignore[arg-type]
    structures = data.val.read(range(len(data.val)), whole=True)
    total = 0.0
    for task in data.tasks:
        error = task.error(task.answer(output[task.name], structures), task.labels(structures))
        total += task.config.weight * error / (100 if task.classifies else task.std)
    return total / sum(task.config.weight for task in data.tasks)


def told(data: LabelledData) -> Iterator[str]:
    """What the training labels say: how many, mean and spread, reference energies."""
    if data.without_reference:
        elements = ", ".join(data.without_reference)
        yield f"{len(data.test):,} test structures: those with {elements}, which no training label has, are left out"
    yield f"tested on {len(data.test):,} of {data.test.corpus.path}"
    yield from lines_of(data.tasks)


def interval(task: Task, answered: Array, true: Array, sizes: Sequence[int] | Array) -> tuple[float, float]:
    """95 % bootstrap interval of the error: what other test sets of as many structures would have given.

    Args:
        task: whose error.
        answered: [items, ...] in the order of the structures.
        true: the same, NaN where not known.
        sizes: items of each structure: nodes that share one are not independent.
    """
    there = np.isfinite(true)
    missed = (answered != true) * 100.0 if task.classifies else np.abs(answered - true)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    items = np.where(there, missed, 0.0).reshape(len(true), -1).sum(axis=1)
    totals = np.bincount(owner, weights=items, minlength=len(sizes))
    counts = np.bincount(owner, weights=there.reshape(len(true), -1).sum(axis=1), minlength=len(sizes))
    drawn = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    low, high = np.quantile(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1).clip(min=1), (0.025, 0.975))
    return float(low), float(high)


def write_results(
    path: Path, config: FinetuneConfig, data: LabelledData, output: dict[str, Array], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """metrics.json and predictions.json, an entry a task, with the baselines that need no training."""
    train, test = (subset.read(range(len(subset)), whole=True) for subset in (data.train, data.test))
    name = METHODS[config.method]
    metrics, predictions = [], []
    for task in data.tasks:
        answered, true = task.answer(output[task.name], test), task.labels(test)
        error = task.error(answered, true)
        sizes = [s.num_nodes for s in test] if task.label.per_node else np.ones(len(test), dtype=np.int64)
        others = {name: task.error(answers, true) for name, answers in baselines(task, train, test).items()}
        metrics.append(
            {
                "target": task.name,
                "metric": task.metric,
                "unit": task.metric_unit,
                "results": {name: error, **others},
                "interval": interval(task, answered, true, sizes),
                "num_train": len(train),
                "num_test": len(test),
                "steps": config.training.steps,
                "seed": config.training.seed,
                **facts,
            }
        )
        there = np.isfinite(true)
        predictions.append(
            {
                "target": task.name,
                "unit": task.config.unit,
                "split": config.data.test_split,
                "method": name,
                "true": true[there].tolist(),
                "predicted": answered[there].tolist(),
                "metrics": {task.metric: error},
                "baselines": others,
                **({"classes": task.class_names} if task.classifies else {}),
            }
        )
    write_json(path / "metrics.json", metrics)
    write_json(path / "predictions.json", predictions)
    return metrics
