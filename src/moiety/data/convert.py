"""Structures from and to the objects of other libraries. Each library is imported only where it is asked for."""
# Shapes: N nodes.

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from moiety.data.structure import Array, Structure
from moiety.errors import InputError
from moiety.models.conversion_moiety import biotite_fields, to_fields
from moiety.models.vocabulary_moiety import ELEMENTS, FIRST_RESIDUE, POINT, RESIDUES

if TYPE_CHECKING:
    import ase
    import biotite.structure
    import pymatgen.core
    import rdkit.Chem
    import torch_geometric.data

LIGAND_NAME = "LIG"
VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])  # place of each tensor component in xx yy zz yz xz xy
ARRAYS_OF_ASE = {"positions", "masses", "momenta", "magmoms", "initial_magmoms", "initial_charges"}  # no labels
VOIGT_PAIRS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def from_object(obj: Any, residues: bool = False) -> Structure:
    """A Structure from anything `to_fields` accepts, with the labels the object carries.

    ASE results that belong to the current geometry become energy, forces, stress and dipole; other numbers (ASE's info,
    RDKit's properties) become scalars under their own names, in their own units.

    Raises:
        TypeError: an object of an unknown kind.
        ValueError: an object without a usable structure; the message says what to do.
    """
    if isinstance(obj, Structure):
        return obj
    if hasattr(obj, "res_name") and hasattr(obj, "coord"):
        return Structure(**biotite_fields(obj, residues))
    structure = Structure(**to_fields(obj))
    if hasattr(obj, "info") and hasattr(obj, "calc"):
        _add_ase_labels(structure, obj)
    elif hasattr(obj, "GetPropsAsDict"):
        structure.scalars = _numbers(obj.GetPropsAsDict())
        name = obj.GetProp("_Name").strip() if obj.HasProp("_Name") else ""
        structure.text = [name] if name else []
    return structure


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a dictionary that are no charge, spin or private entry."""
    taken = ("charge", "spin", "total_charge", "spin_multiplicity")
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, Real) and not isinstance(value, bool | np.bool_)
        if math.isfinite(value) and key not in taken and not key.startswith("_")
    }


def _add_ase_labels(structure: Structure, atoms: ase.Atoms) -> None:
    structure.scalars = _numbers(atoms.info)
    for name, array in atoms.arrays.items():
        if array.dtype.kind == "f" and name not in ARRAYS_OF_ASE and np.isfinite(array).all():
            (structure.node_scalars if array.ndim == 1 else structure.node_tensors)[name] = np.array(array)
    if atoms.calc is None or atoms.calc.check_state(atoms):
        return  # no results, or results of another geometry
    results = atoms.calc.results
    if results.get("energy") is not None:
        structure.energy = float(results["energy"])
    if results.get("forces") is not None:
        structure.forces = np.array(results["forces"], dtype=np.float64)
    if results.get("stress") is not None:
        stress = np.array(results["stress"], dtype=np.float64)
        structure.stress = stress[VOIGT] if stress.shape == (6,) else stress.reshape(3, 3)
    if results.get("dipole") is not None:
        structure.dipole = np.array(results["dipole"], dtype=np.float64)


def to_ase(structure: Structure) -> ase.Atoms:
    """ASE atoms; labels in a SinglePointCalculator (eV, eV/Å, eV/Å^3), charge, spin and scalars in info."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    numbers = _atomic_numbers(structure)
    atoms = Atoms(numbers, structure.positions, cell=structure.cell, pbc=_pbc(structure))
    atoms.info |= structure.scalars | {"charge": structure.charge, "spin": structure.spin}
    stress = structure.stress
    results = {
        "energy": structure.energy,
        "forces": structure.forces,
        "stress": None if stress is None else stress[*zip(*VOIGT_PAIRS, strict=True)],
        "dipole": structure.dipole,
    }
    results = {name: value for name, value in results.items() if value is not None}
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def to_rdkit(structure: Structure) -> rdkit.Chem.Mol:
    """An RDKit molecule with one conformer and no bonds (rdkit.Chem.rdDetermineBonds finds them).

    The total charge and the multiplicity are the properties total_charge and spin_multiplicity.
    """
    from rdkit import Chem

    _refuse_periodic(structure, "RDKit")
    numbers = _atomic_numbers(structure)
    molecule = Chem.RWMol()
    conformer = Chem.Conformer(len(numbers))
    conformer.Set3D(True)
    for index, number in enumerate(numbers.tolist()):
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
        conformer.SetAtomPosition(index, structure.positions[index].tolist())
    molecule.AddConformer(conformer, assignId=True)
    molecule.SetIntProp("total_charge", int(structure.charge))
    molecule.SetIntProp("spin_multiplicity", int(structure.spin))
    for name, value in structure.scalars.items():
        molecule.SetDoubleProp(name, value)
    return molecule.GetMol()


def to_pymatgen(structure: Structure) -> pymatgen.core.Structure | pymatgen.core.Molecule:
    """A pymatgen Structure where the cell is periodic, otherwise a Molecule."""
    from pymatgen.core import Lattice, Molecule
    from pymatgen.core import Structure as Crystal

    symbols = [ELEMENTS[number - 1] for number in _atomic_numbers(structure)]
    if structure.cell is None or not structure.periodic:
        return Molecule(
            symbols,
            structure.positions,
            charge=structure.charge,
            spin_multiplicity=structure.spin,
            charge_spin_check=False,
        )
    lattice = Lattice(structure.cell, pbc=tuple(_pbc(structure).tolist()))
    return Crystal(lattice, symbols, structure.positions, charge=structure.charge, coords_are_cartesian=True)


def to_biotite(structure: Structure) -> biotite.structure.AtomArray:
    """A biotite AtomArray; a residue becomes its N, CA, C and O. biotite keeps coordinates in single precision."""
    import biotite.structure as struc

    _refuse_points(structure)
    symbols = ["", *ELEMENTS]
    chains = structure.chain or ["A"] * structure.num_nodes
    number = structure.residue_index if structure.residue_index is not None else np.arange(1, structure.num_nodes + 1)
    codes = _insertion_codes(structure, chains, number)
    atoms = []
    for node, kind in enumerate(structure.node_type.tolist()):
        place = {"chain_id": chains[node], "res_id": int(number[node])}
        if kind <= len(ELEMENTS):
            ligand = {"res_name": LIGAND_NAME, "hetero": True, "atom_name": symbols[kind], "element": symbols[kind]}
            atoms.append(struc.Atom(structure.positions[node], **place, **ligand))
            continue
        residue = {"res_name": RESIDUES[kind - FIRST_RESIDUE], "hetero": False, "ins_code": codes[node]}
        for name, offset in _backbone(structure, node):
            position = structure.positions[node] + offset
            atoms.append(struc.Atom(position, atom_name=name, element=name[0], **place, **residue))
    array = struc.array(atoms)
    charge = np.zeros(len(atoms), dtype=int)
    charge[0] = structure.charge  # the only place biotite has for it
    array.set_annotation("charge", charge)
    if structure.periodic:
        array.box = np.asarray(structure.cell)
    return array


def _backbone(structure: Structure, node: int) -> list[tuple[str, Array]]:
    """Names and offsets from CA of the atoms of a residue node."""
    assert structure.node_vectors is not None  # residues have backbone offsets
    n, c, o, _ = structure.node_vectors[node]
    found = [("N", n), ("CA", np.zeros(3)), ("C", c)]
    return [*found, ("O", o)] if o.any() else found


def _insertion_codes(structure: Structure, chains: list[str], number: Array) -> list[str]:
    """Letters that keep neighbouring nodes of the same name and number apart."""
    codes = [""] * structure.num_nodes
    for node in range(1, structure.num_nodes):
        before = node - 1
        if (chains[node], number[node], structure.node_type[node]) == (
            chains[before],
            number[before],
            structure.node_type[before],
        ):
            codes[node] = chr(ord(codes[before] or "@") + 1)
    return codes


def to_pyg(structure: Structure) -> torch_geometric.data.Data:
    """A PyTorch Geometric Data: z, pos (float64), cell [1,3,3], pbc [1,3], charge, spin and the labels there are."""
    import torch
    from torch_geometric.data import Data

    fields = {"z": _atomic_numbers(structure), "pos": structure.positions}
    if structure.periodic:
        fields |= {"cell": np.asarray(structure.cell)[None], "pbc": _pbc(structure)[None]}
    for name in ("forces", "stress", "dipole"):
        if getattr(structure, name) is not None:
            fields[name] = getattr(structure, name)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in fields.items()}
    data = Data(**tensors)
    numbers = {"charge": structure.charge, "spin": structure.spin, "energy": structure.energy} | structure.scalars
    for name, value in numbers.items():
        if value is not None:
            data[name] = value
    return data


def _atomic_numbers(structure: Structure) -> Array:
    """[N] atomic numbers; InputError where a node is no atom."""
    _refuse_points(structure)
    others = int((structure.node_type > len(ELEMENTS)).sum())
    if others:
        name = structure.id or "the structure"
        raise InputError(f"{name}: {others} nodes are no atoms; read it with all_atom=True, or use to_biotite")
    return structure.node_type


def _refuse_points(structure: Structure) -> None:
    if (structure.node_type == POINT).any():
        raise InputError(f"{structure.id or 'the structure'}: points of a field, no atoms; read its arrays instead")


def _refuse_periodic(structure: Structure, library: str) -> None:
    if structure.periodic:
        raise InputError(
            f"{structure.id or 'the structure'}: {library} has no periodic cells; use to_ase or to_pymatgen"
        )


def _pbc(structure: Structure) -> Array:
    return np.zeros(3, dtype=bool) if structure.pbc is None else np.asarray(structure.pbc, dtype=bool)
