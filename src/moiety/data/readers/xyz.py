"""xyz and extended xyz, frame by frame through ASE, so that one bad frame does not hide the others."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from moiety.data.convert import from_object
from moiety.data.readers.text import count_of, quietly
from moiety.data.structure import Structure
from moiety.data.validate import MAX_NODES, Noted, Rejected
from moiety.models.conversion_moiety import ISOTOPES, element_numbers
from moiety.models.vocabulary_moiety import ELEMENTS

COUNT = re.compile(r"[0-9]{1,12}")  # str.isdigit also takes superscripts, which int does not
PROPERTIES = re.compile(r"""\bProperties\s*=\s*["']?([^\s"']+)""", re.IGNORECASE)
LATTICE = re.compile(r"""\bLattice\s*=\s*(?:"([^"]*)"|'([^']*)'|\{([^}]*)\}|\[([^\]]*)\]|(\S+))""")
PLAIN = "species:S:1:pos:R:3"
MAX_COMMENT = 100_000  # characters; ASE goes through them one by one


def read(text: str) -> Iterator[Noted | Rejected]:
    """Every frame of an xyz or extxyz file. Labels of ASE (energy, forces, stress, dipole) and numbers are kept."""
    lines = text.rstrip().split("\n")
    start = 0
    while start < len(lines):
        count = lines[start].strip()
        if not count and start:
            start += 1  # an empty line between frames
            continue
        if not COUNT.fullmatch(count):
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
                there = max(len(frame) - 2, 0)
                raise Rejected("truncated", f"the frame declares {count} atoms, the file ends after {there}")
            if following and not COUNT.fullmatch(following):
                raise Rejected("wrong-counts", f"{count} atoms are declared, then comes {following[:40]!r}")
            if int(count) > MAX_NODES:
                raise Rejected("too-many-nodes", f"{count} atoms")
            yield _frame(frame)
        except Rejected as rejected:
            yield rejected
            if rejected.code == "wrong-counts" and stop < len(lines) and not COUNT.fullmatch(following):
                return  # no telling where the next frame starts


def _frame(lines: list[str]) -> Noted:
    from ase.io.extxyz import read_xyz

    if len(lines[1]) > MAX_COMMENT:
        raise Rejected("unreadable", f"the comment line has {len(lines[1])} characters")
    lines, notes = _checked_rows(lines)
    lattice = LATTICE.search(lines[1])
    if lattice is not None:
        numbers = next(group for group in lattice.groups() if group is not None).replace(",", " ").split()
        if len(numbers) != 9:
            raise Rejected("wrong-shape", f"Lattice has {len(numbers)} numbers instead of 9")
    only: Any = slice(0, 1)  # ASE's own annotation says int
    atoms = quietly(lambda: next(iter(read_xyz(io.StringIO("\n".join(lines) + "\n"), only))))
    beyond = atoms.numbers[(atoms.numbers < 0) | (atoms.numbers > len(ELEMENTS))]
    if len(beyond):  # 119 and more are residues in the vocabulary
        raise Rejected("unknown-element", f"atomic number {beyond[0]}")
    structure: Structure = quietly(lambda: from_object(atoms))
    if lattice is not None and not np.any(atoms.pbc):
        notes = (*notes, "pbc is off in every direction: the cell is left out")
    return Noted(structure, notes)


def _checked_rows(lines: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The frame with plain symbols, and notes. Compares its rows with its columns: ASE only says that it failed.

    Columns that a row does not have are refused before ASE makes room for them.
    """
    found = PROPERTIES.search(lines[1])
    declared = found.group(1) if found else PLAIN
    parts = declared.split(":")
    if len(parts) % 3 or not all(COUNT.fullmatch(width) for width in parts[2::3]):
        raise Rejected("unreadable", f"Properties should be name:type:columns:..., it is {declared[:60]!r}")
    widths = [int(width) for width in parts[2::3]]
    named_first = parts[0].lower() == "species"
    longer = isotopes = 0
    rows = []
    for number, row in enumerate(lines[2:]):
        values = row.split()
        if not values:
            raise Rejected("wrong-counts", f"atom {number} is an empty line")
        if len(values) < sum(widths):
            raise Rejected("wrong-counts", f"atom {number} has {len(values)} columns instead of {sum(widths)}")
        longer += len(values) > sum(widths)
        if named_first:
            symbol = values[0].capitalize()
            atomic_number = int(symbol) if COUNT.fullmatch(symbol) else int(element_numbers([symbol])[0])
            if not 1 <= atomic_number <= len(ELEMENTS):
                raise Rejected("unknown-element", f"atom {number} is {values[0][:20]!r}")
            isotopes += symbol in ISOTOPES
            row = " ".join([ELEMENTS[atomic_number - 1], *values[1:]])  # ASE knows neither D nor numbers
        rows.append(row)
    notes = [f"{count_of(isotopes, 'atom')} of D or T read as H"] if isotopes else []
    if longer:
        notes.append(f"{count_of(longer, 'row')} with more columns than declared: the rest left out")
    return [*lines[:2], *rows], tuple(notes)
