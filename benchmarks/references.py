"""What reference energies alone leave: plain least squares against ours, from few labels and many.

    python benchmarks/references.py

Test MAE on every n-th test structure, about 400, whose elements all have a reference; two draws of training structures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moiety.adapters.references import References, unknown_elements
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.shards import Corpus
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import TOKENS

ROOT = Path(__file__).parents[1]
CASES = {"crystals": ("energy", "eV/atom"), "qm9": ("u0", "eV"), "forces": ("energy", "eV")}
COUNTS, DRAWS, TESTED = (50, 100, 1000), (0, 1), 400


def main() -> int:
    table = Table("corpus", "label", "labels", "plain least squares", "ours", title="test MAE of references alone")
    for name, (label, unit) in CASES.items():
        train, test = (Corpus.open(ROOT / f"corpora/full/{name}", split=split) for split in ("train", "test"))
        bare = Task(TaskConfig(label, "energy", unit)).label
        asked = [test[i] for i in range(0, len(test), max(1, len(test) // TESTED))]
        asked = [s for s in asked if bare.of(s) is not None]
        for count in COUNTS:
            errors = []
            for draw in DRAWS:
                order = np.random.default_rng(draw).permutation(len(train))[:count]
                chosen = [train[int(i)] for i in order]
                task = Task.fit(TaskConfig(label, "energy", unit), chosen)
                assert task.references is not None
                known = [s for s in asked if not unknown_elements(s, task.references.elements)]
                errors.append([score(task, found, known) for found in (plain(task, chosen), task.references)])
            plain_errors, ours = (", ".join(f"{error:.2f}" for error in each) for each in zip(*errors, strict=True))
            table.add_row(name, f"{label}, {unit}", f"{count:,}", plain_errors, ours)
    Console().print(table)
    return 0


def plain(task: Task, structures: list[Structure]) -> References:
    """Ordinary least squares on total energies, the smallest solution of several."""
    labelled = [s for s in structures if task.label.of(s) is not None]
    counts = np.array([np.bincount(s.node_type, minlength=len(TOKENS)) for s in labelled], dtype=np.float64)
    energies: Array = np.array([task.label.of(s) for s in labelled])
    solution = np.linalg.lstsq(counts, energies, rcond=None)[0]
    theory = labelled[0].theory
    return References({theory: dict(zip(TOKENS, solution.tolist(), strict=True))}, theory)


def score(task: Task, references: References, structures: list[Structure]) -> float:
    totals = np.array([references.total(s, references.main) for s in structures])
    return task.error(task.answer(totals, structures), task.labels(structures))


if __name__ == "__main__":
    sys.exit(main())
