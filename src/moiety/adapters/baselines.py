"""Answers that need no network: what a fine-tuned model has to beat."""
# Shapes: n structures, V vocabulary.

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from moiety.adapters.tasks import Task, known
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import VOCAB_SIZE


def baselines(task: Task, train: Sequence[Structure], test: Sequence[Structure]) -> dict[str, Array]:
    """Name -> answers for the test structures, in the shape that `Task.error` takes.

    The same for all: mean or most frequent class of the training labels, no vector. And what the elements alone say:
    ridge regression on how many of each a structure has, and for numbers that do not grow with it on their shares;
    where there are references, those; mean or most frequent class of the nodes of a type. Of residues also what the
    sequence says: most frequent class of a residue and its two neighbours, and of the types themselves, of the
    neighbours alone.
    """
    labels = task.labels(train)
    items = sum(s.num_nodes for s in test) if task.label.per_node else len(test)
    same = np.broadcast_to(_middle(task, labels[known(labels)]), (items, *task.label.shape))
    if task.label.shape == (3,):
        return {"zero": same}
    if task.label.per_node:
        name = "most frequent class" if task.classifies else "mean predictor"
        if task.kind == "residues":
            return {name: same, "most frequent between two neighbours": _by_neighbors(task, labels, train, test)}
        found = {name: same, f"{name.removesuffix(' predictor')} of a type": _by_type(task, labels, train, test)}
        if task.classifies and any(s.is_residue.any() for s in train):
            found["most frequent class of a 3-mer"] = _by_neighbors(task, labels, train, test)
        return found
    found = {"mean predictor": same, "linear in composition": _by_composition(task, labels, train, test)}
    if task.kind == "mean":
        found["linear in shares of elements"] = _by_composition(task, labels, train, test, shares=True)
    return found


def _middle(task: Task, labels: Array) -> Array:
    """[...], one answer for all."""
    if task.classifies:
        return np.array(np.bincount(labels.astype(np.int64)).argmax(), dtype=np.float64)
    mean = task.middle(labels)
    return mean * np.eye(3) if task.label.shape == (3, 3) else np.full(task.label.shape, mean)


def _by_type(task: Task, labels: Array, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
    types, asked = (np.concatenate([s.node_type for s in structures]) for structures in (train, test))
    there = known(labels)
    answers = np.full(VOCAB_SIZE, _middle(task, labels[there]))
    for node_type in np.unique(types[there]):
        answers[node_type] = _middle(task, labels[there & (types == node_type)])
    return answers[asked]


def _by_neighbors(task: Task, labels: Array, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
    """Of a node by the types of it, unless they are asked for, and of those before and after it in the chain.

    What training has not seen is the most frequent class of all; the first and the last of a chain have no neighbour.
    """
    seen: dict[tuple[int, ...], Counter[float]] = defaultdict(Counter)
    centre = task.kind != "residues"
    for words, label in zip(_words(train, centre), labels.tolist(), strict=True):
        if not math.isnan(label):
            seen[words][label] += 1
    usual = float(_middle(task, labels[known(labels)]))
    best = {words: counts.most_common(1)[0][0] for words, counts in seen.items()}
    return np.array([best.get(words, usual) for words in _words(test, centre)])


def _words(structures: Sequence[Structure], centre: bool) -> Iterator[tuple[int, ...]]:
    """Of every node, the types of the one before, itself if `centre`, and the one after; 0 beyond an end or a gap."""
    for s in structures:
        types = s.node_type.tolist()
        number = s.residue_index if s.residue_index is not None else np.arange(len(types))
        chains = np.asarray(s.chain if s.chain is not None else [""] * len(types))
        joined = ((np.diff(number) == 1) & (chains[1:] == chains[:-1])).tolist()
        for i, own in enumerate(types):
            before = types[i - 1] if i and joined[i - 1] else 0
            after = types[i + 1] if i + 1 < len(types) and joined[i] else 0
            yield (before, own, after) if centre else (before, after)


def _by_composition(
    task: Task, labels: Array, train: Sequence[Structure], test: Sequence[Structure], shares: bool = False
) -> Array:
    if task.references:
        return task.by_references(test)
    there = known(labels)
    matrices = task.label.shape == (3, 3)
    numbers = np.trace(labels, axis1=1, axis2=2) / 3 if matrices else labels
    counts, asked = composition(train)[there], composition(test)
    if shares:
        counts[:, :-1] /= counts[:, :-1].sum(axis=1, keepdims=True)
        asked[:, :-1] /= asked[:, :-1].sum(axis=1, keepdims=True)
    normal = counts.T @ counts + (0.01 if shares else 1.0) * np.eye(counts.shape[1])
    answers = asked @ np.linalg.solve(normal, counts.T @ numbers[there])
    return answers[:, None, None] * np.eye(3) if matrices else answers


def composition(structures: Sequence[Structure]) -> Array:
    """[n, V + 1]: nodes of each type, and a one."""
    counts = [np.bincount(s.node_type, minlength=VOCAB_SIZE) for s in structures]
    return np.concatenate([np.array(counts, dtype=np.float64), np.ones((len(structures), 1))], axis=1)
