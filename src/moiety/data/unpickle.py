"""Corpora that were published as pickles, converted in a process that can do nothing else (moiety.data.guarded).

A pickle is a program. Here it is run by an unpickler that knows a dozen names (arrays, tensors, PyTorch Geometric's
containers) and replaces each with an inert stand-in. Every BATCH objects have a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moiety.data import guarded
from moiety.errors import InputError

BATCH = 500  # objects a process converts
MAX_OBJECT = 64 << 20  # bytes of one pickle


def converted(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the attributes of the objects of an LMDB: arrays, numbers and texts by name.

    Raises:
        InputError: a pickle names something that is not on the list, takes too much memory or time, or is no pickle;
            nothing that it says was run.
    """
    objects = ((key, value) for key, value in guarded.stream("lmdb", str(path)) if key != b"length")
    while batch := list(islice(objects, BATCH)):
        yield from convert(batch, str(path))


def convert(batch: list[tuple[bytes, bytes]], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The attributes of a batch of pickled objects, by key, from one restricted process."""
    for key, value in batch:
        if len(value) > MAX_OBJECT:
            raise InputError(f"{where}: object {key!r} is of {len(value):,} bytes, over {MAX_OBJECT:,}")
    return [(key.decode("ascii", "replace"), fields) for key, fields in guarded.stream("pickles", where, batch)]
