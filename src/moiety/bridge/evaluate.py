"""What a bridge knows: every fact asked of structures that it has not seen, right answers counted by class and fact.

Class A is known from the composition, B from the bonds, C from geometry at fixed composition. Questions come in the
words of training, in others, and of combinations that were kept back.
"""
# Shapes: R rows.

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moiety.bridge.facts import facts_of, is_kept_back
from moiety.bridge.reading import Said
from moiety.bridge.rows import Row, asking, compared, unfit_row
from moiety.data.structure import Structure

RESAMPLES = 1000
INTERVAL = 0.025, 0.975
BINS = 10  # of confidence
Array = np.ndarray


@dataclass(frozen=True)
class Exam:
    """Questions about structures, and which of them were of combinations that training kept back."""

    structures: list[Structure]
    rows: list[Row]
    kept_back: Array  # [R] bool

    def of(self, chosen: Callable[[int, Row], bool]) -> Exam:
        """Some of the questions."""
        places = [number for number, row in enumerate(self.rows) if chosen(number, row)]
        return Exam(self.structures, [self.rows[place] for place in places], self.kept_back[places])


def set_exam(structures: Sequence[Structure], words: str, most: int, seed: int = 0, unfitting: int = 0) -> Exam:
    """Up to `most` questions of every fact in the words of a split ("train" or "test"), and some that do not fit.

    All structures that a fact of class C can be asked of are taken first, partners together.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(structures))
    counts: Counter[tuple[str, bool]] = Counter()
    rows, kept_back = [], []
    for place in order.tolist():
        structure = structures[place]
        for fact in facts_of(structure, rng):
            back = is_kept_back(fact, structure)
            if counts[fact.name, back] < most:
                counts[fact.name, back] += 1
                rows.append(asking(fact, place, words, rng))
                kept_back.append(back)
    rows += compared(structures, words, rng)[:most]
    kept_back += [False] * (len(rows) - len(kept_back))
    for place in order[:unfitting].tolist():
        rows.append(unfit_row(structures[place], place, words, rng))
        kept_back.append(False)
    return Exam(list(structures), rows, np.array(kept_back, dtype=bool))


def is_right(said: Said, row: Row) -> bool:
    return said.answer == row.answer


def accuracies(exam: Exam, said: Sequence[Said]) -> dict[str, tuple[float, tuple[float, float], int]]:
    """Class, and class and fact, -> share of right answers, its bootstrap interval, and how many there were.

    Numbers count as right where their token is said; how near they are is another question.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(exam.rows, said, strict=True):
        assert row.fact is not None
        for key in (row.fact.kind, f"{row.fact.kind}:{row.fact.name}"):
            right[key].append(is_right(answer, row))
    return {key: (float(np.mean(values)), interval(values), len(values)) for key, values in sorted(right.items())}


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Of the mean, by resampling."""
    found = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.quantile(found[drawn].mean(axis=1), INTERVAL)
    return float(low), float(high)


def expected_calibration_error(exam: Exam, said: Sequence[Said]) -> float:
    """Mean distance of confidence from the share of right answers, over bins of confidence."""
    sure = np.array([one.confidence for one in said])
    right = np.array([is_right(one, row) for one, row in zip(said, exam.rows, strict=True)])
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))


def number_errors(exam: Exam, said: Sequence[Said], names: Sequence[str], means: Sequence[float]) -> dict[str, Array]:
    """Property -> [n,2] absolute errors and sigmas; where no number was said the training mean stands, of sigma inf."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row, one in zip(exam.rows, said, strict=True):
        if row.number is None:
            continue
        name, value = row.number
        place = list(names).index(name)
        if one.answer == row.answer and one.values is not None and one.sigmas is not None:
            found[name].append((abs(float(one.values[place]) - value), float(one.sigmas[place])))
        else:
            found[name].append((abs(means[place] - value), np.inf))
    return {name: np.array(values) for name, values in found.items() if values}
