"""JSON lines: one record a line. NaN is read as such: the CATH chains write it where a residue has no backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from moiety.data.validate import Rejected
from moiety.errors import InputError

MAX_LINE = 64 << 20  # bytes


def records(stream: IO[bytes], _: object) -> Iterator[tuple[str, Any]]:
    """Streams the lines; the key is the number of the line, from 0."""
    number = 0
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise InputError(f"line {number + 1} has more than {MAX_LINE:,} bytes: no JSON lines")
        if line.strip():
            try:
                yield str(number), json.loads(line)
            except (ValueError, RecursionError) as error:
                yield str(number), Rejected("unreadable", f"line {number + 1} is no JSON ({error})")
        number += 1
