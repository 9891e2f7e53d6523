"""Three-dimensional structures from SMILES, by RDKit: a guess of a geometry in the gas phase, not a measured one."""

from __future__ import annotations

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem

from moiety.data.leak.molecules import constitution, scaffold
from moiety.data.structure import Structure
from moiety.data.validate import Rejected

SEED = 20261126
MAX_STEPS = 2000  # of the force field's minimiser
TRIES = 4  # conformers of which the lowest is taken, where nothing else is said
ORIGIN = f"conformers by RDKit: ETKDGv3, MMFF94, the lowest of {TRIES}"


def from_smiles(smiles: str, tries: int = TRIES) -> Structure:
    """A molecule with all its hydrogens in the lowest of a few conformers.

    Its groups are `scaffold`, Bemis and Murcko's or, without rings, its constitution, and `smiles`.

    Raises:
        Rejected: no SMILES (`unreadable`), or one for which no geometry is found (`no-conformer`).
    """
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None or not molecule.GetNumAtoms():
            raise Rejected("unreadable", f"{smiles[:80]!r} is no SMILES")
        placed = lowest_conformer(molecule, tries)
    if placed is None:
        raise Rejected("no-conformer", f"RDKit finds no geometry for {smiles[:80]!r}")
    return Structure(
        node_type=np.array([atom.GetAtomicNum() for atom in placed.GetAtoms()]),
        positions=placed.GetConformer().GetPositions(),
        id=smiles,
        charge=Chem.GetFormalCharge(placed),
        spin=1 + sum(atom.GetNumRadicalElectrons() for atom in placed.GetAtoms()),
        groups={"scaffold": scaffold(molecule) or constitution(molecule), "smiles": smiles},
    )


def lowest_conformer(molecule: Chem.Mol, tries: int) -> Chem.Mol | None:
    """The molecule with its hydrogens in the lowest of some minima of MMFF94 (Halgren 1996, doi:10.1002/jcc.540170502).

    ETKDGv3 places the atoms (Wang et al. 2020, doi:10.1021/acs.jcim.0c00025). Where MMFF94 has no parameters, the first
    geometry stays as placed; None where none is found. Deterministic.
    """
    full = Chem.AddHs(molecule)
    settings = AllChem.ETKDGv3()  # pyright: ignore[reportAttributeAccessIssue]
    settings.randomSeed = SEED
    AllChem.EmbedMultipleConfs(full, tries, settings)  # pyright: ignore[reportAttributeAccessIssue]
    if not full.GetNumConformers():
        settings.useRandomCoords = True
        AllChem.EmbedMultipleConfs(full, 1, settings)  # pyright: ignore[reportAttributeAccessIssue]
    numbers = [conformer.GetId() for conformer in full.GetConformers()]
    if not numbers:
        return None
    if not AllChem.MMFFHasAllMoleculeParams(full):  # pyright: ignore[reportAttributeAccessIssue]
        return Chem.Mol(full, confId=numbers[0])
    relaxed = AllChem.MMFFOptimizeMoleculeConfs(full, maxIters=MAX_STEPS)  # pyright: ignore[reportAttributeAccessIssue]
    energies = [energy for _, energy in relaxed]
    return Chem.Mol(full, confId=numbers[energies.index(min(energies))])
