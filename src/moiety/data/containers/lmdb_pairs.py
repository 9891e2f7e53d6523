"""Keys and values of an LMDB file; run in a process of its own (moiety.data.guarded): LMDB believes what it maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import lmdb

from moiety.errors import InputError

with suppress(lmdb.Error):  # recent versions import a module of theirs at the first open: later, nothing is imported
    lmdb.open(os.path.join(os.devnull, "none"), readonly=True, lock=False, create=False)


def pairs(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Streams the pairs in the order of their keys.

    Raises:
        InputError: no LMDB, cut short, or damaged where LMDB or the order of the keys tells.
    """
    folder = os.path.isdir(path)
    try:
        environment = lmdb.open(path, subdir=folder, readonly=True, lock=False, create=False, max_dbs=0)
    except lmdb.Error as error:
        raise InputError(f"{path}: no LMDB ({error}); copy the file again") from None
    with environment:
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = os.path.getsize(os.path.join(path, "data.mdb") if folder else path)
        if size < needed:
            raise InputError(f"{path}: cut short, {size:,} of {needed:,} bytes; copy the file again")
        last = b""
        try:
            with environment.begin() as transaction:
                for key, value in transaction.cursor():
                    if key <= last:  # pages that point back would be read for ever
                        raise InputError(f"{path}: a damaged LMDB (keys out of order); copy the file again")
                    last = key
                    yield key, value
        except lmdb.Error as error:
            raise InputError(f"{path}: a damaged LMDB ({error}); copy the file again") from error
