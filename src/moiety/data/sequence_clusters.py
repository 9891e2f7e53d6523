"""Clusters of protein sequences, so that no test chain has a relative in training: all against all, in seconds.

Two chains are linked when they share an ungapped local alignment that chance would not give: its BLOSUM62 score is
above the threshold at which E_VALUE such alignments are expected in the whole comparison (Karlin and Altschul 1990,
PNAS 87, 2264, with their lambda and K for ungapped BLOSUM62). Clusters are the connected components of the links, so
chains of two clusters are never linked. Alignments are looked for on diagonals with two common words of four residues
(the two-hit seeds of BLAST); pairs down to about 30 % identity over 100 residues are found, more remote ones are not.
"""
# Shapes: S sequences, W words, P candidate (pair, diagonal)s, L longest sequence.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from biotite.sequence import ProteinSequence
from biotite.sequence.align import SubstitutionMatrix
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moiety.data.structure import Array

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
OTHER = len(LETTERS)  # X and padding
WORD = 4  # residues
LAMBDA, K = 0.3176, 0.134  # of ungapped BLOSUM62
E_VALUE = 0.1  # false links expected in one clustering
OUTSIDE = -100  # score that ends an alignment
BLOCK = 100_000  # candidates scored at a time


def cluster(sequences: Sequence[str]) -> Array:
    """[S] cluster of each sequence, numbered from 0 in the order of first appearance. Deterministic.

    Args:
        sequences: one-letter codes, 13,867 chains of 40 to 256 residues take about ten seconds.
    """
    length = max((len(sequence) for sequence in sequences), default=0)
    codes = codes_of(sequences, length)
    first, second, diagonal = candidates(codes, length)
    num_residues = max(sum(map(len, sequences)), 2)
    threshold = math.log(K * num_residues**2 / 2 / E_VALUE) / LAMBDA
    linked = best_scores(codes, first, second, diagonal) >= threshold
    size = len(sequences)
    links = coo_array((np.ones(linked.sum(), bool), (first[linked], second[linked])), shape=(size, size))
    labels = connected_components(links, directed=False)[1]
    _, first_seen, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_seen))[inverse]


def codes_of(sequences: Sequence[str], length: int) -> Array:
    """[S, L] uint8 letter of each residue, OTHER beyond the end."""
    table = np.full(256, OTHER, np.uint8)
    table[np.frombuffer(LETTERS.encode(), np.uint8)] = np.arange(len(LETTERS))
    codes = np.full((len(sequences), length), OTHER, np.uint8)
    for row, sequence in zip(codes, sequences, strict=True):
        row[: len(sequence)] = table[np.frombuffer(sequence.encode(), np.uint8)]
    return codes


def candidates(codes: Array, length: int) -> tuple[Array, Array, Array]:
    """Pairs of sequences a < b and diagonals (place in b minus place in a) with two or more common words: [P] each."""
    windows = np.lib.stride_tricks.sliding_window_view(codes, WORD, axis=1)
    sequence_W, place_W = np.nonzero((windows != OTHER).all(axis=-1))
    word_W = windows[sequence_W, place_W].astype(np.int64) @ (len(LETTERS) ** np.arange(WORD))
    order = np.argsort(word_W, kind="stable")  # within a word, sequences ascend
    word_W, sequence_W, place_W = word_W[order], sequence_W[order], place_W[order]
    width = 2 * length
    keys = []
    for lag in range(1, int(np.bincount(word_W).max(initial=0))):
        left = np.flatnonzero(word_W[lag:] == word_W[:-lag])
        left = left[sequence_W[left] != sequence_W[left + lag]]
        pair = sequence_W[left] * len(codes) + sequence_W[left + lag]
        keys.append(pair * width + place_W[left + lag] - place_W[left] + length)
    hits = np.sort(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
    twice = hits[1:][hits[1:] == hits[:-1]]
    twice = twice[np.diff(twice, prepend=-1) > 0]
    pair, diagonal = np.divmod(twice, max(width, 1))
    first, second = np.divmod(pair, len(codes))
    return first, second, diagonal - length


def best_scores(codes: Array, first: Array, second: Array, diagonal: Array) -> Array:
    """[P] score of the best ungapped local alignment on each diagonal (Kadane's scan, all candidates at once)."""
    num, length = codes.shape
    padded = np.full((3 * length, num), OTHER, np.uint8)  # a row is one place of all sequences: it stays in the cache
    padded[length : 2 * length] = codes.T
    flat = padded.reshape(-1)
    scores = score_table()
    best = np.zeros(len(first), np.int16)
    for start in range(0, len(first), BLOCK):
        block = slice(start, start + BLOCK)
        a, b = first[block] + length * num, second[block] + (diagonal[block] + length) * num
        running = np.zeros(len(a), np.int16)
        for place in range(length):
            pair = flat[a + place * num].astype(np.int16) * (OTHER + 1) + flat[b + place * num]
            running += scores[pair]
            np.maximum(running, 0, out=running)
            np.maximum(best[block], running, out=best[block])
    return best


def score_table() -> Array:
    """[21 * 21] int16, BLOSUM62 by pairs of codes; OUTSIDE where either is OTHER."""
    matrix = SubstitutionMatrix.std_protein_matrix()
    order = ProteinSequence(LETTERS).code
    table = np.full((OTHER + 1, OTHER + 1), OUTSIDE, np.int16)
    table[:OTHER, :OTHER] = matrix.score_matrix()[np.ix_(order, order)]
    return table.reshape(-1)
