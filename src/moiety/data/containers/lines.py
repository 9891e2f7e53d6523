"""Text without a header, one record a line: index files, lists of names. Cells are parted by blanks or `delimiter`.

Options: `columns`, the names of the first cells (the rest of a line is left out); `delimiter`; `comment`, what a line
that is no record begins with ("#").
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import IO, Any

from moiety.data.validate import Rejected
from moiety.errors import InputError

MAX_LINE = 1 << 20  # characters


def records(stream: IO[bytes], options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str] | Rejected]]:
    """Streams the lines; the key is the number of the record, from 0: empty lines and comments do not count."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    columns, comment = options["columns"], options.get("comment")
    number = 0
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise InputError(f"line {number + 1} has more than {MAX_LINE:,} characters: no table")
        if not line.strip() or (comment and line.startswith(comment)):
            continue
        cells = [cell.strip() for cell in line.strip().split(options.get("delimiter"))]
        if len(cells) < len(columns):
            yield str(number), Rejected("wrong-counts", f"{len(cells)} cells, and {len(columns)} columns are named")
        else:
            yield str(number), dict(zip(columns, cells, strict=False))
        number += 1
