"""What layouts of arrays have in common: one structure out of many, by pointer or by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moiety.errors import InputError

MAX_BYTES = 2 << 30  # of one array that is held at once


def spans(arrays: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Iterator[tuple[int, int]]:
    """First and last node of every structure, from pointers [S + 1], or from counts [S].

    Raises:
        InputError: neither is named or there, or the pointers go backwards or out of the arrays.
    """
    name = options.get("pointer") or options.get("counts")
    if name is None or name not in arrays:
        raise InputError(f"{where}: a ragged layout names its pointer or counts; {name!r} is not there")
    if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
        raise InputError(f"{where}: {name} is no row of whole numbers; copy the file again")
    values = np.asarray(arrays[name][:], dtype=np.int64)
    ends = values if "pointer" in options else np.concatenate([[0], np.cumsum(values)])
    total = min((len(arrays[field]) for field in options.get("per_atom", ())), default=0)
    if len(ends) and (np.any(np.diff(ends) < 0) or ends[0] < 0 or ends[-1] > total):
        raise InputError(f"{where}: {name} does not fit the arrays of {total:,} nodes; the file is not whole")
    yield from zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)


def ragged(arrays: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of flat arrays: `per_atom` [sum N, ...] cut by the pointers, `per_structure` [S, ...] by row."""
    names = [*options.get("per_atom", ()), *options.get("per_structure", ())]
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{where}: holds no array {missing[0]}; it has {', '.join(sorted(arrays)[:12])}")
    if single := [name for name in names if arrays[name].ndim == 0]:
        raise InputError(f"{where}: {single[0]} is one number, not one a node or structure; copy the file again")
    for row, (first, last) in enumerate(spans(arrays, options, where)):
        record = {name: arrays[name][first:last] for name in options.get("per_atom", ())}
        for name in options.get("per_structure", ()):
            if row >= len(arrays[name]):
                raise InputError(f"{where}: {name} has {len(arrays[name]):,} rows, and there are more structures")
            record[name] = plain(arrays[name][row])
        yield str(row), record


def plain(value: Any) -> Any:
    """Text for bytes, also within arrays, which become lists; and what is inside an array of no dimension."""
    if isinstance(value, np.ndarray) and (value.ndim == 0 or value.dtype.kind in "SO"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value
