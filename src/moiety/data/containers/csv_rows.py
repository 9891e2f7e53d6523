"""CSV with a header line. Option: `delimiter`. A cell is text: a formula is never more than its characters."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import IO, Any

from moiety.data.validate import Rejected
from moiety.errors import InputError

MAX_CELL = 1 << 20  # characters


def records(stream: IO[bytes], options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Streams the rows; the key is the number of the row, from 0."""
    csv.field_size_limit(MAX_CELL)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=options.get("delimiter", ","), restkey="", strict=True)
    try:
        for number, row in enumerate(rows):
            if "" in row or None in row.values():
                yield str(number), Rejected("wrong-counts", f"line {rows.line_num} has other cells than the header")
            else:
                yield str(number), dict(row)
    except csv.Error as error:
        raise InputError(f"CSV: line {rows.line_num}: {error}; check the delimiter") from None
