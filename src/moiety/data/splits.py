"""Splits that depend on nothing but the keys themselves: a hash gives every key its place, on any machine, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

SPLITS = ("train", "val", "test")
Item = TypeVar("Item")


def place(key: str, salt: str) -> float:
    """A number in [0, 1) that is a function of the key and of the salt (the corpus) alone."""
    digest = hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def shuffled(keys: Iterable[str], salt: str) -> list[int]:
    """Indices of the keys in the order of their places: one fixed permutation."""
    keys = list(keys)
    return sorted(range(len(keys)), key=lambda index: (place(keys[index], salt), keys[index]))


def split_of(group: str, salt: str, val: float = 0.05, test: float = 0.05) -> str:
    """The split of a group (prototype, cluster): all its members follow."""
    where = place(group, salt)
    return "val" if where < val else "test" if where < val + test else "train"


def select(splits: Sequence[str], options: Mapping[str, int]) -> list[int]:
    """Indices of the first `options[split]` entries of every split, in order; a split that is not named is whole."""
    left = {split: options.get(split, len(splits)) for split in SPLITS}
    chosen = []
    for index, split in enumerate(splits):
        if left[split] > 0:
            left[split] -= 1
            chosen.append(index)
    return chosen


def even_share(options: Mapping[str, int], part: int, num_parts: int) -> dict[str, int]:
    """How many of every split that `options` count one of `num_parts` parts gives; together they give that many."""
    return {split: (options[split] + part) // num_parts for split in SPLITS if split in options}


def portion(items: Sequence[Item], part: int, num_parts: int) -> Sequence[Item]:
    """The items of one of `num_parts` parts; together, in the order of the parts, they are all items in their order."""
    return items[len(items) * part // num_parts : len(items) * (part + 1) // num_parts]
