"""Where the head of a task starts: as a head of the base that says much of the labels already, or from random weights.

A base that has learned from labels keeps the heads it learned them with. What one of them says of a fine-tuning label,
times a factor and beside an offset or reference energies by least squares, may be most of it: then the new head is that
one, and the first step of training has an error of a level of theory, not of a head that knows nothing.
"""
# Shapes: n structures.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moiety.adapters.adapter import load_base, quietly
from moiety.adapters.outputs import predict
from moiety.adapters.references import References
from moiety.adapters.tasks import DERIVED, Task, TaskConfig, known
from moiety.data.structure import Array, Structure
from moiety.data.subset import Subset
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.heads_moiety import TaskHead
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.vocabulary_moiety import AMINO_ACIDS, FIRST_RESIDUE

TYPES = "hidden types"  # the base's own name for what a head of kind residues starts as
ENOUGH = 0.5  # of the variance of the labels: what a head of the base has to say of them
ASKED = 1000  # training structures at most


@dataclass(frozen=True)
class Start:
    """A head of the base, and the entry of MoietyConfig.tasks with which it says most of the labels."""

    origin: str
    head: dict[str, Any]
    explained: float | None = None  # share of the variance of the labels; None where nothing was fitted

    def __str__(self) -> str:
        share = "" if self.explained is None else f", which says {self.explained:.0%} of the variance of the labels"
        return f"the base's own for {self.origin}{share}"


def find_starts(model_dir: str | Path, tasks: Sequence[Task], train: Subset) -> dict[str, Start]:
    """Task -> the head of the base it starts as: of those read alike, the one that says most; none says too little.

    Args:
        model_dir: an exported base.
        tasks: with what their training labels say.
        train: training structures with labels; the first thousand are asked.
    """
    starts = {task.name: Start(TYPES, task.head()[task.name]) for task in tasks if task.kind == "residues"}
    heads = MoietyConfig.from_pretrained(str(model_dir)).tasks or {}
    pairs = [(task, origin) for task in tasks for origin in _alike(task, heads)]
    if not pairs:
        return starts
    asked = Subset(train.corpus, train.indices[:ASKED])
    structures = asked.read(range(len(asked)), whole=True)
    said = _ask(model_dir, pairs, asked)
    most = {task.name: ENOUGH for task in tasks}
    for (task, origin), outputs in zip(pairs, said, strict=True):
        head, explained = fit(task, structures, outputs)
        if explained > most[task.name]:
            most[task.name], starts[task.name] = explained, Start(origin, head, explained)
    return starts


def _alike(task: Task, heads: dict[str, Any]) -> Iterator[str]:
    """Names of the heads with the network of the task's own: sums, averages and energies have one."""
    if task.classifies or task.kind in DERIVED:
        return
    sums = TaskHead.WITH_REFERENCES
    for name, head in heads.items():
        if head["kind"] == task.kind or (head["kind"] in sums and task.kind in sums):
            yield name


def _ask(model_dir: str | Path, pairs: Sequence[tuple[Task, str]], asked: Subset) -> list[Array]:
    """What each head says, in its standard units, read as the task reads it."""
    readings = [
        Task(TaskConfig(f"{number}", "sum" if task.kind == "energy" else task.kind))
        for number, (task, _) in enumerate(pairs)
    ]
    model = load_base(model_dir, {reading.name: {"kind": reading.kind} for reading in readings})
    with quietly():
        base = MoietyForPrediction.from_pretrained(str(model_dir))
    for reading, (_, origin) in zip(readings, pairs, strict=True):
        copy_head(base, origin, model, reading.name)
    outputs = predict(model, model.config.cutoff, asked, readings)
    return [outputs[reading.name] for reading in readings]


def fit(task: Task, structures: Sequence[Structure], outputs: Array) -> tuple[dict[str, Any], float]:
    """Scale, and offset or reference energies, by least squares.

    Args:
        task: with what its training labels say.
        structures: n, of which some may be without the label.
        outputs: [items, ...] of a head with mean 0 and spread 1 and no references.

    Returns:
        the entry of MoietyConfig.tasks, and the share of the variance that it explains of what the task leaves to its
        head: above the mean, or above the reference energies.
    """
    labels = task.labels(structures)
    there = known(labels)
    labels, outputs, head = labels[there], outputs[there], task.head()[task.name]
    if task.references:
        labelled = [s for s, is_known in zip(structures, there, strict=True) if is_known]
        sizes = np.array([s.num_nodes for s in labelled])
        per = sizes if task.per_atom or task.averages else np.ones(len(labelled))
        totals, sums = labels * per, outputs * sizes if task.averages else outputs
        left, said = (_above_references(labelled, values)[0] / per for values in (totals, sums))
        scale = _ratio(said, left)
        rest, elements = _above_references(labelled, totals - scale * sums)
        return head | {"std": scale, "references": elements}, _explained(rest / per, left)
    _, centred = task.centred(labels, [])
    if task.kind == "dipole_norm":  # its head has no offset, and a norm no sign
        scale = max(_ratio(outputs, labels), 1e-6)
        return head | {"std": scale}, _explained(labels - scale * outputs, centred)
    scale = _ratio(task.centred(outputs, [])[1], centred)
    mean, rest = task.centred(labels - scale * outputs, [])
    return head | {"mean": mean, "std": scale}, _explained(rest, centred)


def _above_references(structures: Sequence[Structure], totals: Array) -> tuple[Array, dict[str, float]]:
    references = References.fit(structures, totals, by_theory=False)
    return totals - [references.total(s, references.main) for s in structures], references.elements


def _ratio(said: Array, labels: Array) -> float:
    return float((said * labels).sum() / max(np.square(said).sum(), 1e-30))


def _explained(rest: Array, labels: Array) -> float:
    return float(1 - np.square(rest).sum() / np.square(labels).sum())


def start_heads(model: MoietyForPrediction, model_dir: str | Path, starts: dict[str, Start]) -> None:
    """Gives the heads the weights that they start with; their scales they have from `Start.head`."""
    if not starts:
        return
    with quietly():
        base = MoietyForPreTraining.from_pretrained(str(model_dir))
    for name, start in starts.items():
        if start.origin == TYPES:
            weights = base.type_head.state_dict()
            for key in ("2.weight", "2.bias"):  # the last map of the head, a row a type
                weights[key] = weights[key][FIRST_RESIDUE : FIRST_RESIDUE + len(AMINO_ACIDS)]
            model.get_submodule(f"heads.{name}.logits").load_state_dict(weights)
        else:
            copy_head(base, start.origin, model, name)


def copy_head(
    base: MoietyForPrediction | MoietyForPreTraining, origin: str, model: MoietyForPrediction, name: str
) -> None:
    """The weights of a head of the base for one that has the same network."""
    model.get_submodule(f"heads.{name}").load_state_dict(base.get_submodule(f"heads.{origin}").state_dict())
