"""xyz and extended xyz, frame by frame through ASE, so that one bad frame does not hide the others."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from moiety.data.convert import from_object
from moiety.data.readers.text import quietly
from moiety.data.structure import Structure
from moiety.data.validate import Rejected
from moiety.models.conversion_moiety import element_numbers

COLUMNS = re.compile(r'Properties="?([^\s"]+)', re.IGNORECASE)


def read(text: str) -> Iterator[Structure | Rejected]:
    """Every frame of an xyz or extxyz file. Labels of ASE (energy, forces, stress, dipole) and numbers are kept."""
    lines = text.rstrip().split("\n")
    start = 0
    while start < len(lines):
        count = lines[start].strip()
        if not count and start:
            start += 1  # an empty line between frames
            continue
        if not count.isdigit():
            yield Rejected("unreadable", f"line {start + 1} should be a number of atoms, it is {count[:40]!r}")
            return  # no telling where the next frame starts
        stop = start + 2 + int(count)
        frame = lines[start:stop]
        missing, start = stop - len(lines), stop
        following = lines[stop].strip() if stop < len(lines) else ""
        try:
            if int(count) == 0:
                raise Rejected("no-atoms", "the frame declares 0 atoms")
            if missing > 0:
                raise Rejected("truncated", f"the frame declares {count} atoms, the file ends after {len(frame) - 2}")
            if following and not following.isdigit():
                raise Rejected("wrong-counts", f"{count} atoms are declared, then comes {following[:40]!r}")
            yield _frame(frame)
        except Rejected as rejected:
            yield rejected
            if rejected.code == "wrong-counts":
                return  # no telling where the next frame starts


def _frame(lines: list[str]) -> Structure:
    from ase.io.extxyz import read_xyz

    columns = COLUMNS.search(lines[1])
    if columns is None or columns.group(1).lower().startswith("species:"):
        _refuse_unknown_symbols(lines[2:])
    only: Any = slice(0, 1)  # ASE's own annotation says int
    atoms = quietly(lambda: next(iter(read_xyz(io.StringIO("\n".join(lines) + "\n"), only))))
    return quietly(lambda: from_object(atoms))


def _refuse_unknown_symbols(rows: list[str]) -> None:
    """Names the symbol that is no element; ASE would stop with a KeyError."""
    for number, row in enumerate(rows):
        symbol = row.split(maxsplit=1)[0] if row.strip() else ""
        if not symbol:
            raise Rejected("wrong-counts", f"atom {number} is an empty line")
        if not symbol.isdigit() and element_numbers([symbol])[0] == 0:
            raise Rejected("unknown-element", f"atom {number} is {symbol!r}")
