"""What a teacher of pretraining says by itself, whose labels the released weights learned from, fitted to a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moiety.adapters.references import References
from moiety.adapters.tasks import Task, known
from moiety.data.structure import Array, Structure
from moiety.data.teachers import CHGNetR2SCAN, GFN1xTB, Labeller, Teacher


@dataclass(frozen=True)
class TeacherBaseline:
    """A label of a teacher's: energy, dipole, gap, forces."""

    teacher: type[Teacher[Any]]
    label: str

    @property
    def name(self) -> str:
        return f"{self.teacher.theory.split(' (')[0]} + least squares"

    def fitted(self, task: Task, train: Sequence[Structure], test: Sequence[Structure]) -> Array:
        """Answers for the test structures, of which the teacher is asked too; one without an answer gets their mean.

        Args:
            task: what is asked: numbers of structures, or forces.
            train: structures with labels of the task; the teacher is fitted to these: forces by one factor; energies
                with the number of each element beside, of crystals, where elements are many, as reference energies of
                the difference; other numbers with their shares.
            test: structures.
        """
        labels = task.labels(train)
        there = known(labels)
        said, asked = (self._said(structures, task.per_atom) for structures in (train, test))
        if task.label.shape == (3,):
            return asked * ((said[there] * labels[there]).sum() / np.square(said[there]).sum())
        if task.per_atom:
            labelled = [s for s, is_known in zip(train, there, strict=True) if is_known]
            difference = (labels - said)[there] * [s.num_nodes for s in labelled]
            references = References.fit(labelled, difference, by_theory=False)
            return asked + [references.total(s, "") / s.num_nodes for s in test]
        elements = sorted({int(number) for s in train for number in s.node_type})
        columns, others = (self._columns(values, s, elements) for values, s in ((said, train), (asked, test)))
        weights, *_ = np.linalg.lstsq(columns[there], labels[there], rcond=None)
        return others @ weights

    def _said(self, structures: Sequence[Structure], per_atom: bool) -> Array:
        """[n] or [N, 3]."""
        bare = (
            replace(s, energy=None, forces=None, stress=None, dipole=None, scalars={}, node_scalars={})
            for s in structures
        )
        with Labeller(self.teacher()) as labeller:
            answered = list(labeller.applied(bare))
        if self.label == "forces":
            return np.concatenate([np.zeros_like(s.positions) if s.forces is None else s.forces for s in answered])
        values = np.array(
            [s.energy if self.label == "energy" else s.scalars.get(self.label) for s in answered], dtype=np.float64
        )
        values /= [s.num_nodes if per_atom else 1 for s in answered]
        return np.where(np.isnan(values), np.nanmean(values), values)

    def _columns(self, values: Array, structures: Sequence[Structure], elements: Sequence[int]) -> Array:
        counts = np.array([[(s.node_type == e).sum() for e in elements] for s in structures], dtype=np.float64)
        if self.label != "energy":
            counts /= counts.sum(axis=1, keepdims=True).clip(min=1)
        return np.column_stack([values, counts])


DIPOLE, ENERGY, GAP, FORCES = (TeacherBaseline(GFN1xTB, label) for label in ("dipole", "energy", "gap", "forces"))
CRYSTAL_ENERGY = TeacherBaseline(CHGNetR2SCAN, "energy")
