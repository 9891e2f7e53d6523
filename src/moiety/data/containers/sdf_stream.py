"""An SDF of any length, a molecule at a time (PCQM4Mv2 has 3.4 million in one file)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from moiety.data.readers import sdf
from moiety.data.structure import Structure
from moiety.data.validate import Rejected
from moiety.errors import InputError

MAX_RECORD = 16 << 20  # bytes
END = b"$$$$"


def records(stream: IO[bytes], _: object) -> Iterator[tuple[str, Structure | Rejected]]:
    """Streams the molecules; the key is the number of the record, from 0."""
    for number, record in enumerate(_split(stream)):
        text = record.decode("utf-8", "replace").replace("\r\n", "\n")
        for item in sdf.read(text):
            yield str(number), item if isinstance(item, Rejected) else item.structure


def _split(stream: IO[bytes]) -> Iterator[bytes]:
    lines: list[bytes] = []
    size = 0
    while line := stream.readline(MAX_RECORD):
        size += len(line)
        if size > MAX_RECORD:
            raise InputError(f"SDF: a record of more than {MAX_RECORD:,} bytes; check what the file is")
        lines.append(line)
        if line.startswith(END):
            yield b"".join(lines)
            lines, size = [], 0
    if b"".join(lines).strip():
        yield b"".join(lines)
