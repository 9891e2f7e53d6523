"""Fine-tuning to a user's own data in one command: tasks, split, sizes and rates are found, told, and used."""

from __future__ import annotations

import difflib
import math
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moiety.adapters.baselines import baselines
from moiety.adapters.finetune import FinetuneConfig, LabelledData, LabelledDataConfig, build_model, finetune
from moiety.adapters.tasks import KINDS, Task, TaskConfig
from moiety.data.own import OwnData, labels_of, read_own
from moiety.data.shards import Corpus, write_corpus
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.tokens.labels import RESIDUE
from moiety.training.config import OptimizerConfig, TrainingConfig
from moiety.training.run import Run
from moiety.training.stream import Prepared

RATES = {  # learning rates: lora's is between those that benchmarks/transfer.py finds best, 1e-3 to 1e-2
    "lora": 5e-3, "rslora": 2e-3, "dora": 5e-3, "ia3": 1e-2, "full": 1e-3, "head": 5e-3, "scratch": 2e-3,
}  # fmt: skip
STEPS_AT_1000, FEWEST, MOST = 600, 200, 4000
SCORES = 12  # validation scores in a run that goes to its end
MIN_STRUCTURES = 20
EXTENSIVE = 0.5  # error of a sum over elements, of that of a constant: below, a label grows with the structure
AVERAGE = 0.7  # of a mean over elements, likewise: below, it pays to learn what the elements leave


def finetune_own(
    data: Path,
    target: str,
    model: Path,
    out: Path,
    *,
    kind: str = "",
    unit: str = "",
    method: str = "lora",
    all_atom: bool = False,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Reads, splits, tells the plan, trains, tests; `out` has the data, the adapter, metrics and report.html.

    Args:
        data: a file or a folder, see `moiety.data.own`.
        target: a label of the structures.
        model: an exported base.
        out: a run directory; the same command goes on with an interrupted run.
        kind: how the target is read off the nodes, see `TaskConfig`; default: found from the labels.
        unit: of the target; default: what the data says.
        method: see `FinetuneConfig`.
        all_atom: read proteins as atoms.
        fresh: forget an earlier run there.

    Raises:
        InputError: data that cannot be used, with file, item and remedy.
    """
    from moiety.inference.report import write_report

    if fresh and (out / "config.json").exists():
        shutil.rmtree(out)
    own = read_own(data, all_atom)
    if len(own.structures) < MIN_STRUCTURES:
        raise InputError(
            f"{data}: {len(own.structures)} structures; at least {MIN_STRUCTURES} are needed to learn and test"
        )
    tasks = choose_tasks(own, target, kind, unit, str(data))
    corpus = out / "data"
    write_corpus(own.verdicts, corpus, name=data.stem, source=str(data), licence="the user's own", units=own.units)
    config = choose_config(corpus, tasks, str(model), method)
    with Run.open(out, config) as run:
        labelled = LabelledData.open(config.data, config.tasks)
        for line in (*told_data(own, data), *told_plan(config, labelled)):
            run.progress.note(line)
        metrics = finetune(run, config, labelled)
        assert metrics is not None, "one process"
    write_report(out)
    return metrics


def choose_tasks(own: OwnData, target: str, kind: str, unit: str, where: str) -> tuple[TaskConfig, ...]:
    """What is learned: an energy brings forces and stress along where the structures have them."""
    structures = own.structures
    target = _promote_energy(structures, own.units, target)
    names: set[str] = set(labels_of(structures))
    if any(s.is_residue.any() for s in structures):
        names.add(RESIDUE)
    there = sorted(names)
    if target not in there:
        close = difflib.get_close_matches(target, there, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{where}: no label {target!r}; there are {', '.join(there) or 'none'}{hint}")
    if target == "forces" and "energy" in there and not kind:
        target = "energy"
    kind = kind or _kind(structures, target, where)
    first = TaskConfig(target, kind, unit or _unit(own, structures, target, kind))
    if unit:
        own.units[target] = first.label_unit
    if kind != "energy":
        return (first,)
    derived = [TaskConfig(name, name, u) for name, u in (("forces", "eV/Å"), ("stress", "eV/Å^3")) if name in there]
    return (first, *derived)


def _promote_energy(structures: Sequence[Structure], units: dict[str, str], target: str) -> str:
    """Energies and forces under names of their own (REF_energy, REF_forces) take the places that are made for them."""
    if "energy" not in target.lower() or target == "energy":
        return target
    at = target.lower().index("energy")
    names = [target[:at] + word + target[at + 6 :] for word in ("forces", "force", "FORCES", "Forces")]
    forces = next((name for name in names if any(name in s.node_tensors for s in structures)), None)
    if forces is None:
        return target
    for s in structures:
        s.energy, s.forces = s.scalars.pop(target, None), s.node_tensors.pop(forces, None)
    units.pop(target, None)
    return "energy"


def _kind(structures: Sequence[Structure], target: str, where: str) -> str:
    """How a label is read off the nodes, from where the structures have it."""
    if target == RESIDUE:
        return "residues"
    if target == "energy":
        return "energy"
    if any(target in s.node_scalars for s in structures):
        return "node"
    shapes = {np.shape(s.node_tensors[target])[1:] for s in structures if target in s.node_tensors}
    shapes |= {(3,) for s in structures if target == "forces" and s.forces is not None}
    if shapes == {(3,)}:
        return "vector"
    if {np.shape(s.tensors[target]) for s in structures if target in s.tensors} == {(3, 3)}:
        return "tensor"
    if not any(target in s.scalars for s in structures):
        raise InputError(f"{where}: label {target!r} has a shape that no head reads; kinds are {', '.join(KINDS)}")
    if any(s.is_residue.any() for s in structures):
        return "mean"
    better = (("sum", EXTENSIVE), ("average", AVERAGE))
    return next((kind for kind, most in better if _said_by_elements(structures, target, kind) < most), "mean")


def _said_by_elements(structures: Sequence[Structure], target: str, kind: str) -> float:
    """Error of a sum or average over the elements, over that of a constant, on the validation structures."""
    train, val = (
        [s for s in structures if s.groups["split"] == split and target in s.scalars] for split in ("train", "val")
    )
    task = Task.fit(TaskConfig(target, kind), train)
    seen = np.unique(np.concatenate([s.node_type for s in train]))
    val = [s for s in val if np.isin(s.node_type, seen).all()]
    if not val or task.references is None:
        return 1.0
    found = baselines(task, train, val)
    true = task.labels(val)
    return task.error(found["linear in composition"], true) / task.error(found["mean predictor"], true)


def _unit(own: OwnData, structures: Sequence[Structure], target: str, kind: str) -> str:
    if kind == "energy":
        return "eV/atom" if all(s.periodic for s in structures) else "eV"
    return {"forces": "eV/Å", "stress": "eV/Å^3"}.get(target, own.units.get(target, ""))


def steps_for(labels: int) -> int:
    """Steps that grow with the square root of the number of labels."""
    return int(np.clip(STEPS_AT_1000 * math.sqrt(labels / 1000), FEWEST, MOST))


def choose_config(corpus: Path, tasks: tuple[TaskConfig, ...], model: str, method: str) -> FinetuneConfig:
    """Sizes from the structures, steps from their number, rates that have worked on the recipes."""
    if method not in RATES:
        raise InputError(f"method is {method!r}; it must be one of {', '.join(RATES)}")
    counts, nodes, edges = {}, [], []
    for split in ("train", "val", "test"):
        part = Corpus.open(corpus, split=split)
        known = np.logical_or.reduce([part.known(Task(task).label.column) for task in tasks])
        counts[split] = int(known.sum())
        nodes.append(np.asarray(part.num_nodes))
        edges.append(np.asarray(part.num_edges))
        if not counts[split]:
            raise InputError(f"{corpus}: no structure of the {split} set has the label {tasks[0].label!r}; add some")
    all_nodes, all_edges = np.concatenate(nodes), np.concatenate(edges)
    node_budget = int(max(np.clip(16 * np.median(all_nodes), 120, 600), all_nodes.max()))
    edge_budget = int(max(1.5 * node_budget * all_edges.sum() / all_nodes.sum(), all_edges.max(), 1))
    steps = steps_for(counts["train"])
    return FinetuneConfig(
        model=model,
        tasks=tasks,
        method=method,
        data=LabelledDataConfig(
            corpus=str(corpus),
            train_split="train",
            num_train=counts["train"],
            num_val=counts["val"],
            num_test=counts["test"],
            node_budget=node_budget,
            edge_budget=edge_budget,
        ),
        optimizer=OptimizerConfig(lr=RATES[method], warmup_steps=min(50, steps // 10), ema=0.99),
        training=TrainingConfig(steps=steps, checkpoint_every=max(10, steps // SCORES), log_every=max(1, steps // 40)),
    )


def told_data(own: OwnData, path: Path) -> Iterator[str]:
    """What was read, rejected, and how it is split."""
    rejected = [verdict for verdict in own.verdicts if verdict.structure is None]
    yield f"{path}: {len(own.structures):,} structures" + (f", {own.origin}" if own.origin else "")
    for verdict in rejected[:5]:
        yield f"left out: {verdict.file} [{verdict.index}] {verdict.code}: {verdict.reason}; {verdict.remedy}"
    if len(rejected) > 5:
        yield f"left out: {len(rejected) - 5} more, see data/rejected.jsonl"
    splits = [s.groups["split"] for s in own.structures]
    counts = ", ".join(f"{split} {splits.count(split):,}" for split in ("train", "val", "test"))
    yield f"split by {own.split_by}: {counts}"


def told_plan(config: FinetuneConfig, data: LabelledData) -> Iterator[str]:
    """What will be learned, how, and how long it takes, from one step that is tried."""
    for task in data.tasks:
        unit = task.config.unit or "no unit is stated (--unit)"
        yield f"learns {task.name} as {task.kind}, {unit}"
    mixture = data.mixture(config.data)
    epochs = config.training.steps * config.data.micro_batches / mixture.sources[0].num_batches
    seconds = config.training.steps * step_seconds(config, data)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield (
        f"{config.method}, learning rate {config.optimizer.lr:g}, {config.training.steps} steps ({epochs:.0f} epochs), "
        f"about {seconds / 60:.1f} min and {memory:.1f} GiB; ends before if validation gets no better"
    )


def step_seconds(config: FinetuneConfig, data: LabelledData) -> float:
    """Wall time of an optimizer step: its micro-batches forward and backward, the second time they run."""
    model = build_model(config, data).train()
    objectives = [task.objective() for task in data.tasks]
    cutoff = model.config.cutoff  # type: ignore[union-attr]
    prepared = Prepared(data.mixture(config.data), objectives, cutoff, config.training.seed)  # type: ignore[arg-type]
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for number in range(config.data.micro_batches):
            batch = prepared[number]
            output = model(**batch.inputs())
            torch.stack([objective.loss_sum(output, batch).sum() for objective in objectives]).sum().backward()
    return time.perf_counter() - started
