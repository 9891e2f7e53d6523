"""A shuffled order that is computed, not stored: where each place of a permutation leads, from its key alone.

A Feistel network over a table of rows x columns, whose rounds add a hash of one coordinate to the other, is a bijection
of the table's cells; cells beyond the size are sent on until they fall inside (cycle walking), which keeps it one
(Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).
"""

from __future__ import annotations

import math

import numpy as np

NUM_ROUNDS = 6  # even


def permuted(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends some places.

    Args:
        places: [n] integers from 0 to size - 1.
        size: of the permutation.
        key: non-negative integers; each gives another permutation.

    Returns:
        [n] int64. All places together give every number from 0 to size - 1 once.
    """
    round_keys = np.random.SeedSequence(key).generate_state(NUM_ROUNDS, np.uint64)
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    cells = _rounds(places.astype(np.uint64), rows, columns, round_keys)
    while (outside := np.flatnonzero(cells >= size)).size:
        cells[outside] = _rounds(cells[outside], rows, columns, round_keys)
    return cells.astype(np.int64)


def _rounds(cells: np.ndarray, rows: int, columns: int, round_keys: np.ndarray) -> np.ndarray:
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for even, odd in round_keys.reshape(-1, 2):
        column = (column + _hash(row ^ even) % num_columns) % num_columns
        row = (row + _hash(column ^ odd) % num_rows) % num_rows
    return row * num_columns + column


def _hash(values: np.ndarray) -> np.ndarray:
    """[n] uint64, well mixed: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
