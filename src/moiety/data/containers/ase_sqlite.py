"""ASE's SQLite database (.db): its rows as fields, without ASE's own reader, which opens for writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data import guarded
from moiety.data.containers.aselmdb import array_of
from moiety.data.validate import Rejected

ARRAYS = {  # column -> dtype, shape
    "numbers": ("<i4", (-1,)), "positions": ("<f8", (-1, 3)), "cell": ("<f8", (3, 3)), "forces": ("<f8", (-1, 3)),
    "stress": ("<f8", (6,)), "dipole": ("<f8", (3,)), "magmoms": ("<f8", (-1,)), "charges": ("<f8", (-1,)),
    "tags": ("<i4", (-1,)), "initial_magmoms": ("<f8", (-1,)), "initial_charges": ("<f8", (-1,)),
}  # fmt: skip
NUMBERS = ("energy", "free_energy", "magmom", "charge")
HEADER = 8  # bytes before the JSON of `data`: where it starts; arrays lie between


def records(path: Path, _: object) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Streams the rows: numbers, positions, cell, pbc, energy, forces, stress, data.*, key_value_pairs.*"""
    columns = [*ARRAYS, *NUMBERS, "pbc", "key_value_pairs", "data"]
    for key, row in guarded.stream("sqlite", str(path), "systems", "id", columns):
        try:
            record = {name: row[name] for name in NUMBERS if row[name] is not None}
            for name, (dtype, shape) in ARRAYS.items():
                if row[name] is not None:
                    record[name] = np.frombuffer(row[name], dtype=dtype).reshape(shape)
            record["pbc"] = [bool(row["pbc"] & bit) for bit in (1, 2, 4)]
            record["key_value_pairs"] = json.loads(row["key_value_pairs"] or "{}", object_hook=array_of)
            record["data"] = _data(row["data"])
        except (TypeError, ValueError, RecursionError) as error:
            yield key, Rejected("unreadable", f"the row is not ASE's ({error})")
        else:
            yield key, record


def _data(value: bytes | str | None) -> Any:
    """The dictionary `data`: JSON, since ASE 3.20 behind a block of arrays that it points into."""
    if not value or value == "null":
        return {}
    if isinstance(value, str):
        return json.loads(value, object_hook=array_of)
    start = int(np.frombuffer(value[:HEADER], dtype="<i8")[0])

    def pointed_to(item: dict[str, Any]) -> Any:
        if "__ndarray__" not in item:
            return item
        shape, name, offset = item["__ndarray__"]
        return np.frombuffer(value, dtype=np.dtype(name), count=int(np.prod(shape)), offset=offset).reshape(shape)

    return json.loads(value[start:], object_hook=pointed_to)
