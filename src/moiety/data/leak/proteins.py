"""Which chains of one set have a relative in the other: shared ungapped alignments, their identity and coverage.

The seeds, diagonals and scores are those of the clustering that makes splits (`data.sequence_clusters`); here the best
alignment of each related pair is measured too. Relatives below about 30 % identity over 100 residues are not found.
"""
# Shapes: S sequences, P candidate (pair, diagonal)s, L longest sequence.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moiety.data import sequence_clusters as engine
from moiety.data.residues import one_letter
from moiety.data.structure import Array, Structure

CLOSE, CLOSE_COVERAGE = 0.9, 0.8  # identity and coverage of chains that are almost one
DISTANT = 0.3  # identity of chains that are related


@dataclass(frozen=True)
class Relative:
    """A pair of sequences and the best ungapped alignment they share."""

    first: int
    second: int
    score: int  # BLOSUM62
    identity: float  # share of equal residues in the alignment
    coverage: float  # length of the alignment, of the shorter sequence
    length: int  # residues aligned


def sequence(structure: Structure) -> str:
    """One-letter codes of the whole residues of a structure, in order; X for what is no standard residue."""
    return one_letter(structure.node_type[structure.is_residue])


def relatives(first: Sequence[str], second: Sequence[str]) -> list[Relative]:
    """Pairs across two sets whose alignment chance would not give (E = 0.1 in the whole comparison)."""
    sequences = [*first, *second]
    num_first = len(first)
    codes = engine.codes_of(sequences)
    found = engine.candidates(codes, num_first)
    scores = engine.best_scores(codes, found.first, found.second, found.diagonal)
    linked = scores >= engine.threshold(first, second, *engine.UNGAPPED, engine.E_VALUE)
    best: dict[tuple[int, int], Relative] = {}
    table = engine.score_table().reshape(engine.OTHER + 1, engine.OTHER + 1)
    columns = (found.first, found.second, found.diagonal, scores)
    for i, j, shift, score in zip(*(column[linked] for column in columns), strict=True):
        pair = (int(i), int(j) - num_first)
        if pair not in best or score > best[pair].score:
            shorter = min(len(sequences[i]), len(sequences[j]))
            same, size = _measure(codes[i], codes[j], int(shift), table)
            best[pair] = Relative(*pair, int(score), same / size, size / shorter, size)
    return list(best.values())


def _measure(a_L: Array, b_L: Array, shift: int, table: Array) -> tuple[int, int]:
    """Equal residues and length of the best ungapped local alignment on one diagonal (place in b - place in a)."""
    size = len(a_L) - abs(shift)
    a, b = (a_L[:size], b_L[shift:]) if shift >= 0 else (a_L[-shift:], b_L[:size])
    total = np.concatenate([[0], np.cumsum(table[a, b].astype(np.int64))])
    lowest = np.minimum.accumulate(total)
    stop = int(np.argmax(total - lowest))
    start = int(np.flatnonzero(total[: stop + 1] == lowest[stop])[-1])
    return int((a[start:stop] == b[start:stop]).sum()), stop - start
