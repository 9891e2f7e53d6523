"""QM9 from the CSV tables of the qm9pack wheel (read as data; the package itself is never imported)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

import numpy as np

from moiety.data.download import Archive
from moiety.data.splits import select, shuffled
from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import ELEMENT_ID

HARTREE = 27.211386245988  # eV, CODATA 2018
NUM_TRAIN, NUM_VAL = 110_000, 10_000
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


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields molecules in the order of the fixed permutation: train, then val, then test."""
    rows = list(_rows(archives["qm9pack"]))
    order = shuffled((row["XYZ_file"] for row in rows), salt="qm9")
    splits = ["train" if i < NUM_TRAIN else "val" if i < NUM_TRAIN + NUM_VAL else "test" for i in range(len(order))]
    for index in select(splits, options):
        yield _structure(rows[order[index]], splits[index])


def _rows(archive: Archive) -> Iterator[Row]:
    for _, stream in archive.members():
        yield from csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))


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
