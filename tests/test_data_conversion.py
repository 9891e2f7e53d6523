"""Objects of other libraries become structures and come back unchanged."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from moiety.data import convert
from moiety.data.readers import read_one
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models import conversion_moiety
from moiety.models.conversion_moiety import nodes_from_atoms, to_fields, virtual_cb
from moiety.models.vocabulary_moiety import RESIDUE_ID, ROLE_ID

FILES = Path(__file__).parent / "data" / "files"
BACKBONE = np.array([[-0.525, 1.363, 0.0], [0.0, 0.0, 0.0], [1.526, 0.0, 0.0], [2.153, -1.062, 0.0]])  # N CA C O of Ala


def molecule(**changes) -> Structure:
    positions = np.array([[0.0, 0.0, 0.119262], [0.0, 0.763239, -0.477047], [0.0, -0.763239, -0.477047]])
    return Structure(**{"node_type": [8, 1, 1], "positions": positions, "charge": 1, "spin": 2, **changes})


def crystal() -> Structure:
    cell = np.array([[0.0, 1.9, 1.8], [1.7, 0.1, 1.8], [1.6, 1.8, 0.2]])
    positions = np.array([[0.1, 0.2, 0.3], [1.4, 1.5, -4.6]])
    return Structure([11, 17], positions, domain="crystal", cell=cell, pbc=np.ones(3, dtype=bool))


def assert_same_geometry(a: Structure, b: Structure) -> None:
    assert np.array_equal(a.node_type, b.node_type)
    assert np.abs(a.positions - b.positions).max() < 1e-6
    assert (a.domain, a.charge, a.spin, a.periodic) == (b.domain, b.charge, b.spin, b.periodic)
    if a.periodic:
        assert np.abs(a.cell - b.cell).max() < 1e-6
        assert np.array_equal(a.pbc, b.pbc)


@pytest.mark.parametrize("library", ["ase", "rdkit", "pymatgen", "pyg"])
def test_a_molecule_survives_the_round_trip(library):
    there = getattr(convert, f"to_{library}")(molecule())
    assert_same_geometry(convert.from_object(there), molecule())


def test_a_molecule_survives_the_round_trip_through_biotite():
    back = convert.from_object(convert.to_biotite(molecule(spin=1)))  # biotite has no place for the multiplicity
    assert_same_geometry(back, molecule(spin=1))


@pytest.mark.parametrize("library", ["ase", "pymatgen", "pyg", "biotite"])
def test_a_crystal_survives_the_round_trip(library):
    there = getattr(convert, f"to_{library}")(crystal())
    assert_same_geometry(convert.from_object(there), crystal())


def test_a_slab_stays_periodic_in_two_directions():
    slab = crystal()
    slab.pbc = np.array([True, True, False])
    for library in ("ase", "pymatgen", "pyg"):
        there = getattr(convert, f"to_{library}")(slab)
        assert convert.from_object(there).pbc.tolist() == [True, True, False]


def test_residues_survive_the_round_trip_through_biotite():
    peptide = read_one(FILES / "peptide.pdb")
    back = convert.from_object(convert.to_biotite(peptide), residues=True)
    assert np.array_equal(back.node_type, peptide.node_type)
    assert np.abs(back.positions - peptide.positions).max() < 1e-5  # biotite keeps float32
    assert np.abs(back.node_vectors - peptide.node_vectors).max() < 1e-5
    assert np.array_equal(back.role, peptide.role)
    assert (back.domain, back.chain) == (peptide.domain, peptide.chain)
    assert np.array_equal(back.residue_index, peptide.residue_index)


def test_labels_survive_the_round_trip_through_ase():
    rng = np.random.default_rng(0)
    stress = rng.normal(size=(3, 3))
    labelled = crystal()
    labelled.energy, labelled.forces, labelled.stress = -3.5, rng.normal(size=(2, 3)), stress + stress.T
    labelled.scalars = {"gap": 1.25}
    back = convert.from_object(convert.to_ase(labelled))
    assert back.energy == labelled.energy
    assert np.array_equal(back.forces, labelled.forces)
    assert np.array_equal(back.stress, labelled.stress)
    assert back.scalars == {"gap": 1.25}


def test_results_of_another_geometry_are_not_labels():
    atoms = convert.to_ase(molecule(energy=-1.0))
    assert convert.from_object(atoms).energy == -1.0
    atoms.positions[0] += 0.1
    assert convert.from_object(atoms).energy is None


def test_formal_charges_and_radicals_of_rdkit_count():
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles("C[NH3+]"))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    fields = to_fields(mol)
    assert (fields["charge"], fields["spin"], fields["domain"]) == (1, 1, "molecule")
    radical = Chem.AddHs(Chem.MolFromSmiles("[CH3]"))
    AllChem.EmbedMolecule(radical, randomSeed=1)
    assert to_fields(radical)["spin"] == 2


def test_what_cannot_be_converted_is_refused_with_a_remedy():
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal
    from rdkit import Chem
    from rdkit.Chem import AllChem

    with pytest.raises(ValueError, match="EmbedMolecule"):
        to_fields(Chem.MolFromSmiles("CCO"))
    flat = Chem.MolFromSmiles("CCCCO")
    AllChem.Compute2DCoords(flat)
    with pytest.raises(ValueError, match="2-D"):
        to_fields(flat)
    with pytest.raises(ValueError, match="partial occupancy"):
        to_fields(Crystal(Lattice.cubic(3.0), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]))
    with pytest.raises(TypeError, match=r"ase\.Atoms"):
        to_fields(object())
    with pytest.raises(InputError, match="all_atom"):
        convert.to_ase(read_one(FILES / "peptide.pdb"))
    with pytest.raises(InputError, match="periodic"):
        convert.to_rdkit(crystal())


def test_a_model_stack_is_refused():
    import biotite.structure as struc

    stack = struc.stack([convert.to_biotite(molecule())] * 2)
    with pytest.raises(ValueError, match=r"stack\[0\]"):
        to_fields(stack)


def test_to_fields_has_the_same_keys_for_every_kind_of_object():
    keys = {"node_type", "positions", "node_vectors", "cell", "pbc", "charge", "spin", "domain", "role"}
    for library in ("ase", "rdkit", "pymatgen", "pyg", "biotite"):
        assert set(to_fields(getattr(convert, f"to_{library}")(molecule()))) == keys
    assert set(to_fields(molecule())) == keys


def residue(number: int, name: str, shift: float, hetero: bool = False, atoms: int = 4) -> list[tuple]:
    names = ("N", "CA", "C", "O")[:atoms]
    return [(BACKBONE[k] + [shift, 0, 0], 6, names[k], name, "A", number, "", hetero) for k in range(atoms)]


def nodes(rows: list[tuple], **options) -> dict:
    return nodes_from_atoms(*map(list, zip(*rows, strict=True)), **options)


def test_the_ideal_cb_stands_where_chemistry_puts_it():
    n, ca, c, _ = BACKBONE
    cb = virtual_cb(n, ca, c)
    assert np.linalg.norm(cb - ca) == pytest.approx(1.53, abs=0.03)
    angle = np.degrees(np.arccos((cb - ca) @ (c - ca) / np.linalg.norm(cb - ca) / np.linalg.norm(c - ca)))
    assert angle == pytest.approx(110, abs=2)


def test_the_offsets_of_a_residue_do_not_tell_its_type():
    alanine, glycine = nodes(residue(1, "ALA", 0.0)), nodes(residue(1, "GLY", 0.0))
    assert np.array_equal(alanine["node_vectors"], glycine["node_vectors"])
    assert alanine["node_type"] != glycine["node_type"]
    assert np.abs(alanine["node_vectors"][0, :3] - BACKBONE[[0, 2, 3]]).max() < 1e-12


def test_incomplete_residues_are_dropped_and_a_missing_oxygen_is_zero():
    fields = nodes(residue(1, "ALA", 0.0, atoms=3) + residue(2, "SER", 9.0, atoms=2) + residue(3, "THR", 18.0))
    assert fields["node_type"].tolist() == [RESIDUE_ID["ALA"], RESIDUE_ID["THR"]]
    assert not fields["node_vectors"][0, 2].any()
    assert fields["domain"] == "protein"


def test_selenomethionine_is_methionine_and_other_modified_residues_are_unknown():
    rows = residue(1, "ALA", 0.0) + residue(2, "MSE", 2.8, hetero=True) + residue(3, "SEP", 5.6, hetero=True)
    assert nodes(rows)["node_type"].tolist() == [RESIDUE_ID["ALA"], RESIDUE_ID["MET"], RESIDUE_ID["UNK"]]


def test_a_free_amino_acid_is_a_ligand_and_water_is_dropped():
    water = [(np.array([30.0, 0, 0]), 8, "O", "HOH", "A", 9, "", True)]
    rows = residue(1, "ALA", 0.0) + residue(5, "GLU", 20.0, hetero=True) + water
    fields = nodes(rows)
    assert fields["domain"] == "complex"
    assert fields["role"].tolist() == [ROLE_ID["protein"]] + 4 * [ROLE_ID["ligand"]]
    atoms = nodes(rows, residues=False)
    assert len(atoms["node_type"]) == 9
    assert atoms["role"][-1] == ROLE_ID["solvent"]
    assert atoms["node_vectors"] is None


def test_insertion_codes_and_negative_numbers_keep_residues_apart():
    rows = residue(-1, "ALA", 0.0) + residue(52, "ALA", 10.0)
    rows += [(*row[:6], "A", row[7]) for row in residue(52, "ALA", 20.0)]
    fields = nodes(rows)
    assert fields["residue_index"].tolist() == [-1, 52, 52]
    biotite = convert.to_biotite(Structure(**fields))
    assert len(convert.from_object(biotite, residues=True).node_type) == 3


def test_the_file_that_travels_to_the_hub_imports_only_numpy_and_the_vocabulary():
    tree = ast.parse(Path(conversion_moiety.__file__).read_text())
    imported = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {"." * n.level + (n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    standard = {"__future__", "collections.abc", "pathlib", "typing"}
    assert imported - standard == {"numpy", ".vocabulary_moiety", "ase.io"}  # ase only when a path is given


def test_a_path_is_read_by_ase_where_moiety_is_absent():
    assert to_fields(conversion_moiety._read_with_ase(FILES / "water.xyz"))["node_type"].tolist() == [8, 1, 1]
    with pytest.raises(ValueError, match="holds 2 structures"):
        conversion_moiety._read_with_ase(FILES / "good.extxyz")
