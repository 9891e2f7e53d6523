"""Ligands in their protein pockets, all atoms, from the test data of four packages: for evaluation only.

A ligand is a residue of at least MIN_HEAVY heavy atoms that is no polymer, no water and none of NO_LIGANDS; its pocket
is every residue with an atom within REACH of it. What is bonded to its pocket (glycans, acyl enzymes, heme c) is no
complex. Atoms are those of the file: hydrogens are mostly absent, and so is the charge. PoseBusters stores ligands as
SDF beside the proteins. The same ligand in the same pocket comes once, however many chains and files show it.
"""
# Shapes: A atoms of the ligand, R of a residue.

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import PurePosixPath

import gemmi
import numpy as np
from rdkit import Chem, RDLogger
from scipy.spatial.distance import cdist

from moiety.data.download import Archive
from moiety.data.splits import select, shuffled
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import ROLE_ID

MIN_HEAVY, MAX_HEAVY = 6, 80
REACH = 8.0  # Å
MIN_CONTACT, MAX_CONTACT = 1.9, 4.5  # Å, of heavy atoms: closer is a bond, further no complex
MIN_RESIDUES = 5
SAME_POCKET = 0.9  # of the letters of two pockets that agree in order: above, they are one
NO_LIGANDS = {  # why -> CCD and force field names
    "cryoprotectant, precipitant or buffer": "GOL EDO PGO PGR MPD MRD PEG PG4 1PE P6G PGE PG0 2PE MES EPE TRS CIT FLC"
    " TLA MLI MLA BTB IMD DIO BCN NHE CXS TAR",
    "detergent": "BOG LDA DMU LMT BNG C8E LMU SDS CPS DDM",
    "lipid of a membrane, or of its simulation": "CLR CHL POV POP PLM OLA OLC OLB PLY PC1 PCW PEE PEF PTY LPP 3PE CDL"
    " DPP DPPC POPC POPE POPG DOPC CHL1 STE MYR",
    "glycan": "NAG NDG MAN BMA GAL GLA FUC FUL BGC GLC XYP SIA",
    "residue of a force field": "HSD HSE HSP HID HIE HIP CYX LYN ASH GLH ADE GUA CYT THY URA",
}
NO_LIGAND = frozenset(name for names in NO_LIGANDS.values() for name in names.split())
KINDS = {  # groups["ligand_kind"] of cofactors and their analogues; of all others it is small-molecule
    "nucleotide": "ATP ADP AMP AGS ANP ACP AP5 GTP GDP GNP GSP NAD NAI NAP NDP FAD FMN COA ACO SAM SAH TPP UDP CTP",
    "heme": "HEM HEC HEA HEB SRM CLA BCL",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
PARSERS = {
    ".pdb": gemmi.read_pdb_string,
    ".ent": gemmi.read_pdb_string,
    ".cif": lambda text: gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0]),
}
OPENERS = {".gz": gzip.decompress, ".bz2": bz2.decompress}
Atoms = tuple[Array, Array]  # [A] atomic numbers, [A, 3] Å


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields complexes in a hashed order; the same ligand in the same pocket comes once."""
    pockets: dict[str, list[str]] = {}  # ligand -> its pockets so far
    found = []
    for name in sorted(archives):
        for complex_ in _complexes(archives[name]):
            known = pockets.setdefault(complex_.groups["ligand"], [])
            pocket = complex_.groups["pocket"]
            if not any(is_same(pocket, other) for other in known):
                known.append(pocket)
                found.append(complex_)
    found = [found[index] for index in shuffled((complex_.id for complex_ in found), salt="complexes")]
    for index in select(["test"] * len(found), options):
        yield found[index]


def is_same(first: str, second: str) -> bool:
    """Two pockets of one site: chains of one entry are numbered and cut differently, so that letters are compared."""
    return SequenceMatcher(None, first, second, autojunk=False).ratio() > SAME_POCKET


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
    """No polymer, none of NO_LIGANDS, and of a ligand's size."""
    known = gemmi.find_tabulated_residue(residue.name)
    heavy = sum(atom.element.atomic_number > 1 for atom in residue)
    polymer = known.is_amino_acid() or known.is_nucleic_acid()
    return residue.name not in NO_LIGAND and not polymer and MIN_HEAVY <= heavy <= MAX_HEAVY


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
            "ligand_kind": KIND_OF.get(name, "small-molecule"),
            "pocket": "".join(gemmi.find_tabulated_residue(r.name).fasta_code() for _, r, _ in pocket),
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
