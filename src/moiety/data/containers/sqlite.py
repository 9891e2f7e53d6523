"""A table of an SQLite file, read only: no views, triggers, extensions or functions of the file are ever run.

Options: `table`; `key`, the column that names a row; `columns`, those that are read; `blobs`, column -> dtype of the
array that its bytes are.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from moiety.data import guarded
from moiety.data.validate import Rejected
from moiety.errors import InputError

ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
MAX_VALUE = 256 << 20  # bytes of one cell


def records(path: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Streams the rows of a table."""
    blobs = {name: np.dtype(kind) for name, kind in options.get("blobs", {}).items()}
    for key, row in guarded.stream("sqlite", str(path), options["table"], options["key"], options["columns"]):
        try:
            for name, dtype in blobs.items():
                row[name] = np.frombuffer(row[name], dtype=dtype)
        except (TypeError, ValueError) as error:
            yield key, Rejected("unreadable", f"{name} is no array of {dtype} ({error})")
        else:
            yield key, row


def rows(path: str, table: str, key: str, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and cells of every row, in the order of the file; run in a process of its own.

    Raises:
        InputError: no SQLite file, no such table or column, or a view or virtual table in its place.
    """
    uri = f"file:{quote(os.path.realpath(path))}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        try:
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA cell_size_check = ON")
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
            _refuse_views(path, database, table)
            known = [row[1] for row in database.execute(f"PRAGMA table_info({_quoted(table)})")]
            wanted = [key, *columns]
            if missing := [name for name in wanted if name not in known]:
                raise InputError(f"{path}: {table} has no column {missing[0]!r}; it has {', '.join(known)}")
            database.set_authorizer(_only_read)
            cursor = database.execute(f"SELECT {', '.join(map(_quoted, wanted))} FROM {_quoted(table)}")
            for number, row in enumerate(cursor):
                name = row[0] if row[0] is not None else number
                yield str(name), dict(zip(wanted[1:], row[1:], strict=True))
        except (sqlite3.Error, UnicodeDecodeError) as error:  # messages quote the file, whose text may be none
            raise InputError(f"{path}: cannot be read as SQLite ({error}); copy the file again") from None


def _refuse_views(path: str, database: sqlite3.Connection, table: str) -> None:
    kind = "coalesce(type, '') || ' ' || coalesce(sql, '')"
    kinds = dict(database.execute(f"SELECT CAST(coalesce(name, '') AS TEXT), {kind} FROM sqlite_master"))
    if table not in kinds:
        raise InputError(f"{path}: holds no table {table!r}; it has {', '.join(sorted(kinds))}")
    if not kinds[table].upper().startswith("TABLE CREATE TABLE"):
        raise InputError(f"{path}: {table} is a view or a virtual table, which runs what the file says: not read")
    if "GENERATED" in kinds[table].upper():
        raise InputError(f"{path}: {table} has computed columns, which run what the file says: not read")


def _only_read(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
