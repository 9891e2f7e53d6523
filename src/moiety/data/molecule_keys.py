"""Keys by which a molecule is recognised in another corpus: its constitution as canonical SMILES (RDKit).

Stereo and isotopes are left out, so isomers of one constitution share a key: what is known of one says much of the
other. Charges are kept: an acid and its anion are two keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from moiety.data.structure import Array

ORDERS = {"SING": Chem.BondType.SINGLE, "DOUB": Chem.BondType.DOUBLE, "TRIP": Chem.BondType.TRIPLE}
# Metals in the dictionary have bonds that no valence model allows.
ANY_VALENCE = Chem.SanitizeFlags.SANITIZE_ALL ^ Chem.SanitizeFlags.SANITIZE_PROPERTIES


def constitution(smiles: str) -> str | None:
    """The key of a molecule that is given as SMILES; None where RDKit cannot read it."""
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else _key(molecule)


def _key(molecule: Chem.Mol) -> str:
    """Hydrogens that an atom has anyway are no atoms of their own; H2, protons, hydrides and bridges stay."""
    settings = Chem.RemoveHsParameters()
    settings.removeIsotopes = settings.removeDefiningBondStereo = True
    settings.showWarnings = False
    return Chem.MolToSmiles(Chem.RemoveHs(molecule, settings, sanitize=False), isomericSmiles=False)


def scaffold(smiles: str) -> str:
    """The scaffold of a molecule (Bemis and Murcko, J. Med. Chem. 39, 2887, 1996); "" where it has no ring."""
    with rdBase.BlockLogs():
        molecule = MurckoScaffold.GetScaffoldForMol(Chem.MolFromSmiles(smiles))
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def component_constitutions(block: Any, names: set[str]) -> Iterator[tuple[str, str]]:
    """(id, key) of components of the Chemical Component Dictionary, from their tables of atoms and bonds.

    Args:
        block: the dictionary as biotite reads it (a BinaryCIFBlock).
        names: ids of the wanted components; all atoms of theirs are elements.
    """
    atoms, bonds = block["chem_comp_atom"], block["chem_comp_bond"]
    atom_columns = [atoms[name].as_array(str).tolist() for name in ("atom_id", "type_symbol")]
    charges = atoms["charge"].as_array(int, masked_value=0).tolist()
    bond_columns = [bonds[name].as_array(str).tolist() for name in ("atom_id_1", "atom_id_2", "value_order")]
    bonds_of = _spans(bonds["comp_id"].as_array(str))
    for name, span in _spans(atoms["comp_id"].as_array(str)).items():
        if name not in names:
            continue
        molecule, place = Chem.RWMol(), {}
        for label, symbol, charge in zip(*(column[span] for column in atom_columns), charges[span], strict=True):
            atom = Chem.Atom("H" if symbol == "D" else symbol.capitalize())
            atom.SetFormalCharge(charge)
            atom.SetNoImplicit(True)  # all hydrogens are in the table
            place[label] = molecule.AddAtom(atom)
        for first, second, order in zip(
            *(column[bonds_of.get(name, slice(0))] for column in bond_columns), strict=True
        ):
            molecule.AddBond(place[first], place[second], ORDERS[order])
        Chem.SanitizeMol(molecule, ANY_VALENCE)
        yield name, _key(molecule)


def _spans(owner: Array) -> dict[str, slice]:
    """Owner -> its rows, in a table where each has one run of rows."""
    bounds = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1], True])
    return {str(owner[start]): slice(start, stop) for start, stop in pairwise(bounds.tolist())}
