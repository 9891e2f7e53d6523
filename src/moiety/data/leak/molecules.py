"""Are two molecules one? By superposition (the same geometry), or by who is bonded to whom (the same substance)."""
# Shapes: N nodes.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDetermineBonds
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from moiety.data.leak.fingerprint import in_blocks
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import ELEMENTS

EXACT = 2e-3  # Å: what printing coordinates with three digits may change
LOOSE = 8.0  # times the tolerance: by how much what a node sees may differ between partners
MAX_FRAMES = 5_000  # rotations tried for one pair; a symmetric molecule of N atoms needs a few N
NUM_SEEN = 64  # distances, averaged in runs, by which partners are recognised
MAX_ATOMS = 200  # of a molecule whose bonds are looked for
STRETCHED = 1.15  # sums of covalent radii; carboranes reach 1.12, what is across a ring of QM9 begins at 1.17
MAX_ITERATIONS = 2_000  # of the search for bond orders


@dataclass(frozen=True)
class Superposition:
    """How well one structure falls on another."""

    rmsd: float  # Å, over all nodes
    mirrored: bool  # only the mirror image does


def superpose(first: Structure, second: Structure, tolerance: float) -> Superposition | None:
    """A superposition of two open structures of one composition, in whatever order their nodes are.

    The rotations tried lay two far nodes of `first`, and the centroid, on every compatible pair of nodes of `second`;
    nodes are then assigned within their type, so symmetric molecules are no trap. Rotations come before reflections.

    Args:
        first: the one.
        second: the other.
        tolerance: Å, of the root mean square deviation.

    Returns:
        The best one found, or None where none is within the tolerance.
    """
    a_N3, type_N = _centred(first)
    b_N3, _ = _centred(second)
    for mirrored in (False, True):
        image_N3 = b_N3 * (-1, 1, 1) if mirrored else b_N3
        best = np.inf
        for rotated_N3 in _rotations(a_N3, image_N3, type_N, LOOSE * tolerance):
            best = min(best, _rmsd(a_N3, rotated_N3, type_N))
            if best <= EXACT:
                break
        if best <= tolerance:
            return Superposition(float(best), mirrored)
    return None


def _centred(structure: Structure) -> tuple[Array, Array]:
    """Positions about the centroid, and types, in the order of the types."""
    order = np.argsort(structure.node_type, kind="stable")
    positions = structure.positions[order]
    return positions - positions.mean(axis=0), structure.node_type[order]


def _rotations(a_N3: Array, b_N3: Array, type_N: Array, slack: float) -> Iterator[Array]:
    """b_N3, rotated in each way that may lay it on a_N3; first as if the nodes stood in the same order."""
    yield b_N3 @ _kabsch(a_N3, b_N3)
    partners_NN = _compatible(a_N3, b_N3, type_N, slack)
    num_partners = partners_NN.sum(axis=1)
    if not num_partners.all():
        return
    pivot = _choose(np.linalg.norm(a_N3, axis=1), num_partners)
    axis = a_N3[pivot] / max(float(np.linalg.norm(a_N3[pivot])), 1e-9)
    second = _choose(np.linalg.norm(a_N3 - np.outer(a_N3 @ axis, axis), axis=1), num_partners)
    reach = np.linalg.norm(a_N3[pivot] - a_N3[second])
    num_tried = 0
    for i in np.flatnonzero(partners_NN[pivot]):
        gap = np.abs(np.linalg.norm(b_N3 - b_N3[i], axis=1) - reach)
        candidates = np.flatnonzero(partners_NN[second] & (gap <= slack))
        for j in candidates[np.argsort(gap[candidates], kind="stable")]:
            yield b_N3 @ _kabsch(a_N3[[pivot, second]], b_N3[[i, j]])
            num_tried += 1
            if num_tried == MAX_FRAMES:
                return


def _choose(lever_N: Array, num_partners: Array) -> int:
    """Of the nodes with a long lever, one that has few partners."""
    far = lever_N >= 0.6 * lever_N.max()
    return int(np.lexsort((-lever_N, np.where(far, num_partners, len(lever_N) + 1)))[0])


def _compatible(a_N3: Array, b_N3: Array, type_N: Array, slack: float) -> Array:
    """[N, N] bool: nodes of one type that see the same distances, to the centroid and to all others."""
    seen_a, seen_b = _seen(a_N3, type_N), _seen(b_N3, type_N)
    radius = np.abs(np.linalg.norm(a_N3, axis=1)[:, None] - np.linalg.norm(b_N3, axis=1))
    return (type_N[:, None] == type_N) & (cdist(seen_a, seen_b) <= slack) & (radius <= slack)


def _seen(positions: Array, type_N: Array) -> Array:
    """[N, at most NUM_SEEN]: distances from each node, sorted within types; Euclidean distance is an RMS in Å."""
    distance = cdist(positions, positions)
    for kind in np.unique(type_N):
        columns = type_N == kind
        distance[:, columns] = np.sort(distance[:, columns], axis=1)
    return in_blocks(distance / np.sqrt(len(type_N)), NUM_SEEN)


def _rmsd(a_N3: Array, b_N3: Array, type_N: Array) -> float:
    """Å, after two rounds of assigning nodes within their type and rotating b on a."""
    for _ in range(2):
        order = np.arange(len(type_N))
        for kind in np.unique(type_N):
            places = np.flatnonzero(type_N == kind)
            if len(places) > 1:
                cost = cdist(a_N3[places], b_N3[places], "sqeuclidean")
                order[places] = places[linear_sum_assignment(cost)[1]]
        b_N3 = b_N3[order]
        b_N3 = b_N3 @ _kabsch(a_N3, b_N3)
    return float(np.sqrt(((a_N3 - b_N3) ** 2).sum(axis=1).mean()))


def _kabsch(a_N3: Array, b_N3: Array) -> Array:
    """[3, 3] proper rotation R that brings b @ R closest to a (Kabsch, Acta Cryst. A 32, 922 (1976))."""
    u, _, vt = np.linalg.svd(b_N3.T @ a_N3)
    u[:, -1] *= np.sign(np.linalg.det(u @ vt))
    return u @ vt


def bonded(structure: Structure) -> Chem.Mol | None:
    """The atoms, every hydrogen among them, and their bonds by distance, all drawn single; None without atoms alone.

    Who is bonded to whom, with all hydrogens, is what two programs agree on; bond orders and charges are not.
    """
    if structure.periodic or structure.num_nodes > MAX_ATOMS or (structure.node_type > len(ELEMENTS)).any():
        return None
    molecule = Chem.RWMol()
    for number in structure.node_type.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
    conformer = Chem.Conformer(structure.num_nodes)
    conformer.SetPositions(np.ascontiguousarray(structure.positions))
    molecule.AddConformer(conformer)
    rdDetermineBonds.DetermineConnectivity(molecule, useVdw=True)
    _drop_bonds_across_rings(molecule)
    molecule.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(molecule)
    return molecule


def _drop_bonds_across_rings(molecule: Chem.RWMol) -> None:
    """Atoms across a small ring are near enough for a bond: of a carbon with more than four, stretched ones are none.

    The most stretched go first, so the order of the atoms does not matter. Those of carboranes, whose carbons have six,
    are not stretched.
    """
    table = Chem.GetPeriodicTable()
    positions = molecule.GetConformer().GetPositions()
    stretch: dict[tuple[int, int], float] = {}
    for bond in (bond for atom in molecule.GetAtoms() if _is_crowded(atom) for bond in atom.GetBonds()):
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        radii = sum(table.GetRcovalent(atom.GetAtomicNum()) for atom in (bond.GetBeginAtom(), bond.GetEndAtom()))
        stretch[ends] = float(np.linalg.norm(positions[ends[0]] - positions[ends[1]])) / radii
    for ends in sorted(stretch, key=stretch.__getitem__, reverse=True):
        if stretch[ends] > STRETCHED and any(_is_crowded(molecule.GetAtomWithIdx(end)) for end in ends):
            molecule.RemoveBond(*ends)


def _is_crowded(atom: Chem.Atom) -> bool:
    return atom.GetAtomicNum() == 6 and atom.GetDegree() > 4


def constitution(molecule: Chem.Mol) -> str:
    """Canonical SMILES of the bonded atoms, without stereo: the same for all conformers and stereoisomers."""
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def scaffold(molecule: Chem.Mol) -> str:
    """Bemis-Murcko scaffold (rings and what links them), bond orders ignored; "" for a molecule without rings."""
    neighbours = {atom.GetIdx(): {other.GetIdx() for other in atom.GetNeighbors()} for atom in molecule.GetAtoms()}
    ends = [atom for atom, others in neighbours.items() if len(others) < 2]
    while ends:  # side chains are eaten from their ends
        end = ends.pop()
        for other in neighbours.pop(end, ()):
            neighbours[other].discard(end)
            if len(neighbours[other]) < 2:
                ends.append(other)
    if not neighbours:
        return ""
    return Chem.MolFragmentToSmiles(molecule, list(neighbours), isomericSmiles=False)


@dataclass(frozen=True)
class Stereo:
    """A molecule with the stereo of its pose, in two canonical notations: in strained cages either one may depend on
    the order of the atoms.
    """

    smiles: str  # without bond orders, hydrogens explicit, where no bond orders fit the charge
    inchi_key: str  # "" where no bond orders fit the charge

    def agrees(self, other: Stereo) -> bool:
        """The same stereo in one of the notations."""
        return self.smiles == other.smiles or (self.inchi_key != "" and self.inchi_key == other.inchi_key)


def stereo(molecule: Chem.Mol, charge: int) -> Stereo:
    """The stereo of a pose: tetrahedral centres, and E/Z where bond orders are found.

    Args:
        molecule: from `bonded`.
        charge: of the whole molecule, e.
    """
    ordered = Chem.RWMol(molecule)
    with rdBase.BlockLogs():
        try:
            rdDetermineBonds.DetermineBondOrders(ordered, charge=charge, embedChiral=True, maxIterations=MAX_ITERATIONS)
        except (ValueError, RuntimeError):  # RDKit's ways of saying that it found none
            skeleton = Chem.Mol(molecule)
            Chem.AssignStereochemistryFrom3D(skeleton)
            return Stereo(Chem.MolToSmiles(skeleton), "")
        return Stereo(Chem.MolToSmiles(Chem.RemoveHs(ordered, sanitize=False)), Chem.MolToInchiKey(ordered))
