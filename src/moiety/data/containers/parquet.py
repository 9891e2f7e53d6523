"""Parquet through pyarrow, in batches. Option: `columns`, those that are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moiety.errors import InputError

BATCH = 256  # rows
MAX_FOOTER = 64 << 20  # bytes of what thrift may allocate for the file's description


def records(path: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the rows; the key is the number of the row, from 0."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, thrift_string_size_limit=MAX_FOOTER) as file:
            known = file.schema_arrow.names
            if missing := [name for name in options["columns"] if name not in known]:
                raise InputError(f"{path}: holds no column {missing[0]!r}; it has {', '.join(known[:12])}")
            for batch in file.iter_batches(BATCH, columns=list(options["columns"])):
                for row in batch.to_pylist():
                    yield str(number), row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); copy the file again") from None
