"""QM9 from the CSV tables of the qm9pack wheel (read as data; the package itself is never imported)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np

from moiety.data.download import Archive
from moiety.data.splits import select, shuffled
from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import ELEMENT_ID

HARTREE = 27.211386245988  # eV, CODATA 2018
NUM_TRAIN, NUM_VAL = 110_000, 10_000
PART = 22_000  # molecules: six parts, for two or three workers alike
THEORY = "B3LYP/6-31G(2df,p)"

COLUMNS = {  # our name -> column of the table, factor to our unit
    "dipole": ("Dipole_debye", 1.0),
    "alpha": ("Polarizability_bohr3", 1.0),
    "homo": ("HOMO_au", HARTREE),
    "lumo": ("LUMO_au", HARTREE),
    "gap": ("HOMO_LUMO_gap_au", HARTREE),
    "r2": ("R2_bohr2", 1.0),
    "zpve": ("ZPVE_au", HARTREE),
    "u0": ("InternalEnergy_0K_au", HARTREE),
    "u298": ("InternalEnergy_298K_au", HARTREE),
    "h298": ("Enthalphy_298K_au", HARTREE),
    "g298": ("GibbsFreeEnergy_298K_au", HARTREE),
    "cv": ("Heatcapacity_Cv_cal_mol_K", 1.0),
}

Row = dict[str, str]
BRACKETS = str.maketrans("", "", "[]")


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[list[int]]:
    """Ranges of the selected molecules, in the order of the fixed permutation: train, then val, then test."""
    num_selected = len(_selected(archives["qm9pack"], options))
    return [[start, min(start + PART, num_selected)] for start in range(0, num_selected, PART)]


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: list[int]) -> Iterator[Structure]:
    """Yields the molecules of a part. The tables are searched for their rows; only these are parsed."""
    wanted = _selected(archives["qm9pack"], options)[slice(*part)]
    place = {index: order for order, (index, _) in enumerate(wanted)}
    lines = [b""] * len(wanted)
    header = b""
    for index, line in _lines(archives["qm9pack"]):
        if index < 0:
            header = line
        elif index in place:
            lines[place[index]] = line
    table = csv.DictReader(line.decode() for line in (header, *lines))
    for row, (_, split) in zip(table, wanted, strict=True):
        yield _structure(row, split)


def _selected(archive: Archive, options: Mapping[str, int]) -> list[tuple[int, str]]:
    """(row of the tables, split) of the molecules to take, in the order of the permutation."""
    order = _order(archive)
    splits = ["train" if i < NUM_TRAIN else "val" if i < NUM_TRAIN + NUM_VAL else "test" for i in range(len(order))]
    return [(order[index], splits[index]) for index in select(splits, options)]


@cache  # of a process, for all its parts: it takes a pass over the tables
def _order(archive: Archive) -> list[int]:
    """Rows of the tables in the order of the fixed permutation."""
    names = (line.split(b",", 1)[0].strip(b'"').decode() for index, line in _lines(archive) if index >= 0)
    return shuffled(names, salt="qm9")


def _lines(archive: Archive) -> Iterator[tuple[int, bytes]]:
    """Rows of all tables, counted through, a line each; a table's header has the number -1."""
    index = 0
    for _, stream in archive.members():
        for number, line in enumerate(stream):
            yield (-1 if number == 0 else index), line
            index += number > 0


def _structure(row: Row, split: str) -> Structure:
    elements = row["Elements"].strip("[]").replace("'", "").split(",")
    scalars = {name: float(row[column]) * factor for name, (column, factor) in COLUMNS.items()}
    return Structure(
        node_type=np.array([ELEMENT_ID[symbol] for symbol in elements]),
        positions=_numbers(row["XYZ_Ang"]),
        domain="molecule",
        id=row["XYZ_file"].removesuffix(".xyz"),
        source="qm9",
        energy=scalars["u0"] - scalars["zpve"],  # U(0 K) is the electronic energy plus the zero-point energy
        scalars=scalars,
        node_scalars={"mulliken": _numbers(row["Mulliken_pop"])},
        text=[row["SMILES"]],
        theory=THEORY,
        groups={"split": split},
    )


def _numbers(cell: str) -> np.ndarray:
    """A printed (nested) list, flat. Mathematica wrote it: "0." is no JSON."""
    return np.fromstring(cell.translate(BRACKETS), sep=",")
