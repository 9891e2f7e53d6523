"""Answers that need no network: what a fine-tuned model has to beat."""
# Shapes: n structures, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moiety.adapters.tasks import TaskConfig
from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import VOCAB_SIZE

Array = np.ndarray


def baselines(task: TaskConfig, train: Sequence[Structure], test: Sequence[Structure]) -> dict[str, Array]:
    """Name -> answers for the test structures, in the shape that `TaskConfig.error` takes.

    The same for all: mean or most frequent class of the training labels, no vector. And what the elements alone say:
    ridge regression on how many of each a structure has; mean or most frequent class of the nodes of a type.
    """
    labels = labels_of(task, train)
    items = sum(s.num_nodes for s in test) if task.target.per_node else len(test)
    same = np.broadcast_to(_middle(task, labels[known(labels)]), (items, *task.target.shape))
    if task.kind == "vector":
        return {"zero": same}
    if task.target.per_node:
        name = "most frequent class" if task.classifies else "mean predictor"
        return {name: same, f"{name.removesuffix(' predictor')} of a type": _by_type(task, labels, train, test)}
    return {"mean predictor": same, "linear in composition": _by_composition(task, labels, train, test)}


def labels_of(task: TaskConfig, structures: Sequence[Structure]) -> Array:
    """[items, ...] float64, NaN where one is not known."""
    return task.target.values(structures, torch.float64).numpy()


def known(labels: Array) -> Array:
    """[items] bool."""
    return np.asarray(np.isfinite(labels).reshape(len(labels), -1).all(axis=1))


def _middle(task: TaskConfig, labels: Array) -> Array:
    """[...], one answer for all."""
    if task.classifies:
        return np.array(np.bincount(labels.astype(np.int64)).argmax(), dtype=np.float64)
    mean = task.middle(labels)
    return mean * np.eye(3) if task.kind == "tensor" else np.full(task.target.shape, mean)


def _by_type(task: TaskConfig, labels: Array, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
    types, asked = (np.concatenate([s.node_type for s in structures]) for structures in (train, test))
    there = known(labels)
    answers = np.full(VOCAB_SIZE, _middle(task, labels[there]))
    for node_type in np.unique(types[there]):
        answers[node_type] = _middle(task, labels[there & (types == node_type)])
    return answers[asked]


def _by_composition(task: TaskConfig, labels: Array, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
    there = known(labels)
    numbers = np.trace(labels, axis1=1, axis2=2) / 3 if task.kind == "tensor" else labels
    counts = composition(train)[there]
    normal = counts.T @ counts + np.eye(counts.shape[1])
    answers = composition(test) @ np.linalg.solve(normal, counts.T @ numbers[there])
    return answers[:, None, None] * np.eye(3) if task.kind == "tensor" else answers


def composition(structures: Sequence[Structure]) -> Array:
    """[n, V + 1]: nodes of each type, and a one."""
    counts = [np.bincount(s.node_type, minlength=VOCAB_SIZE) for s in structures]
    return np.concatenate([np.array(counts, dtype=np.float64), np.ones((len(structures), 1))], axis=1)
