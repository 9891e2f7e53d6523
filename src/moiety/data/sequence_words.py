"""Close relatives among many long protein sequences, by the words they share; linear in the number of residues.

`sequence_clusters` finds more distant relatives among short chains, and compares all with all. Here are tens of
thousands of whole proteins: those that share a word of CLUSTER_WORD residues are one cluster, and a chain is found in a
protein by a word of JOIN_WORD residues that both have on one diagonal.
"""
# Shapes: S sequences, W words, P candidate (chain, sequence, diagonal)s.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moiety.data.sequence_clusters import LETTERS, OTHER, code_table
from moiety.data.structure import Array

CLUSTER_WORD = 12  # residues: two of 20,000 unrelated proteins share one by chance once in a hundred such corpora
JOIN_WORD = 8  # residues: 90 % identity over 32 residues or more leaves a run of at least so many
MIN_KINDS = 5  # different residues of a word: runs of one or two say nothing of kinship
MIN_IDENTITY, MIN_COVERAGE = 0.9, 0.8  # of a chain that is part of a sequence


def clusters(sequences: Sequence[str]) -> Array:
    """[S] cluster of each sequence: the connected components of sharing a word, or of being equal."""
    word_W, owner_W, _ = _words(sequences, CLUSTER_WORD)
    order = np.argsort(word_W, kind="stable")
    word_W, owner_W = word_W[order], owner_W[order]
    same = word_W[1:] == word_W[:-1]
    seen: dict[str, int] = {}
    first_S = np.array([seen.setdefault(sequence, place) for place, sequence in enumerate(sequences)], np.int64)
    a = np.concatenate([owner_W[:-1][same], np.arange(len(sequences))])
    b = np.concatenate([owner_W[1:][same], first_S])
    links = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(sequences),) * 2)
    return connected_components(links, directed=False)[1]


def contained(chains: Sequence[str], sequences: Sequence[str]) -> list[tuple[int, int]]:
    """(chain, sequence) pairs, sorted, of which MIN_COVERAGE or more of the chain lies ungapped in the sequence with
    MIN_IDENTITY or more."""
    word_W, chain_W, place_W = _words(chains, JOIN_WORD)
    order = np.argsort(word_W, kind="stable")
    word_W, chain_W, place_W = word_W[order], chain_W[order], place_W[order]
    there_W, owner_W, at_W = _words(sequences, JOIN_WORD)
    first, last = np.searchsorted(word_W, there_W, "left"), np.searchsorted(word_W, there_W, "right")
    count = last - first
    hit = np.repeat(np.arange(len(there_W)), count)
    match = np.repeat(first, count) + np.arange(len(hit)) - np.repeat(np.cumsum(count) - count, count)
    found_P3 = np.unique(np.stack([chain_W[match], owner_W[hit], at_W[hit] - place_W[match]], axis=1), axis=0)
    candidates: list[list[int]] = found_P3.tolist()
    pairs = {(c, s) for c, s, diagonal in candidates if _is_part(chains[c], sequences[s], diagonal)}
    return sorted(pairs)


def _is_part(chain: str, sequence: str, diagonal: int) -> bool:
    """Whether some stretch of MIN_COVERAGE of the chain has MIN_IDENTITY on the diagonal."""
    start, stop = max(0, -diagonal), min(len(chain), len(sequence) - diagonal)
    size = math.ceil(MIN_COVERAGE * len(chain))
    if stop - start < size:
        return False
    here = np.frombuffer(chain[start:stop].encode(), np.uint8)
    there = np.frombuffer(sequence[start + diagonal : stop + diagonal].encode(), np.uint8)
    equal = np.concatenate([[0], np.cumsum(here == there)])
    return bool((equal[size:] - equal[:-size]).max() >= MIN_IDENTITY * size)


def _words(sequences: Sequence[str], size: int) -> tuple[Array, Array, Array]:
    """Words of `size` residues as numbers, the sequence of each and its place in it: [W] each."""
    table = code_table()
    lengths = np.array([len(sequence) + 1 for sequence in sequences])  # with an end that is in no word
    code = table[np.frombuffer("".join(f"{sequence}-" for sequence in sequences).encode(), np.uint8)]
    num_words = max(len(code) - size + 1, 0)
    word, kinds, whole = np.zeros(num_words, np.int64), np.zeros(num_words, np.uint32), np.ones(num_words, bool)
    for step in range(size):
        letter = code[step : step + num_words]
        word = word * len(LETTERS) + letter
        kinds |= np.uint32(1) << letter.astype(np.uint32)
        whole &= letter < OTHER
    chosen = np.flatnonzero(whole & (np.bitwise_count(kinds) >= MIN_KINDS))
    owner = np.repeat(np.arange(len(sequences)), lengths)[chosen]
    return word[chosen], owner, chosen - (np.cumsum(lengths) - lengths)[owner]
