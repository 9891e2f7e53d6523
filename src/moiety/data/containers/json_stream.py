"""JSON of any length, an item at a time, through ijson.

Options: `prefix`, where the items stand in ijson's notation ("entries.item", "data.item"); without it the top is a
mapping or a list of them. `levels: 2` for a mapping of mappings (MPtrj: material -> frame -> record).

Brackets are counted before they are parsed: a file of a million "[" would otherwise fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from moiety.errors import InputError

MAX_DEPTH = 64
MAX_STRING = 4 << 20  # bytes
BLOCK = 1 << 18
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
STEPS = np.zeros(256, dtype=np.int64)
STEPS[list(b"[{")] = 1
STEPS[list(b"]}")] = -1


def records(stream: IO[bytes], options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Streams the items of a JSON document."""
    import ijson

    try:
        for key, value in _items(Shallow(stream), options):
            if options.get("levels", 1) == 2 and isinstance(value, dict):
                yield from ((f"{key}/{inner}", record) for inner, record in value.items())
            else:
                yield key, value
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(f"not JSON, or cut short ({error}); copy the file again") from None


def _items(stream: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import ijson

    prefix = options.get("prefix", "")
    if prefix == "item" or prefix.endswith(".item"):
        for number, value in enumerate(ijson.items(stream, prefix, use_float=True)):
            yield str(number), value
    else:
        yield from ijson.kvitems(stream, prefix, use_float=True)


class Shallow:
    """A stream of JSON that stops where it nests too deeply, or where a string does not end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.depth, self.rest = stream, 0, b""

    def read(self, size: int = BLOCK) -> bytes:
        if size == 0:
            return b""  # ijson asks what kind of stream this is
        block = self.stream.read(BLOCK if size < 0 else min(size, BLOCK))
        text = STRING.sub(b"", self.rest + block)
        quote = text.find(b'"')  # of a string that goes on in the next block
        text, self.rest = (text, b"") if quote < 0 else (text[:quote], text[quote:])
        if len(self.rest) > MAX_STRING:
            raise InputError(f"a string of more than {MAX_STRING:,} bytes in JSON: not read")
        levels = self.depth + np.cumsum(STEPS[np.frombuffer(text, dtype=np.uint8)])
        if len(levels):
            if levels.max() > MAX_DEPTH:
                raise InputError(f"JSON nested deeper than {MAX_DEPTH} levels: not read")
            self.depth = int(levels[-1])
        return block
