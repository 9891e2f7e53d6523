"""FASTA through biotite: `header` and `sequence`; the key is the first word of the header."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from moiety.data.validate import Rejected
from moiety.errors import InputError


def records(stream: IO[bytes], _: object) -> Iterator[tuple[str, dict[str, str] | Rejected]]:
    """Streams the entries."""
    import biotite
    from biotite.sequence.io.fasta import FastaFile

    number = 0
    try:
        for header, sequence in FastaFile.read_iter(io.TextIOWrapper(stream, encoding="utf-8")):
            key = header.split(maxsplit=1)[0] if header.strip() else str(number)
            letters = sequence.replace("*", "").replace("-", "")
            if not letters.isalpha():
                yield key, Rejected("unreadable", f"the sequence holds other signs than letters: {letters[:40]!r}")
            else:
                yield key, {"header": header, "sequence": sequence}
            number += 1
    except biotite.InvalidFileError as error:
        raise InputError(f"FASTA: {error}; check the file") from None
