"""Copies in disguise, to try the guard on: what a careless split does to a structure, one function a disguise."""
# Shapes: N nodes.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDetermineBonds, rdDistGeom, rdForceFieldHelpers
from scipy.spatial.transform import Rotation

from moiety.data.leak.molecules import bonded
from moiety.data.structure import Array, Structure

RATTLE = 0.01  # Å, standard deviation of every coordinate
Disguise = Callable[[Structure, np.random.Generator], Structure | None]


def moved(structure: Structure, rng: np.random.Generator) -> Structure:
    """Rotated, translated, the nodes in another order."""
    rotation = Rotation.random(rng=rng).as_matrix()
    order = rng.permutation(structure.num_nodes)
    cell = structure.cell @ rotation if structure.cell is not None else None
    positions = structure.positions[order] @ rotation + rng.uniform(-5, 5, 3)
    return _copy(structure, structure.node_type[order], positions, cell)


def rattled(structure: Structure, rng: np.random.Generator) -> Structure:
    """Moved, and every coordinate changed by Gaussian noise."""
    copy = moved(structure, rng)
    copy.positions += rng.normal(scale=RATTLE, size=copy.positions.shape)
    return copy


def mirrored(structure: Structure, rng: np.random.Generator) -> Structure:
    """Moved, and reflected."""
    copy = moved(structure, rng)
    copy.positions *= (-1, 1, 1)
    return copy


def skewed(crystal: Structure, rng: np.random.Generator) -> Structure:
    """Another cell of the same lattice and volume, another origin."""
    assert crystal.cell is not None
    change = np.eye(3, dtype=int)
    for row, other in ((0, 1), (1, 2), (2, 0)):
        change[row] += rng.integers(-1, 2) * change[other]
    cell = change @ crystal.cell
    positions = _wrapped(crystal.positions + rng.uniform(0, 5, 3), cell)
    return moved(_copy(crystal, crystal.node_type, positions, cell), rng)


def repeated(crystal: Structure, rng: np.random.Generator) -> Structure:
    """A supercell of two to four cells, another origin."""
    assert crystal.cell is not None
    repeats = np.array([[2, 1, 1], [1, 1, 2], [1, 3, 1], [2, 2, 1]])[rng.integers(4)]
    shifts = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), axis=-1).reshape(-1, 3)
    positions = (crystal.positions + (shifts @ crystal.cell)[:, None]).reshape(-1, 3)
    cell = repeats[:, None] * crystal.cell
    return skewed(_copy(crystal, np.tile(crystal.node_type, len(shifts)), positions, cell), rng)


def repeated_and_rattled(crystal: Structure, rng: np.random.Generator) -> Structure:
    """A supercell whose every atom is rattled for itself."""
    return rattled(repeated(crystal, rng), rng)


def another_conformer(molecule: Structure, rng: np.random.Generator) -> Structure | None:
    """The same SMILES, stereo included, embedded anew by RDKit; None where RDKit finds no bond orders or no pose."""
    skeleton = bonded(molecule)
    assert skeleton is not None, "a molecule is needed"
    mol = Chem.RWMol(skeleton)
    with rdBase.BlockLogs():
        try:
            rdDetermineBonds.DetermineBondOrders(mol, charge=molecule.charge, embedChiral=True)
        except ValueError:
            return None
        wanted = _names_of_pose(mol)
        if rdDistGeom.EmbedMolecule(mol, randomSeed=int(rng.integers(2**31))) != 0:
            return None
        if rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=500) != 0:
            return None
        if _names_of_pose(mol) != wanted:  # RDKit turned a centre of a strained cage
            return None
    return moved(_copy(molecule, molecule.node_type, mol.GetConformer().GetPositions(), None), rng)


def _names_of_pose(mol: Chem.Mol) -> tuple[str, str]:
    posed = Chem.Mol(mol)
    Chem.AssignStereochemistryFrom3D(posed)
    return Chem.MolToSmiles(Chem.RemoveHs(posed)), Chem.MolToInchiKey(posed)


def _copy(structure: Structure, node_type: Array, positions: Array, cell: Array | None) -> Structure:
    """The geometry under the same id; labels and groups of the original would belong to another frame or cell."""
    bare = Structure(node_type, positions, structure.domain, structure.id, cell=cell, pbc=structure.pbc)
    return replace(bare, charge=structure.charge, spin=structure.spin)


def _wrapped(positions: Array, cell: Array) -> Array:
    return (positions @ np.linalg.inv(cell) % 1.0) @ cell
