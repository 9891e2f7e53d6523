"""Any object that holds a structure, as plain arrays: ASE, RDKit, pymatgen, biotite, PyTorch Geometric, moiety.

Objects are recognised by what they offer, so none of those packages has to be installed.
"""
# Shapes: N nodes, A atoms, R residues.

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .vocabulary_moiety import ELEMENT_ID, RESIDUE_ID, ROLE_ID

Fields = dict[str, Any]

ACCEPTED = (
    "ase.Atoms, rdkit.Chem.Mol with a conformer, pymatgen Structure or Molecule, biotite AtomArray, "
    "torch_geometric Data (z, pos), moiety.Structure, or the path of a structure file"
)
WATER = ("HOH", "WAT", "DOD", "SOL", "TIP", "TIP3", "H2O")
RESIDUE_ALIASES = {  # names of force fields and of selenomethionine for the residues of the vocabulary
    "MSE": "MET", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS", "HID": "HIS", "HIE": "HIS", "HIP": "HIS",
    "CYX": "CYS", "CYM": "CYS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS",
}  # fmt: skip
BACKBONE = ("N", "CA", "C", "O")
BOND = 2.2  # Å, a generous limit for a covalent bond along the backbone
ISOTOPES = {"D": 1, "T": 1}


def to_fields(obj: Any, residues: bool = False) -> Fields:
    """Reads a structure from an object.

    Args:
        obj: an ase.Atoms, rdkit.Chem.Mol (with a conformer), pymatgen Structure or Molecule, biotite AtomArray,
            torch_geometric Data (z, pos), moiety.Structure, or the path of a structure file.
        residues: one node for each amino acid, where the object names residues (biotite); otherwise one for each atom.

    Returns:
        node_type [N] int64, positions [N,3] Å float64, node_vectors [N,4,3] Å or None, cell [3,3] Å (rows) or None,
        pbc [3] bool or None, charge (e), spin (multiplicity), domain, role [N] or None.

    Raises:
        TypeError: the object is of none of these kinds.
        ValueError: it is, but holds no usable structure; the message says what to do.
    """
    if isinstance(obj, str | Path):
        obj = read_path(obj)
    for recognises, convert in _CONVERTERS:
        if recognises(obj):
            return convert(obj)
    if _is_biotite(obj):
        fields = biotite_fields(obj, residues)
        return {name: value for name, value in fields.items() if name not in ("chain", "residue_index")}
    raise TypeError(f"cannot read a structure from {type(obj).__module__}.{type(obj).__qualname__}; use {ACCEPTED}")


def _read_with_ase(path: str | Path) -> Any:
    """The only structure of a file, by ASE."""
    try:
        from ase.io import read
    except ImportError:
        raise ValueError(f"{path}: reading files needs ase (pip install ase)") from None
    found = read(path, index=":")
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} structures; read it with ase.io.read(path, index=':')")
    return found[0]


read_path: Callable[[str | Path], Any] = _read_with_ase  # the moiety package puts its own readers here


def fields_of(
    node_type: Any, positions: Any, cell: Any = None, pbc: Any = None, charge: Any = 0, spin: Any = 1, **more: Any
) -> Fields:
    """The dictionary of `to_fields` from arrays; a structure with no periodic direction has neither cell nor pbc."""
    pbc = None if pbc is None else np.broadcast_to(np.asarray(pbc, dtype=bool).reshape(-1), (3,)).copy()
    periodic = pbc is not None and bool(pbc.any())
    return {
        "node_type": np.array(node_type, dtype=np.int64).reshape(-1),
        "positions": np.array(positions, dtype=np.float64).reshape(-1, 3),
        "node_vectors": None,
        "cell": np.array(cell, dtype=np.float64).reshape(3, 3) if periodic and cell is not None else None,
        "pbc": pbc if periodic else None,
        "charge": int(charge),
        "spin": int(spin),
        "domain": "crystal" if periodic else "molecule",
        "role": None,
        **more,
    }


def _from_structure(obj: Any) -> Fields:
    names = ("node_type", "positions", "node_vectors", "cell", "pbc", "charge", "spin", "domain", "role")
    return {name: getattr(obj, name) for name in names}


def _from_ase(obj: Any) -> Fields:
    info = obj.info
    return fields_of(
        obj.numbers, obj.positions, np.asarray(obj.cell), obj.pbc, info.get("charge", 0), info.get("spin", 1)
    )


def _from_rdkit(obj: Any) -> Fields:
    if obj.GetNumConformers() == 0:
        raise ValueError(
            "the molecule has no coordinates; embed it first: "
            "mol = Chem.AddHs(mol); AllChem.EmbedMolecule(mol); AllChem.MMFFOptimizeMolecule(mol)"
        )
    if is_drawing(obj):
        raise ValueError(
            "the coordinates are a 2-D drawing; embed the molecule first: "
            "mol = Chem.AddHs(mol); AllChem.EmbedMolecule(mol)"
        )
    positions = obj.GetConformer().GetPositions()
    atoms = list(obj.GetAtoms())
    charge = sum(atom.GetFormalCharge() for atom in atoms)
    spin = 1 + sum(atom.GetNumRadicalElectrons() for atom in atoms)
    if obj.HasProp("total_charge"):
        charge = int(obj.GetProp("total_charge"))
    if obj.HasProp("spin_multiplicity"):
        spin = int(obj.GetProp("spin_multiplicity"))
    return fields_of([atom.GetAtomicNum() for atom in atoms], positions, charge=charge, spin=spin)


def is_drawing(molecule: Any) -> bool:
    """Whether an rdkit molecule's conformer is a 2-D drawing: not marked 3-D, and flat at z = 0."""
    conformer = molecule.GetConformer()
    return conformer.GetNumAtoms() > 3 and not conformer.Is3D() and not conformer.GetPositions()[:, 2].any()


def _from_pymatgen(obj: Any) -> Fields:
    if not obj.is_ordered:
        raise ValueError(
            "sites have partial occupancy; order the structure first "
            "(pymatgen.transformations.standard_transformations.OrderDisorderedStructureTransformation)"
        )
    numbers = [site.specie.Z for site in obj]
    lattice = getattr(obj, "lattice", None)
    if lattice is None:
        return fields_of(numbers, obj.cart_coords, charge=obj.charge, spin=obj.spin_multiplicity)
    return fields_of(numbers, obj.cart_coords, lattice.matrix, lattice.pbc, charge=obj.charge)


def _from_pyg(obj: Any) -> Fields:
    def array(name: str) -> Any:
        value: Any = getattr(obj, name, None)
        return value.detach().cpu().numpy() if hasattr(value, "detach") else value

    numbers, positions, cell, pbc = array("z"), array("pos"), array("cell"), array("pbc")
    if numbers is None or positions is None:
        raise ValueError("the Data needs z (atomic numbers) and pos (Å)")
    if cell is not None and pbc is None:
        pbc = True
    charge, spin = array("charge"), array("spin")
    return fields_of(
        numbers,
        positions,
        cell,
        pbc,
        0 if charge is None else np.asarray(charge).item(),
        1 if spin is None else np.asarray(spin).item(),
    )


def _is_biotite(obj: Any) -> bool:
    return hasattr(obj, "coord") and hasattr(obj, "res_name")


def biotite_fields(obj: Any, residues: bool = False) -> Fields:
    """The fields of `to_fields`, and chain [N] and residue_index [N], of a biotite AtomArray."""
    if np.ndim(obj.coord) != 2:
        raise ValueError("a biotite AtomArrayStack holds several models; pass one of them: stack[0]")
    numbers = element_numbers(obj.element)
    fields = nodes_from_atoms(
        obj.coord, numbers, obj.atom_name, obj.res_name, obj.chain_id, obj.res_id, obj.ins_code, obj.hetero, residues
    )
    if "charge" in obj.get_annotation_categories():
        fields["charge"] = int(np.sum(obj.charge))
    if obj.box is not None and fields["domain"] == "molecule":  # of a protein it is the crystal of the experiment
        fields |= {"cell": np.array(obj.box, dtype=np.float64), "pbc": np.ones(3, dtype=bool), "domain": "crystal"}
    return fields


def element_numbers(symbols: Any) -> np.ndarray:
    """[A] atomic numbers of element symbols in any case; 0 where the symbol is of no element."""
    unique, inverse = np.unique(np.asarray(symbols, dtype=str), return_inverse=True)
    known = [ELEMENT_ID.get(name, ISOTOPES.get(name, 0)) for name in (str(s).strip().capitalize() for s in unique)]
    return np.array(known, dtype=np.int64)[inverse.reshape(-1)]


def virtual_cb(n: np.ndarray, ca: np.ndarray, c: np.ndarray) -> np.ndarray:
    """[R,3] Å, where an ideal CB stands. It is the same function for every residue, so it does not tell the type."""
    b, c_offset = ca - n, c - ca
    return ca - 0.58273431 * np.cross(b, c_offset) + 0.56802827 * b - 0.54067466 * c_offset


def nodes_from_atoms(
    coord: Any,
    numbers: Any,
    atom_name: Any,
    res_name: Any,
    chain: Any,
    res_id: Any,
    ins_code: Any,
    hetero: Any,
    residues: bool = True,
) -> Fields:
    """Nodes of a molecule with residues, from what a PDB file says of each atom.

    With `residues`, an amino acid that has N, CA and C becomes one node at CA, whose vectors are the offsets of N, C,
    O (zero where absent) and the ideal CB; incomplete amino acids and waters are dropped; the atoms of everything else
    are nodes with role ligand. Without, every atom is a node.

    Args:
        coord: [A,3] Å.
        numbers: [A] atomic numbers.
        atom_name: [A] names such as "CA".
        res_name: [A] names such as "ALA".
        chain: [A] chain names.
        res_id: [A] residue numbers.
        ins_code: [A] insertion codes.
        hetero: [A] bool, HETATM records.
        residues: one node for each amino acid.

    Returns:
        The fields of `to_fields`, and chain [N] (list) and residue_index [N].
    """
    coord = np.asarray(coord, dtype=np.float64).reshape(-1, 3)
    numbers, res_id, hetero = np.asarray(numbers), np.asarray(res_id), np.asarray(hetero, dtype=bool)
    atom_name, res_name, chain = (np.asarray(a, dtype=str) for a in (atom_name, res_name, chain))
    residue_of, first = _residue_index(chain, res_id, np.asarray(ins_code, dtype=str), res_name)
    kind, is_amino, backbone, present = _amino_acids(coord, atom_name, res_name, hetero, residue_of, first)
    is_water = np.isin(res_name, WATER)
    in_protein = is_amino[residue_of]
    if residues:
        atoms = np.flatnonzero(~in_protein & ~is_water)
        nodes = np.flatnonzero(is_amino & present[:, :3].all(axis=1))
    else:
        atoms, nodes = np.arange(len(coord)), np.empty(0, dtype=np.int64)
    place = np.concatenate([first[nodes], atoms])  # the atom that stands for the node: files keep their order
    order = np.argsort(place, kind="stable")
    place = place[order]
    node_type = np.concatenate([kind[nodes], numbers[atoms]])[order]
    positions = np.concatenate([backbone[nodes, 1], coord[atoms]])[order]
    vectors = np.concatenate([_offsets(backbone[nodes], present[nodes, 3]), np.zeros((len(atoms), 4, 3))])[order]
    role = np.where(in_protein, ROLE_ID["protein"], np.where(is_water, ROLE_ID["solvent"], ROLE_ID["ligand"]))[place]
    any_protein, any_ligand = bool((role == ROLE_ID["protein"]).any()), bool((role == ROLE_ID["ligand"]).any())
    fields = fields_of(node_type, positions, chain=chain[place].tolist(), residue_index=res_id[place].astype(np.int64))
    if any_protein:
        fields["domain"] = "complex" if any_ligand else "protein"
        fields["role"] = role.astype(np.int64)
    if len(nodes):
        fields["node_vectors"] = vectors
    return fields


def _residue_index(
    chain: np.ndarray, res_id: np.ndarray, ins_code: np.ndarray, res_name: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[A] residue of each atom, and [R] first atom of each residue."""
    if len(res_id) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    new = np.ones(len(res_id), dtype=bool)
    new[1:] = False
    for column in (chain, res_id, ins_code, res_name):
        new[1:] |= column[1:] != column[:-1]
    return np.cumsum(new) - 1, np.flatnonzero(new)


def _amino_acids(
    coord: np.ndarray,
    atom_name: np.ndarray,
    res_name: np.ndarray,
    hetero: np.ndarray,
    residue_of: np.ndarray,
    first: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What each residue is.

    A known name in an ATOM record is an amino acid. Of the rest (modified residues, free amino acids as ligands) those
    are that have a backbone and a peptide bond to a neighbour.

    Returns:
        kind [R] vocabulary id, is_amino [R], backbone [R,4,3] Å of N, CA, C, O, present [R,4] which of them there are.
    """
    num_residues = len(first)
    backbone, present = np.zeros((num_residues, 4, 3)), np.zeros((num_residues, 4), dtype=bool)
    for index, name in enumerate(BACKBONE):
        atoms = np.flatnonzero(atom_name == name)[::-1]  # of two atoms with one name the first stays
        backbone[residue_of[atoms], index], present[residue_of[atoms], index] = coord[atoms], True
    names = [RESIDUE_ALIASES.get(str(name), str(name)) for name in res_name[first]]
    kind = np.array([RESIDUE_ID.get(name, RESIDUE_ID["UNK"]) for name in names], dtype=np.int64)
    known = np.array([name in RESIDUE_ID for name in names], dtype=bool)
    n, ca, c = backbone[:, 0], backbone[:, 1], backbone[:, 2]
    complete = present[:, 0] & present[:, 1] & present[:, 2]
    bonded = np.zeros(num_residues, dtype=bool)
    if num_residues > 1:
        peptide = complete[:-1] & complete[1:] & _near(c[:-1], n[1:])
        bonded[:-1] |= peptide
        bonded[1:] |= peptide
    sound = complete & _near(n, ca) & _near(ca, c)
    is_amino = np.logical_or(known & ~hetero[first], sound & bonded)
    return kind, is_amino, backbone, present


def _near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.less(np.linalg.norm(a - b, axis=-1), BOND)


def _offsets(backbone: np.ndarray, has_o: np.ndarray) -> np.ndarray:
    """[R,4,3] Å, offsets of N, C, O, CB from CA; the O of a residue without one is zero."""
    n, ca, c, o = (backbone[:, index] for index in range(4))
    offsets = np.stack([n - ca, c - ca, o - ca, virtual_cb(n, ca, c) - ca], axis=1)
    offsets[~has_o, 2] = 0.0
    return offsets


_CONVERTERS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Fields]], ...] = (
    (lambda obj: hasattr(obj, "node_type") and hasattr(obj, "positions"), _from_structure),
    (lambda obj: hasattr(obj, "numbers") and hasattr(obj, "positions") and hasattr(obj, "pbc"), _from_ase),
    (lambda obj: hasattr(obj, "GetNumConformers"), _from_rdkit),
    (lambda obj: hasattr(obj, "is_ordered") and hasattr(obj, "cart_coords"), _from_pymatgen),
    (lambda obj: hasattr(obj, "pos") and hasattr(obj, "z"), _from_pyg),
)

__all__ = ["ACCEPTED", "biotite_fields", "element_numbers", "fields_of", "nodes_from_atoms", "to_fields", "virtual_cb"]
