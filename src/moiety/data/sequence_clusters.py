"""Clusters of protein sequences, so that no test chain has a relative in training: all against all, in a minute.

Seeds are words that two chains share in places a pattern names, some of them in an alphabet of ten kinds of residues
(spaced seeds: Ma, Tromp and Li 2002, Bioinformatics 18, 440; groups after Murphy et al. 2000, Protein Eng. 13, 149). A
seed is a candidate where the chains stay similar around it. Two chains are linked when they share a local alignment
that chance would not give, seen from its BLOSUM62 score (Karlin and Altschul 1990, PNAS 87, 2264): without gaps, or,
for pairs that are not in one cluster by then, with gaps, extended from the best seed. Clusters are the connected
components of the links.
"""
# Shapes: S sequences, W words, P candidates (pair and diagonal), L longest sequence.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from biotite.sequence import ProteinSequence
from biotite.sequence.align import SubstitutionMatrix, align_local_gapped  # pyright: ignore[reportAttributeAccessIssue]
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moiety.data.structure import Array

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
OTHER = len(LETTERS)  # X and padding
KINDS = ["LVIM", "C", "A", "G", "ST", "P", "FYW", "EDNQ", "KR", "H"]  # of residues that replace each other
SEEDS = (  # kinds of residues, and the places of a word (1) that two chains share
    (list(LETTERS), "1111"),
    (list(LETTERS), "110101"),
    (KINDS, "11011011"),
    (KINDS, "1110010011"),
    (KINDS, "1101001101"),
)
STAGES = ((8, 26), (20, 42))  # residues on either side of a seed, BLOSUM62 score there of a candidate
UNGAPPED = (0.3176, 0.134)  # lambda, K of BLOSUM62
GAPPED = (0.267, 0.041)  # with GAP
GAP = (-12, -1)  # first residue of a gap, every other one
X_DROP = 30  # below the best score: an alignment is not extended further
E_VALUE = 0.1  # false links without gaps expected in one clustering
GAPPED_E_VALUE = 0.004  # the same with gaps, of each sequence: a false link costs less than one that is missed
OUTSIDE = -100  # score that ends an alignment
BLOCK = 200_000  # candidates scored at a time


class Candidates(NamedTuple):
    """Pairs of sequences first < second and a diagonal on which they are similar: [P] each."""

    first: Array
    second: Array
    place: Array  # in the first sequence, where the seed begins
    diagonal: Array  # place in the second sequence minus place in the first
    score: Array  # BLOSUM62 of the best ungapped alignment around the seed


def cluster(sequences: Sequence[str]) -> Array:
    """[S] cluster of each sequence, numbered from 0 in the order of first appearance. Deterministic.

    Args:
        sequences: one-letter codes; 13,867 chains of 40 to 256 residues take about a minute.
    """
    codes = codes_of(sequences)
    found = candidates(codes)
    linked = best_scores(codes, *found[:2], found.diagonal) >= threshold(sequences, sequences, *UNGAPPED, E_VALUE)
    labels = _components(found, linked, len(sequences))
    best = np.lexsort((-found.score, found.second, found.first))  # of each pair the best seed comes first
    pair = found.first[best] * len(sequences) + found.second[best]
    best = best[np.diff(pair, prepend=-1) > 0]
    best = best[labels[found.first[best]] != labels[found.second[best]]]
    least = threshold(sequences, sequences, *GAPPED, GAPPED_E_VALUE * len(sequences))
    linked[best] = [score >= least for score in _gapped_scores(sequences, found, best)]
    labels = _components(found, linked, len(sequences))
    _, first_seen, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_seen))[inverse]


def threshold(first: Sequence[str], second: Sequence[str], decay: float, factor: float, e_value: float) -> float:
    """The score that `e_value` pairs reach by chance: (ln K m n / E) / lambda.

    Args:
        first: sequences; against themselves where they are `second`, each pair once.
        second: sequences they are compared with.
        decay: lambda.
        factor: K.
        e_value: alignments expected by chance in the whole comparison.
    """
    space = sum(map(len, first)) * sum(map(len, second)) / (2 if first is second else 1)
    return math.log(max(factor * space / e_value, 1.0)) / decay


def codes_of(sequences: Sequence[str]) -> Array:
    """[S, L] uint8 letter of each residue, OTHER beyond the end."""
    table = code_table()
    codes = np.full((len(sequences), max(map(len, sequences), default=0)), OTHER, np.uint8)
    for row, sequence in zip(codes, sequences, strict=True):
        row[: len(sequence)] = table[np.frombuffer(sequence.encode(), np.uint8)]
    return codes


def code_table() -> Array:
    """[256] uint8, the code of every byte: its place in LETTERS, or OTHER."""
    table = np.full(256, OTHER, np.uint8)
    table[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))
    return table


def candidates(codes: Array, num_first: int | None = None) -> Candidates:
    """Seeds with similar surroundings, the best of each pair and diagonal.

    Args:
        codes: [S, L] from `codes_of`.
        num_first: where given, only pairs of one of the first so many sequences with one of the others.
    """
    parts = [part for kinds, pattern in SEEDS for part in _seeded(codes, kinds, pattern, num_first)]
    empty = np.zeros(0, np.int64)
    found = Candidates(
        *(np.concatenate([empty, *column]) for column in zip(*parts, strict=True)) if parts else [empty] * 5
    )
    order = np.lexsort((found.place, -found.score, found.diagonal, found.second, found.first))
    found = Candidates(*(column[order] for column in found))
    same = (np.diff(np.stack([found.first, found.second, found.diagonal]), axis=1) == 0).all(axis=0)
    fresh = np.r_[True, ~same][: len(order)]
    return Candidates(*(column[fresh] for column in found))


def _seeded(codes: Array, kinds: Sequence[str], pattern: str, num_first: int | None) -> Iterator[Candidates]:
    """The candidates of one kind of seed, block by block; a pair and diagonal may come several times."""
    sequence_W, place_W, word_W = _words(codes, kinds, pattern)
    margin = max(reach for reach, _ in STAGES)
    padded = _padded(codes, margin, margin + len(pattern))
    flat, scores = padded.reshape(-1), score_table()
    start_W = sequence_W * padded.shape[1] + place_W + margin
    for lag in range(1, int(np.unique(word_W, return_counts=True)[1].max(initial=0))):
        hits = np.flatnonzero(word_W[lag:] == word_W[:-lag])
        first, second = sequence_W[hits], sequence_W[hits + lag]  # they ascend within a word
        apart = first != second if num_first is None else (first < num_first) & (second >= num_first)
        hits = hits[apart]
        for start in range(0, len(hits), BLOCK):
            left = hits[start : start + BLOCK]
            score = np.zeros(len(left), np.int16)
            for reach, least in STAGES:
                score = _around(flat, scores, start_W[left], start_W[left + lag], reach, reach + len(pattern))
                left, score = left[score >= least], score[score >= least]
            place, right = place_W[left], left + lag
            yield Candidates(sequence_W[left], sequence_W[right], place, place_W[right] - place, score.astype(np.int64))


def _words(codes: Array, kinds: Sequence[str], pattern: str) -> tuple[Array, Array, Array]:
    """Sequence, place and number of every word without OTHER, sorted by number, then by sequence: [W] each."""
    if codes.shape[1] < len(pattern):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    kind_of = np.full(OTHER + 1, len(kinds), np.uint8)
    for kind, letters in enumerate(kinds):
        kind_of[[LETTERS.index(letter) for letter in letters]] = kind
    taken = [place for place, mark in enumerate(pattern) if mark == "1"]
    windows = np.lib.stride_tricks.sliding_window_view(kind_of[codes], len(pattern), axis=1)[:, :, taken]
    sequence_W, place_W = np.nonzero((windows < len(kinds)).all(axis=-1))
    word_W = windows[sequence_W, place_W].astype(np.int64) @ (len(kinds) ** np.arange(len(taken)))
    order = np.argsort(word_W, kind="stable")
    return sequence_W[order], place_W[order], word_W[order]


def _padded(codes: Array, before: int, after: int) -> Array:
    """[S, before + L + after] codes between OTHER."""
    num, length = codes.shape
    padded = np.full((num, before + length + after), OTHER, np.uint8)
    padded[:, before : before + length] = codes
    return padded


def _around(flat: Array, scores: Array, a: Array, b: Array, before: int, after: int) -> Array:
    """[P] score of the best ungapped alignment within a window around the places a and b of `flat` (Kadane's scan)."""
    running, best = np.zeros(len(a), np.int16), np.zeros(len(a), np.int16)
    for shift in range(-before, after):
        running += scores[flat[a + shift].astype(np.int16) * (OTHER + 1) + flat[b + shift]]
        np.maximum(running, 0, out=running)
        np.maximum(best, running, out=best)
    return best


def best_scores(codes: Array, first: Array, second: Array, diagonal: Array) -> Array:
    """[P] score of the best ungapped local alignment on each diagonal."""
    length = codes.shape[1]
    padded = _padded(codes, length, length)
    flat, scores, width = padded.reshape(-1), score_table(), 3 * length
    a, b = first * width + length, second * width + length + diagonal
    blocks = [slice(start, start + BLOCK) for start in range(0, len(first), BLOCK)]
    found = [_around(flat, scores, a[block], b[block], 0, length) for block in blocks]
    return np.concatenate([np.zeros(0, np.int16), *found])


def score_table() -> Array:
    """[21 * 21] int16, BLOSUM62 by pairs of codes; OUTSIDE where either is OTHER."""
    matrix = SubstitutionMatrix.std_protein_matrix()
    order = ProteinSequence(LETTERS).code
    table = np.full((OTHER + 1, OTHER + 1), OUTSIDE, np.int16)
    table[:OTHER, :OTHER] = matrix.score_matrix()[np.ix_(order, order)]
    return table.reshape(-1)


def _gapped_scores(sequences: Sequence[str], found: Candidates, chosen: Array) -> Iterator[int]:
    """Scores of the gapped local alignments through the seeds of the chosen candidates."""
    matrix = SubstitutionMatrix.std_protein_matrix()
    known = [ProteinSequence("".join(c if c in LETTERS else "X" for c in sequence)) for sequence in sequences]
    for index in chosen.tolist():
        first, second, place, diagonal, _ = (int(column[index]) for column in found)
        seed = (place, place + diagonal)
        pair = known[first], known[second]
        score = align_local_gapped(*pair, matrix, seed, X_DROP, GAP, score_only=True)
        assert isinstance(score, int)
        yield score


def _components(found: Candidates, linked: Array, size: int) -> Array:
    """[S] connected component of each sequence."""
    links = coo_array((np.ones(linked.sum(), bool), (found.first[linked], found.second[linked])), shape=(size, size))
    return connected_components(links, directed=False)[1]
