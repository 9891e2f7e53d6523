"""Ligands in their protein pockets, all atoms, from the test data of four packages: for evaluation only.

A ligand is a residue of at least MIN_HEAVY heavy atoms that is no polymer, no water and nothing that crystals are grown
or frozen in; its pocket is every residue with an atom within REACH of it. Atoms are those of the file: hydrogens are
mostly absent, and so is the charge. PoseBusters stores ligands as SDF beside the proteins.
"""
# Shapes: A atoms of the ligand, R of a residue.

from __future__ import annotations

import bz2
import gzip
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

import gemmi
import numpy as np
from rdkit import Chem, RDLogger
from scipy.spatial.distance import cdist

from moiety.data.download import Archive
from moiety.data.splits import select, shuffled
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import ROLE_ID

MIN_HEAVY, MAX_HEAVY = 8, 80
REACH = 8.0  # Å
MIN_CONTACT, MAX_CONTACT = 1.9, 4.5  # Å, of heavy atoms: closer is a bond, further no complex
MIN_RESIDUES = 5
MAX_COPIES = 2  # of a ligand in one entry: a viral shell has dozens
ADDITIVES = frozenset(
    {"PEG", "PG4", "1PE", "P6G", "PGE", "MES", "EPE", "TRS", "BOG", "LDA", "OLA", "OLC", "DMU", "LMT", "CIT", "MPD"}
    | {"NAG", "MAN", "BMA"}
)
PARSERS = {
    ".pdb": gemmi.read_pdb_string,
    ".ent": gemmi.read_pdb_string,
    ".cif": lambda text: gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0]),
}
OPENERS = {".gz": gzip.decompress, ".bz2": bz2.decompress}
Atoms = tuple[Array, Array]  # [A] atomic numbers, [A, 3] Å


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields complexes in a hashed order; the same ligand in the same pocket comes once."""
    seen: set[str] = set()
    copies: Counter[str] = Counter()
    found = []
    for name in sorted(archives):
        for complex_ in _complexes(archives[name]):
            ligand = f"{complex_.groups['entry']}:{complex_.groups['ligand']}"
            if complex_.groups["pocket"] not in seen and copies[ligand] < MAX_COPIES:
                seen.add(complex_.groups["pocket"])
                copies[ligand] += 1
                found.append(complex_)
    found = [found[index] for index in shuffled((complex_.id for complex_ in found), salt="complexes")]
    for index in select(["test"] * len(found), options):
        yield found[index]


def _complexes(archive: Archive) -> Iterator[Structure]:
    ligands: dict[str, bytes] = {}
    for path, stream in archive.members():
        name = path.rsplit("/", 1)[-1]
        if name.endswith("_ligand.sdf"):  # PoseBusters: ligands come before their protein
            ligands[name.split("_")[0]] = stream.read()
            continue
        protein = _read(name, stream.read)
        if protein is None:
            continue
        prefix = f"{archive.source.package}:{name.split('.')[0]}"
        if (block := ligands.get(name.split("_")[0])) is not None:
            yield from _with_sdf(protein, block, prefix)
        else:
            yield from complexes_of(protein, prefix)


def _read(name: str, content: Callable[[], bytes]) -> gemmi.Structure | None:
    """The first model of a coordinate file, without water and alternative conformations; None for other files."""
    suffixes = PurePosixPath(name).suffixes
    parser = next((PARSERS[suffix] for suffix in reversed(suffixes) if suffix in PARSERS), None)
    if parser is None:
        return None
    try:
        found = parser(OPENERS.get(suffixes[-1], bytes)(content()).decode("utf-8"))
    except (RuntimeError, ValueError, OSError, EOFError, IndexError):
        return None  # test data of parsers: many of the files are broken on purpose
    while len(found) > 1:
        del found[1]
    found.remove_alternative_conformations()
    found.remove_waters()
    return found if len(found) else None


def complexes_of(protein: gemmi.Structure, prefix: str) -> Iterator[Structure]:
    """Every ligand of a structure with its pocket."""
    residues = [(chain.name, residue) for chain in protein[0] for residue in chain]
    for chain, residue in residues:
        if is_ligand(residue):
            yield from _complex(_atoms(residue), residue.name, f"{prefix}:{chain}{residue.seqid}", residues)


def is_ligand(residue: gemmi.Residue) -> bool:
    """No polymer, no additive, and of a ligand's size."""
    known = gemmi.find_tabulated_residue(residue.name)
    heavy = sum(atom.element.atomic_number > 1 for atom in residue)
    polymer = known.is_amino_acid() or known.is_nucleic_acid()
    return residue.name not in ADDITIVES and not polymer and MIN_HEAVY <= heavy <= MAX_HEAVY


def _with_sdf(protein: gemmi.Structure, block: bytes, prefix: str) -> Iterator[Structure]:
    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.MolFromMolBlock(block.decode(), removeHs=False, sanitize=False)
    if molecule is None:
        return
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    atoms = (numbers, np.array(molecule.GetConformer().GetPositions()))
    name = molecule.GetProp("_Name").split("_")[-1] if molecule.HasProp("_Name") else "ligand"
    residues = [(chain.name, residue) for chain in protein[0] for residue in chain]
    yield from _complex(atoms, name or "ligand", f"{prefix}:ligand", residues)


def _complex(ligand: Atoms, name: str, identity: str, residues: list[tuple[str, gemmi.Residue]]) -> Iterator[Structure]:
    """The ligand and its pocket; nothing where they are bonded, or hardly touch."""
    numbers, positions = ligand
    pocket = []
    for chain, residue in residues:
        if not gemmi.find_tabulated_residue(residue.name).is_amino_acid():
            continue
        atoms = _atoms(residue)
        if len(atoms[0]) and cdist(positions, atoms[1]).min() < REACH:
            pocket.append((chain, residue, atoms))
    if len(pocket) < MIN_RESIDUES:
        return
    near = min(_heavy_contact(ligand, atoms) for _, _, atoms in pocket)
    if not MIN_CONTACT <= near <= MAX_CONTACT:
        return
    sizes = [len(atoms[0]) for _, _, atoms in pocket]
    chains = [chain for chain, _, _ in pocket]
    yield Structure(
        node_type=np.concatenate([numbers, *(atoms[0] for _, _, atoms in pocket)]),
        positions=np.vstack([positions, *(atoms[1] for _, _, atoms in pocket)]),
        domain="complex",
        id=identity,
        source="complexes",
        role=np.repeat([ROLE_ID["ligand"], ROLE_ID["protein"]], [len(numbers), sum(sizes)]),
        chain=["ligand"] * len(numbers)
        + [chain for chain, size in zip(chains, sizes, strict=True) for _ in range(size)],
        residue_index=np.repeat([0, *(residue.seqid.num for _, residue, _ in pocket)], [len(numbers), *sizes]),
        text=[name],
        groups={
            "split": "test",
            "ligand": name,
            "entry": identity.rsplit(":", 1)[0],
            "pocket": f"{name}:" + "-".join(f"{residue.name}{residue.seqid}" for _, residue, _ in pocket),
        },
    )


def _atoms(residue: gemmi.Residue) -> Atoms:
    atoms = [atom for atom in residue if atom.element.atomic_number > 0]
    positions = np.array([atom.pos.tolist() for atom in atoms]).reshape(-1, 3)
    return np.array([atom.element.atomic_number for atom in atoms], dtype=np.int64), positions


def _heavy_contact(ligand: Atoms, residue: Atoms) -> float:
    """Å between the closest heavy atoms; a residue of hydrogens alone is far away."""
    first, second = (positions[numbers > 1] for numbers, positions in (ligand, residue))
    return float(cdist(first, second).min()) if len(second) else np.inf
