"""ASE's LMDB (.aselmdb): rows of zlib-compressed JSON, read without ASE's own database, which may not be read-only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data import guarded
from moiety.data.validate import Rejected
from moiety.errors import InputError

RESERVED = (b"nextid", b"metadata", b"deleted_ids")
MAX_ROW = 256 << 20  # bytes of one row's JSON
PICKLE = b"\x80"  # first byte of every pickle since protocol 2
NUMBERS = "biufc"  # kinds of numpy.dtype


def records(path: Path, _: object) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Streams the rows: numbers, positions, cell, pbc, energy, forces, stress, data.*, key_value_pairs.*"""
    for key, value in guarded.stream("lmdb", str(path)):
        if value[:1] == PICKLE:
            raise InputError(f"{path}: holds pickles, not ASE's rows; its container is `pickled`")
        if key not in RESERVED:
            yield key.decode("ascii", "replace"), _row(value)


def _row(value: bytes) -> dict[str, Any] | Rejected:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(value, MAX_ROW)
        if unpacker.unconsumed_tail:
            return Rejected("unreadable", f"the row unpacks to more than {MAX_ROW:,} bytes")
        row = json.loads(text, object_hook=array_of)
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        return Rejected("unreadable", f"the row is no compressed JSON ({error})")
    return row if isinstance(row, dict) else Rejected("unreadable", f"the row is a {type(row).__name__}")


def array_of(item: dict[str, Any]) -> Any:
    """{"__ndarray__": [shape, dtype, values]} as an array; every other mapping as it is."""
    if "__ndarray__" not in item:
        return item
    shape, name, values = item["__ndarray__"]
    dtype = np.dtype(str(name))
    if dtype.kind not in NUMBERS:
        raise ValueError(f"an array of {dtype}")
    return np.array(values, dtype=dtype).reshape(shape)
