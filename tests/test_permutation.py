"""A shuffled order that nobody has to hold: every number once, in another order for every key."""

from __future__ import annotations

import numpy as np
import pytest

from moiety.training.permutation import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 99, 100, 101, 4096, 50_021])
def test_every_number_comes_once(size: int):
    for epoch in range(3):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, (7, 0, epoch))), np.arange(size))


def test_a_place_leads_to_the_same_number_whoever_else_is_asked_for():
    whole = permuted(np.arange(1000), 1000, (1, 2, 3))
    assert np.array_equal(permuted(np.arange(990, 1000), 1000, (1, 2, 3)), whole[990:])
    large = permuted(np.arange(10**12, 10**12 + 9), 10**13, (1,))
    assert len(set(large.tolist())) == 9 and large.min() >= 0 and large.max() < 10**13


def test_keys_give_other_orders_and_all_of_them():
    orders = [tuple(permuted(np.arange(4), 4, (key,)).tolist()) for key in range(2400)]
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(found) == 24 and counts.min() > 60 and counts.max() < 150  # 100 each


def test_places_and_neighbours_are_forgotten():
    size, num_keys = 100, 2000
    orders = np.array([permuted(np.arange(size), size, (key,)) for key in range(num_keys)])
    assert np.abs(orders.mean(axis=0) - (size - 1) / 2).max() < 5 * 28.9 / np.sqrt(
        num_keys
    )  # 28.9: one draw's deviation
    steps = np.abs(np.diff(orders, axis=1)).mean()
    assert steps == pytest.approx((size + 1) / 3, rel=0.02)  # of two different random numbers
