"""What GFN1-xTB says by itself, the level whose labels the released weights learned from, fitted to a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moiety.adapters.tasks import Task, known
from moiety.data.structure import Array, Structure
from moiety.data.teachers import GFN1xTB, Labeller

NAME = "GFN1-xTB + least squares"


def fitted(task: Task, label: str, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
    """Answers for the test structures, of which the level is asked too; one without an answer gets the mean of them.

    Args:
        task: what is asked: numbers of structures, or forces.
        label: what the level says of it: energy, dipole, gap, forces.
        train: structures with labels of the task; the level is fitted to these, forces by one factor, energies with
            the number of each element beside, other numbers with their shares.
        test: structures.
    """
    labels = task.labels(train)
    there = known(labels)
    said, asked = (_said(label, structures) for structures in (train, test))
    if task.label.shape == (3,):
        return asked * ((said[there] * labels[there]).sum() / np.square(said[there]).sum())
    elements = sorted({int(number) for s in train for number in s.node_type})
    columns, others = (_columns(label, values, s, elements) for values, s in ((said, train), (asked, test)))
    weights, *_ = np.linalg.lstsq(columns[there], labels[there], rcond=None)
    return others @ weights


def _said(label: str, structures: Sequence[Structure]) -> Array:
    """[n] or [N, 3]."""
    bare = (replace(s, energy=None, forces=None, dipole=None, scalars={}, node_scalars={}) for s in structures)
    with Labeller(GFN1xTB()) as labeller:
        answered = list(labeller.applied(bare))
    if label == "forces":
        return np.concatenate([np.zeros_like(s.positions) if s.forces is None else s.forces for s in answered])
    values = np.array([s.energy if label == "energy" else s.scalars.get(label) for s in answered], dtype=np.float64)
    return np.where(np.isnan(values), np.nanmean(values), values)


def _columns(label: str, values: Array, structures: Sequence[Structure], elements: Sequence[int]) -> Array:
    counts = np.array([[(s.node_type == number).sum() for number in elements] for s in structures], dtype=np.float64)
    if label != "energy":
        counts /= counts.sum(axis=1, keepdims=True).clip(min=1)
    return np.column_stack([values, counts])
