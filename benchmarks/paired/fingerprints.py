"""The best that needs no geometry and no network: gradient boosting on counts of a molecule's circular fragments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from sklearn.ensemble import HistGradientBoostingRegressor

from moiety.adapters.tasks import Task, known
from moiety.data.structure import Array, Structure

NAME = "fingerprint + gradient boosting"
FRAGMENTS = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)


def boosted(task: Task, train: Sequence[Structure], test: Sequence[Structure], seed: int) -> Array:
    """Answers [n] for the test structures; of sums, what the references leave is learned.

    The first text of a structure is its SMILES. Settings are scikit-learn's own but for the smallest leaf, which at its
    default of 20 would hide most fragments of small sets.
    """
    labels = task.labels(train)
    there = known(labels)
    labelled = [s for s, is_known in zip(train, there, strict=True) if is_known]
    _, left = task.centred(labels[there], labelled)
    offset = task.mean if not task.references else 0.0
    model = HistGradientBoostingRegressor(min_samples_leaf=5, max_features=0.3, random_state=seed)
    model.fit(counts(labelled), left)
    answers = model.predict(counts(test)) + offset
    if task.references:
        answers = answers + task.by_references(test)
    return answers


def counts(structures: Sequence[Structure]) -> Array:
    """[n, 2048] of fragments up to two bonds around an atom, hashed (Morgan; Rogers and Hahn 2010)."""
    return np.stack([FRAGMENTS.GetCountFingerprintAsNumPy(Chem.MolFromSmiles(s.text[0])) for s in structures])
