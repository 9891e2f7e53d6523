"""Is this a structure? Reason codes with their remedies in one table, and the checks that give them.

`check` judges a structure that was read; `verdicts` judges a file, one verdict a structure, and never raises for
what a file holds.
"""
# Shapes: N nodes.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import DOMAIN_ID, FIRST_RESIDUE, MASK, VOCAB_SIZE

MIN_DISTANCE = 0.3  # Å, between two nodes one of which is an atom
MIN_RESIDUE_DISTANCE = 1.0  # Å, between two residues (CA to CA)
MIN_HEIGHT = 0.5  # Å, between two faces of a cell: below, every atom has thousands of neighbours
MAX_LENGTH = 1_000.0  # Å, of a lattice vector or an open structure: flat ones beyond 1,600 Å crash vesin 0.6 (SIGFPE)
SEARCH = 3.2  # Å, cutoff of the cell list for overlaps: with a smaller one vesin crashes below MAX_LENGTH already
MIN_SPREAD = 1e-3  # |det cell| / (a b c): below, the vectors lie in one plane
MAX_COORDINATE = 1e6  # Å, from the origin or within a cell: beyond, distances lose their digits
MAX_NODES = 100_000
MAX_CHARGE = 100_000  # of charge (e) and multiplicity: more is no number of electrons
UNIT_SYMPTOMS = ("overlap", "too-spread-out")  # what a wrong unit of length looks like
UNITS = (("nm", 0.05, 0.25), ("bohr", 1.7, 2.1), ("pm", 50.0, 200.0))  # typical distances over covalent ones
MAX_DENSE = 64  # nodes for which all pairs are cheaper than a tree
MAX_CROWD = 32  # nodes in a cube of SEARCH: diamond has 6; with many more, pairs would fill the memory
SAMPLE = 1_000  # nodes that tell the unit

REMEDIES = {  # reason code -> what the user can do
    # the file
    "no-file": "check the path",
    "not-a-file": "give a regular file, not a folder, pipe or device",
    "too-large": "unpack it yourself if you trust it, and split it",
    "empty-file": "export it again",
    "unknown-format": "use .xyz .extxyz .cif .mmcif .pdb .ent .sdf or .mol, as it is or as .gz or .xz",
    "binary-garbage": "check that the file is what its name says, and copy it again",
    "unreadable": "export it again with a current program",
    "truncated": "the file ends too early: copy or export it again",
    "wrong-counts": "the counts and the lines disagree: export the structure again",
    "no-atoms": "check the export, and that the file holds coordinates",
    "no-conformer": "give a structure file with a geometry",
    # the atoms
    "unknown-element": "elements 1 to 118 are known: replace dummy atoms, check the element column",
    "not-finite": "recompute the geometry or remove the structure",
    "overlap": "remove duplicates, alternative locations or repeated images, or check the unit of length",
    "wrong-unit": "positions are read as Å: convert them (1 bohr = 0.529177 Å, 1 nm = 10 Å, 1 pm = 0.01 Å)",
    "partial-occupancy": "order the structure first (pymatgen's OrderDisorderedStructureTransformation)",
    "flat-2d": "it is a drawing: generate 3-D coordinates (rdkit.Chem.AllChem.EmbedMolecule)",
    "no-usable-residues": "use a model with the full backbone, or --all-atom for the atoms there are",
    "too-many-nodes": f"at most {MAX_NODES}: cut the structure, or read residues instead of atoms",
    # the cell
    "pbc-without-cell": "add the cell or turn pbc off",
    "cell-not-finite": "correct the cell",
    "singular-cell": "three lattice vectors that span a volume are needed: correct the cell",
    "wrong-symmetry": "the space group and the listed operations disagree: correct one of them",
    "tiny-cell": f"at least {MIN_HEIGHT} Å: check the unit of length",
    "huge-cell": f"at most {MAX_LENGTH:.0f} Å: check the unit of length",
    "too-spread-out": f"at most {MAX_LENGTH:.0f} Å: check the unit of length, for atoms far away, or wrap them",
    # the record
    "wrong-shape": "one row a node, 3 x 3 for cell and stress: correct it where the record is made",
    "bad-label": "remove the label or the structure",
    "unknown-domain": f"use one of {', '.join(DOMAIN_ID)}",
    "missing-field": "the record lacks what the recipe names: correct the recipe, or mark the field optional",
    "not-in-split": "none: the recipe keeps what its lists of train, val and test name; or split by another rule",
    "duplicate-id": "make ids unique within the source",
}

Problem = tuple[str, str, str]  # code, reason, remedy


@dataclass(frozen=True)
class Verdict:
    """What was found at one place of one file: a structure, or the reason why there is none."""

    file: str
    index: int  # place in the file, from 0
    ok: bool
    code: str = "ok"
    reason: str = ""
    remedy: str = ""
    structure: Structure | None = None
    notes: tuple[str, ...] = ()  # what is odd about a structure that is ok, and what was made of it


@dataclass(frozen=True)
class Noted:
    """What readers yield: a structure as parsed, not yet checked, and what was left out or read as something else."""

    structure: Structure
    notes: tuple[str, ...] = ()


class Rejected(Exception):
    """Raised by readers for content that is no structure; carries a reason code and what was seen."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        assert code in REMEDIES, code
        self.code = code
        self.reason = reason


def verdicts(path: str | Path, all_atom: bool = False) -> Iterator[Verdict]:
    """One verdict a structure of the file, in order. Bad content is a verdict, never an exception.

    Args:
        path: a structure file.
        all_atom: read proteins as atoms instead of residues.
    """
    from moiety.data.readers import items  # the readers raise what this module defines

    for index, item in enumerate(items(Path(path), all_atom)):
        if isinstance(item, Rejected):
            yield Verdict(str(path), index, False, item.code, item.reason, REMEDIES[item.code])
            continue
        problem = check(item.structure)
        if problem is None or problem[0] in UNIT_SYMPTOMS:
            problem = wrong_unit(item.structure) or problem
        if problem is not None:
            yield Verdict(str(path), index, False, *problem)
        else:
            yield Verdict(str(path), index, True, structure=item.structure, notes=item.notes)


def wrong_unit(structure: Structure) -> Problem | None:
    """Positions of a molecule in bohr, nm or pm, seen from bonds; files only, where nothing else tells the unit.

    The median over atoms of the distance to the nearest one, over the sum of the covalent radii (Cordero et al. 2008),
    is 0.9 to 1.1 in Å: 1.9 in bohr, 0.1 in nm, 100 in pm. Bohr is named only where most atoms are H, C, N or O, which
    bond (solid argon has 1.8). Crystals, fewer than 3 atoms, and energies in another unit cannot be told this
    way.
    """
    positions, node_type = structure.positions, structure.node_type
    atoms_only = node_type.min(initial=1) >= 1 and node_type.max(initial=1) < FIRST_RESIDUE
    if structure.periodic or len(positions) < 3 or not atoms_only or not np.isfinite(positions).all():
        return None
    from ase.data import covalent_radii
    from scipy.spatial import KDTree

    sample = slice(None, None, -(-len(positions) // SAMPLE))
    distance, neighbour = map(np.asarray, KDTree(positions).query(positions[sample], k=2))
    if not np.isfinite(distance).all():
        return None  # too far apart for a double
    radius = covalent_radii[node_type]
    ratio = float(np.median(distance[:, 1] / (radius[sample] + radius[neighbour[:, 1]])))
    bonding = np.isin(node_type, (1, 6, 7, 8)).mean() > 0.5
    unit = next((name for name, low, high in UNITS if low < ratio < high), None)
    if unit is None or (unit == "bohr" and not bonding):
        return None
    reason = f"nearest neighbours are {ratio:.3g} bond lengths apart, as if positions were in {unit}"
    return "wrong-unit", reason, REMEDIES["wrong-unit"]


def check(structure: Structure) -> Problem | None:
    """The first thing that is wrong with a structure as (code, reason, remedy), or None. 30 µs for a small molecule."""
    found = _first_problem(structure)
    return None if found is None else (*found, REMEDIES[found[0]])


def _first_problem(structure: Structure) -> tuple[str, str] | None:
    node_type, positions = structure.node_type, structure.positions
    num_nodes = len(node_type)
    if num_nodes == 0:
        return "no-atoms", "the structure has no atoms"
    if num_nodes > MAX_NODES:
        return "too-many-nodes", f"{num_nodes} nodes"
    if structure.domain not in DOMAIN_ID:
        return "unknown-domain", f"domain {structure.domain!r}"
    shape = _wrong_shape(structure)
    if shape is not None:
        return "wrong-shape", shape
    if node_type.min() < 1 or node_type.max() >= VOCAB_SIZE:
        node = int(np.flatnonzero((node_type < 1) | (node_type >= VOCAB_SIZE))[0])
        return "unknown-element", f"node {node} has type {node_type[node]}"
    if not np.isfinite(positions).all():
        node = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        return "not-finite", f"node {node} is at {positions[node].tolist()}"
    if structure.node_vectors is not None and not np.isfinite(structure.node_vectors).all():
        return "not-finite", "a backbone offset is NaN or infinite"
    if structure.pbc is not None and np.any(structure.pbc):
        problem = _cell_problem(structure.cell, np.asarray(structure.pbc, dtype=bool))
        if problem is not None:
            return problem
    farthest = float(np.abs(positions).max())
    if farthest > MAX_COORDINATE:
        return "too-spread-out", f"a coordinate of {farthest:.4g} Å"
    extent = float(np.ptp(positions, axis=0).max())
    if extent > MAX_LENGTH:  # periodic ones too: the neighbour search refuses them
        return "too-spread-out", f"the structure is {extent:.4g} Å long"
    return _crowd(structure) or _overlap(structure) or _bad_label(structure)


def _wrong_shape(structure: Structure) -> str | None:
    num_nodes = len(structure.node_type)
    if len(structure.positions) != num_nodes:
        return f"{num_nodes} node types and {len(structure.positions)} positions"
    per_node = {"role": (), "chain": (), "residue_index": (), "node_vectors": (4, 3), "forces": (3,)}
    for name, shape in per_node.items():
        value = getattr(structure, name)
        if value is not None and np.shape(value) != (num_nodes, *shape):
            return f"{num_nodes} nodes and {name} of the shape {np.shape(value)}"
    for name, values in (structure.node_scalars | structure.node_tensors).items():
        if len(values) != num_nodes:
            return f"{num_nodes} nodes and {len(values)} values of {name}"
    for name, shape in (("cell", (3, 3)), ("stress", (3, 3)), ("pbc", (3,)), ("dipole", (3,))):
        value = getattr(structure, name)
        if value is not None and np.shape(value) != shape:
            return f"{name} has the shape {np.shape(value)}"
    return None


def _cell_problem(cell: Array | None, pbc: Array) -> tuple[str, str] | None:
    """Left-handed cells are fine. Only the vectors of periodic directions must be there."""
    if cell is None or not np.any(np.asarray(cell)[pbc]):
        return "pbc-without-cell", f"pbc is {pbc.tolist()} and there are no lattice vectors"
    vectors = np.asarray(cell, dtype=np.float64)[pbc]
    if not np.isfinite(vectors).all():
        return "cell-not-finite", f"the cell is {vectors.tolist()}"
    lengths = np.hypot.reduce(vectors, axis=1)  # does not square what it is given
    if lengths.max() > MAX_COORDINATE:  # products of such numbers overflow
        return "huge-cell", f"a lattice vector of {lengths.max():.3g} Å"
    # the volume that the periodic vectors span: length, area or |det|
    with np.errstate(divide="ignore"):  # vectors of length 1e-200
        spread = np.sqrt(max(np.linalg.det(vectors @ vectors.T), 0.0))
    if spread <= MIN_SPREAD * lengths.prod():
        return "singular-cell", f"lattice vectors of {np.round(lengths, 3).tolist()} Å span no volume"
    heights = 1.0 / np.linalg.norm(np.linalg.pinv(vectors), axis=0)
    if heights.min() < MIN_HEIGHT:
        return "tiny-cell", f"two faces of the cell are {heights.min():.3g} Å apart"
    if lengths.max() > MAX_LENGTH:
        return "huge-cell", f"a lattice vector of {lengths.max():.3g} Å"
    return None


def _crowd(structure: Structure) -> tuple[str, str] | None:
    """Nodes by the dozen in one place, seen without listing their pairs; images in short directions count."""
    positions, images = structure.positions, 1.0
    if len(positions) <= MAX_DENSE:
        return None
    if structure.periodic:
        vectors = np.asarray(structure.cell, dtype=np.float64)[np.asarray(structure.pbc, dtype=bool)]
        inverse = np.linalg.pinv(vectors)
        positions = positions - np.floor(positions @ inverse) @ vectors
        images = np.maximum(SEARCH * np.linalg.norm(inverse, axis=0), 1.0).prod()
    cubes = np.floor((positions - positions.min(axis=0)) / SEARCH).astype(np.int64)
    _, counts = np.unique(cubes @ [1 << 42, 1 << 21, 1], return_counts=True)
    crowd = counts.max() * images
    if crowd > MAX_CROWD:
        return "overlap", f"{crowd:.0f} nodes in a cube of {SEARCH} Å"
    return None


def _overlap(structure: Structure) -> tuple[str, str] | None:
    node_type = structure.node_type
    residue = (node_type >= FIRST_RESIDUE) & (node_type < MASK)
    reach = MIN_RESIDUE_DISTANCE if residue.any() else MIN_DISTANCE
    first, second, distance = _close_pairs(structure, reach)
    if len(first) == 0:
        return None
    near = (distance < MIN_DISTANCE) | (residue[first] & residue[second])
    if not near.any():
        return None
    first, second, distance = first[near], second[near], distance[near]
    i, j = int(first[0]), int(second[0])
    if i == j:
        return "overlap", f"node {i} is {distance[0]:.2f} Å from its own periodic image"
    return "overlap", f"nodes {i} and {j} are {distance[0]:.2f} Å apart"


def _close_pairs(structure: Structure, reach: float) -> tuple[Array, Array, Array]:
    """Pairs closer than reach, periodic images included: indices i <= j and distances."""
    positions = structure.positions
    if structure.periodic:
        return _close_periodic_pairs(structure, reach)
    if len(positions) <= MAX_DENSE:
        x, y, z = positions.T
        square = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2 + (z[:, None] - z) ** 2
        if np.count_nonzero(square < reach**2) == len(positions):  # each node is only close to itself
            return np.empty(0, int), np.empty(0, int), np.empty(0)
        first, second = np.nonzero(np.triu(square < reach**2, k=1))
    else:
        from scipy.spatial import KDTree

        first, second = KDTree(positions).query_pairs(reach, output_type="ndarray").T
    return first, second, np.linalg.norm(positions[second] - positions[first], axis=1)


def _close_periodic_pairs(structure: Structure, reach: float) -> tuple[Array, Array, Array]:
    from moiety.models.feature_extraction_moiety import neighbor_list, pack  # torch: open systems do without

    positions = structure.positions
    arrays = pack([vars(structure)])
    (second, first), shift = neighbor_list(
        positions, arrays["node_type"], arrays["graph_index"], arrays["cell"], arrays["pbc"], SEARCH
    )
    distance = np.linalg.norm(positions[second] + shift - positions[first], axis=1)
    close = (distance < reach) & (first <= second)
    return first[close], second[close], distance[close]


def _bad_label(structure: Structure) -> tuple[str, str] | None:
    if abs(structure.charge) > MAX_CHARGE or not 1 <= structure.spin <= MAX_CHARGE:
        return "bad-label", f"charge {structure.charge:.3g}, multiplicity {structure.spin:.3g}"
    for name in ("energy", "forces", "stress", "dipole"):
        value = getattr(structure, name)
        if value is not None and not np.isfinite(value).all():
            return "bad-label", f"{name} is not finite"
    for name, value in (structure.tensors | structure.node_tensors).items():
        if not np.isfinite(value).all():
            return "bad-label", f"{name} is not finite"
    return None
