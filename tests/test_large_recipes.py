"""Large corpora from a folder of the user's: splits that keep what belongs together, labels from tables beside."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import gemmi
import h5py
import lmdb
import numpy as np
import pytest
import torch
import yaml
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal
from rdkit import Chem
from rdkit.Chem import AllChem, rdMolTransforms
from torch_geometric.data import Data

from moiety.data import declared
from moiety.data.build import build, list_recipes, load_recipe
from moiety.data.containers import records
from moiety.data.download import obtain
from moiety.data.structure import Structure
from moiety.data.validate import Verdict, check
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import ROLE_ID

COUNT = 20
DOCS = Path(__file__).parent.parent / "docs"
EXACT = {"rtol": 0, "atol": 1e-6}
PDB_DIGITS = {"rtol": 0, "atol": 6e-4}  # files have three


def read(name: str | Path, folder: Path, **options: int) -> list[Any]:
    """What a recipe makes of the files it finds in a folder."""
    recipe = load_recipe(name)
    archives = {archive.key: archive for source in recipe.sources for archive in obtain(source, folder)}
    parts = declared.parts(recipe, archives, options)
    return [found for part in parts for found in declared.structures(recipe, archives, options, part)]


def good(found: list[Any], count: int = COUNT) -> list[Structure]:
    assert [item.reason for item in found if isinstance(item, Verdict)] == []
    assert len(found) == len({item.id for item in found}) == count
    assert [check(item) for item in found] == [None] * count
    return found


def splits_of(found: list[Any], group: Callable[[Structure], str]) -> dict[str, set[str]]:
    """The splits in which the structures of each group stand."""
    splits: dict[str, set[str]] = {}
    for item in found:
        splits.setdefault(group(item), set()).add(item.groups["split"])
    return splits


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def water(index: int) -> np.ndarray:
    """[3, 3] Å, O H H, a little different each."""
    base = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
    return base + np.random.default_rng(index).normal(scale=0.02, size=(3, 3))


# proteins


def alpha_carbons(index: int) -> np.ndarray:
    """[6, 3] Å, of a stretched chain."""
    return np.arange(6)[:, None] * [3.8, 0.0, 0.0] + [0.0, 0.1 * index, 0.0]


def chain(index: int) -> gemmi.Structure:
    """Six alanines."""
    found, model, residues = gemmi.Structure(), gemmi.Model(1), gemmi.Chain("A")
    for number, ca in enumerate(alpha_carbons(index)):
        residue = gemmi.Residue()
        residue.name, residue.seqid, residue.entity_type = "ALA", gemmi.SeqId(number + 1, " "), gemmi.EntityType.Polymer
        for name, offset in {"N": [-1.2, -0.8, 0], "CA": [0, 0, 0], "C": [1.2, 0.9, 0], "O": [1.2, 2.1, 0]}.items():
            atom = gemmi.Atom()
            atom.name, atom.element, atom.occ = name, gemmi.Element(name[0]), 1.0
            atom.pos = gemmi.Position(*(ca + offset))
            residue.add_atom(atom)
        residues.add_residue(residue)
    model.add_chain(residues)
    found.add_model(model)
    found.setup_entities()
    return found


def mmcif(index: int) -> bytes:
    return gzip.compress(chain(index).make_mmcif_document().as_string().encode())


def assert_chains(found: list[Structure]) -> None:
    for index, item in enumerate(found):
        assert item.is_residue.all() and item.domain == "protein"
        np.testing.assert_allclose(item.positions, alpha_carbons(index), **PDB_DIGITS)
        np.testing.assert_allclose(item.node_vectors[:, 2] - item.node_vectors[:, 1], [[0, 1.2, 0]] * 6, **PDB_DIGITS)


def test_files_of_a_pdb_mirror_are_one_part_together(tmp_path: Path):
    for index in range(COUNT):
        put(tmp_path / f"a{index // 10}" / f"1a{index:02d}.cif.gz", mmcif(index))
    recipe = load_recipe("pdb")
    archives = {archive.key: archive for archive in obtain(recipe.sources[0], tmp_path)}
    assert declared.parts(recipe, archives, {}) == [["a0/1a00.cif.gz", "a1/1a19.cif.gz"]]
    assert_chains(good(read("pdb", tmp_path)))


def test_models_of_the_alphafold_database_come_in_a_tar(tmp_path: Path):
    with tarfile.open(tmp_path / "swissprot_cif_v6.tar", "w") as tar:
        for index in range(COUNT):
            for name, content in ((f"AF-P{index}-F1-model_v6.cif.gz", mmcif(index)), (f"AF-P{index}.json.gz", b"")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert_chains(good(read("afdb", tmp_path)))


def pdbbind(folder: Path, missing: int = 2) -> Path:
    """A refined set whose index lacks its last entries; the ligand is an ammonium ion 8 Å above the chain."""
    ligand = Chem.AddHs(Chem.MolFromSmiles("[NH4+]"))
    AllChem.EmbedMolecule(ligand, randomSeed=1)
    shift = np.eye(4)
    shift[2, 3] = 8.0
    rdMolTransforms.TransformConformer(ligand.GetConformer(), shift)
    lines = ["# PDB code, resolution, release year, -logKd/Ki, Kd/Ki, reference, ligand name"]
    for index in range(COUNT):
        put(folder / f"refined-set/1a{index:02d}/1a{index:02d}_protein.pdb", chain(index).make_pdb_string())
        put(folder / f"refined-set/1a{index:02d}/1a{index:02d}_ligand.sdf", Chem.MolToMolBlock(ligand) + "$$$$\n")
        lines.append(
            f"1a{index:02d}  {'NMR ' if index == 3 else '2.20'}  2012   {2 + index / 10:.2f}  Ki=10mM  // x (LIG)"
        )
    put(folder / "refined-set/index/INDEX_refined_data.2020", "\n".join(lines[: len(lines) - missing]))
    return folder


def test_affinities_of_pdbbind_are_joined_and_missing_ones_counted(tmp_path: Path):
    found = read("pdbbind", pdbbind(tmp_path / "from"))
    labelled = [item for item in found if isinstance(item, Structure)]
    np.testing.assert_allclose([item.scalars["affinity"] for item in labelled], 2 + np.arange(18) / 10)
    assert labelled[0].groups["measured"] == "Ki=10mM" and labelled[0].groups["year"] == "2012"
    np.testing.assert_allclose(labelled[5].positions[:6], alpha_carbons(5), **PDB_DIGITS)
    assert labelled[5].node_type[6:].tolist() == [7, 1, 1, 1, 1] and labelled[5].charge == 1
    assert labelled[5].role.tolist() == [ROLE_ID["protein"]] * 6 + [ROLE_ID["ligand"]] * 5
    assert labelled[5].positions[6:].mean(axis=0)[2] == pytest.approx(8, abs=0.5) and check(labelled[5]) is None
    without = [item for item in found if isinstance(item, Verdict)]
    assert [(item.ok, item.code, item.structure.scalars) for item in without if item.structure] == [
        (True, "missing-label", {})
    ] * 2
    manifest = build("pdbbind", "full", tmp_path / "corpus", workers=1, given=tmp_path / "from")
    assert manifest["counts"] == {"in": COUNT, "ok": COUNT, "rejected": {}, "noted": {"missing-label": 2}}


# molecules


def test_gaps_of_pcqm_are_joined_by_the_place_in_the_sdf(tmp_path: Path):
    molecule = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    with Chem.SDWriter(str(tmp_path / "pcqm4m-v2-train.sdf")) as writer:
        for _ in range(COUNT):
            writer.write(molecule)
    rows = [f"{index},CCO,{5 + index / 10}" for index in reversed(range(COUNT - 1))]
    put(tmp_path / "raw/data.csv.gz", gzip.compress("\n".join(["idx,smiles,homolumogap", *rows]).encode()))
    *found, last = read("pcqm4mv2", tmp_path)
    assert [item.scalars["gap"] for item in good(found, COUNT - 1)] == [5 + index / 10 for index in range(COUNT - 1)]
    assert found[0].text == ["CCO"]
    np.testing.assert_allclose(found[0].positions, molecule.GetConformer().GetPositions(), rtol=0, atol=1e-4)
    assert isinstance(last, Verdict) and last.code == "missing-field"  # its SMILES is no optional field


def hdf5_of(path: Path, groups: dict[str, dict[str, Any]]) -> None:
    with h5py.File(path, "w") as file:
        for name, fields in groups.items():
            for key, value in fields.items():
                file[f"{name}/{key}"] = value


def waters(number: int, count: int = 4, positions: str = "positions", **fields: Any) -> dict[str, Any]:
    frames = np.stack([water(number * count + index) for index in range(count)])
    return {"atomic_numbers": np.array([8, 1, 1]), positions: frames, **fields}


def test_a_molecule_of_spice_stays_in_one_split_and_has_its_charge(tmp_path: Path):
    labels = {"dft_total_energy": np.full(4, -76.4), "dft_total_gradient": np.ones((4, 3, 3))}
    groups = {
        f"m{i}": waters(i, positions="conformations", smiles=["[OH3+]" if i else "[O:1]([H:2])[H:3]"], **labels)
        for i in range(60)
    }
    hdf5_of(tmp_path / "SPICE-2.0.1.hdf5", groups)
    found = good(read("spice2", tmp_path), 240)
    splits = splits_of(found, lambda item: item.id.split("/")[1])
    assert len(splits) == 60 and {len(names) for names in splits.values()} == {1}
    assert set.union(*splits.values()) == {"train", "val", "test"}
    assert {item.id.split("/")[1] for item in found if item.charge == 0} == {"m0"}
    assert {item.charge for item in found} == {0, 1}


def test_isomers_of_ani1x_and_reactions_of_a_formula_stay_in_one_split(tmp_path: Path):
    labels = {"wb97x_dz.energy": np.full(4, -76.4), "wb97x_dz.forces": np.ones((4, 3, 3))}
    groups = {f"C{i}H2O": waters(i, positions="coordinates", **labels) for i in range(60)}
    hdf5_of(tmp_path / "ani1x-release.h5", groups)
    splits = splits_of(good(read("ani1x", tmp_path), 240), lambda item: item.id.split("/")[1])
    assert {len(names) for names in splits.values()} == {1} and set.union(*splits.values()) == {"train", "val", "test"}
    groups = {}
    for formula in range(40):
        for reaction in ("rxn1", "rxn2"):
            for state, count in (("", 3), ("/reactant", 1), ("/product", 1), ("/transition_state", 1)):
                labels = {"wB97x_6-31G(d).energy": np.ones(count), "wB97x_6-31G(d).forces": np.ones((count, 3, 3))}
                groups[f"data/C{formula}H2/{reaction}{state}"] = waters(formula, count, **labels)
    hdf5_of(tmp_path / "Transition1x.h5", groups)
    splits = splits_of(good(read("transition1x", tmp_path), 480), lambda item: item.id.split("/")[1])
    assert {len(names) for names in splits.values()} == {1} and set.union(*splits.values()) == {"train", "val", "test"}


def test_rmd17_keeps_the_frames_of_the_first_published_split(tmp_path: Path):
    frames = np.stack([water(i) for i in range(50)])
    buffer = io.BytesIO()
    np.savez(buffer, nuclear_charges=[8, 1, 1], coords=frames, energies=np.zeros(50), forces=np.zeros((50, 3, 3)))
    members = {
        "rmd17/npz_data/rmd17_water.npz": buffer.getvalue(),
        "rmd17/splits/index_train_01.csv": "\n".join(map(str, range(0, 50, 5))).encode(),
        "rmd17/splits/index_test_01.csv": "\n".join(map(str, range(1, 50, 5))).encode(),
        "rmd17/splits/index_train_02.csv": b"2\n3\n",
    }
    with tarfile.open(tmp_path / "rmd17.tar.bz2", "w:bz2") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = read("rmd17", tmp_path)
    kept = {int(item.id.split("/")[-1]): item for item in found if isinstance(item, Structure)}
    assert {key for key, item in kept.items() if item.groups["split"] == "train"} == set(range(0, 50, 5))
    assert {key for key, item in kept.items() if item.groups["split"] == "test"} == set(range(1, 50, 5))
    np.testing.assert_allclose(kept[6].positions, frames[6], **EXACT)
    assert [item.code for item in found if isinstance(item, Verdict)] == ["not-in-split"] * 30


def test_frames_of_misato_follow_the_authors_lists_of_complexes(tmp_path: Path):
    names, energy = [f"{i}GS" for i in range(10, 30)], np.linspace(-50, -40, 100)
    frames = np.stack([water(i) for i in range(100)])
    fields = {"atoms_number": [8, 1, 1], "atoms_element": [3, 1, 1], "molecules_begin_atom_index": [0, 2]}
    fields |= {"trajectory_coordinates": frames, "frames_interaction_energy": energy}
    hdf5_of(tmp_path / "MD.hdf5", dict.fromkeys(names, fields))
    for split, part in (("train", names[:14]), ("val", names[14:17]), ("test", names[17:])):
        put(tmp_path / f"{split}_MD.txt", "\n".join(part) + "\n")
    found = good(read("misato", tmp_path), 100)
    splits = splits_of(found, lambda item: item.id.split("/")[1])
    assert [splits[name] for name in names] == [{"train"}] * 14 + [{"val"}] * 3 + [{"test"}] * 3
    assert found[1].id == "MD.hdf5/10GS/20" and found[1].domain == "complex"
    np.testing.assert_allclose(found[1].positions, frames[20], **EXACT)
    assert found[1].scalars["interaction_energy"] == pytest.approx(energy[20] * 0.0433641, rel=1e-5)


# surfaces and crystals


def slabs(count: int = COUNT) -> list[ase.Atoms]:
    """Labelled cells of two atoms, all different."""
    made = []
    for index in range(count):
        atoms = ase.Atoms("PtO", [[0, 0, 0], [1.9, 0.1, 0]], cell=np.eye(3) * (5.6 + 0.01 * index), pbc=True)
        labels = {"energy": -7.0 - index, "forces": np.full((2, 3), 0.1 * index), "stress": np.arange(6) / 100.0}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        made.append(atoms)
    return made


def test_frames_of_a_relaxation_of_oc20_stay_in_one_split_with_their_reference(tmp_path: Path):
    with tarfile.open(tmp_path / "s2ef_train_200K.tar", "w") as tar:
        for number in range(2):
            ase.io.write(tmp_path / "frames.extxyz", slabs(60))
            log = "".join(f"random{number}{i // 3:02d},frame{i % 3},{-5.0 - i}\n" for i in range(60))
            contents = {"extxyz": (tmp_path / "frames.extxyz").read_bytes(), "txt": log.encode()}
            for suffix, content in contents.items():
                name = f"s2ef_train_200K/s2ef_train_200K/{number}.{suffix}.xz"
                tar.add(put(tmp_path / "packed", lzma.compress(content)), name)
    found = good(read("oc20_s2ef", tmp_path), 120)
    splits = splits_of(found, lambda item: item.groups["system"])
    assert len(splits) == 40 and {len(names) for names in splits.values()} == {1}
    assert set.union(*splits.values()) == {"train", "val", "test"}
    for index, (atoms, item) in enumerate(zip(slabs(60), found[60:], strict=True)):
        assert item.groups["system"] == f"random1{index // 3:02d}" and item.energy == pytest.approx(-7.0 - index)
        assert item.scalars["reference_energy"] == pytest.approx(-5.0 - index)
        np.testing.assert_allclose(item.forces, atoms.get_forces())


def test_frames_of_a_relaxation_of_oc22_stay_in_one_split(tmp_path: Path):
    (tmp_path / "train").mkdir()
    environment = lmdb.open(str(tmp_path / "train" / "data.0000.lmdb"), subdir=False, map_size=1 << 26)
    rng, corners = np.random.default_rng(0), 2.0 * np.indices((2, 2, 2)).reshape(3, -1).T
    with environment.begin(write=True) as transaction:
        for index in range(120):
            fields = {"pos": corners + rng.normal(scale=0.1, size=(8, 3)), "force": np.full((8, 3), 0.01 * index)}
            fields |= {"cell": np.eye(3)[None] * (10 + index / 100), "atomic_numbers": [8, 22] * 4, "fixed": [0] * 8}
            tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in fields.items()}
            item = Data(**tensors, y=-695.0 - index, natoms=8, nads=1, sid=index // 3, fid=index % 3)
            transaction.put(f"{index}".encode(), pickle.dumps(item))
        transaction.put(b"length", pickle.dumps(120))
    environment.close()
    found = sorted(good(read("oc22", tmp_path), 120), key=lambda item: int(item.id.split("/")[-1]))
    splits = splits_of(found, lambda item: item.groups["system"])
    assert len(splits) == 40 and {len(names) for names in splits.values()} == {1}
    assert found[7].energy == -702.0 and found[7].node_type.tolist() == [8, 22] * 4 and found[7].pbc.all()
    np.testing.assert_allclose(found[7].cell, np.eye(3) * 10.07, rtol=1e-6)
    np.testing.assert_allclose(found[7].forces, 0.07, rtol=1e-6)


def aselmdb(path: Path, rows: list[ase.Atoms], **data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    database: Any = ase.db.connect(path, type="aselmdb")
    with database:
        for atoms in rows:
            database.write(atoms, data=data)
    database.close()


@pytest.mark.parametrize("name", ["oc25", "odac25", "omc25", "omat24", "omol25"])
def test_folders_of_the_authors_are_the_splits_of_an_aselmdb(tmp_path: Path, name: str):
    rows = slabs()
    aselmdb(tmp_path / "train" / "part" / "data0000.aselmdb", rows[:12], charge=0, spin=1, sid="the same")
    aselmdb(tmp_path / "val" / "part" / "data0000.aselmdb", rows[12:], charge=0, spin=1, sid="the same")
    found = sorted(good(read(name, tmp_path)), key=lambda item: -item.energy)
    assert [item.groups["split"] for item in found] == ["train"] * 12 + ["val"] * 8
    for atoms, item in zip(rows, found, strict=True):
        np.testing.assert_allclose(item.positions, atoms.positions, **EXACT)
        np.testing.assert_allclose(item.cell, atoms.cell, **EXACT)
        np.testing.assert_allclose(item.forces, atoms.get_forces())
        assert item.energy == pytest.approx(atoms.get_potential_energy()) and item.pbc.all()
        if name in ("omc25", "omat24"):
            np.testing.assert_allclose(item.stress, atoms.get_stress(voigt=False))


def test_a_compressed_crystal_has_one_stress_in_vasps_kbar_and_in_ases_order(tmp_path: Path):
    atoms = slabs(1)[0]
    stress = -np.array([[3.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 1.0]]) * units.GPa  # negative: compressed
    labels = {"energy": -1.0, "forces": np.zeros((2, 3)), "stress": full_3x3_to_voigt_6_stress(stress)}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    aselmdb(tmp_path / "omat" / "a.aselmdb", [atoms])
    crystal = Crystal(Lattice(atoms.cell.array), ["Pt", "O"], atoms.positions, coords_are_cartesian=True)
    frame = {"uncorrected_total_energy": -1.0, "force": np.zeros((2, 3)).tolist(), "mp_id": "mp-1"}
    frame |= {"structure": crystal.as_dict(), "stress": (-stress / units.GPa * 10).tolist()}
    put(tmp_path / "mptrj" / "MPtrj_2022.9_full.json", json.dumps({"mp-1": {"mp-1-0-0": frame}}))
    for name, folder in (("omat24", "omat"), ("mptrj", "mptrj")):
        (found,) = good(read(name, tmp_path / folder), 1)
        np.testing.assert_allclose(found.stress, stress, err_msg=name)


def test_the_leak_of_wbm_is_told_where_alexandria_is_chosen():
    assert any("WBM" in trap for trap in load_recipe("alexandria").traps)
    assert any("WBM" in trap for trap in load_recipe("omat24").traps)


def test_na_of_jarvis_is_a_missing_label(tmp_path: Path):
    atoms = {"lattice_mat": (np.eye(3) * 4).tolist(), "coords": [[0, 0, 0], [0.5, 0.5, 0.5]], "cartesian": False}
    items = [
        {"jid": f"JVASP-{i}", "formation_energy_peratom": -1.0, "optb88vdw_bandgap": "na" if i % 2 else 0.1 * i}
        | {"atoms": atoms | {"elements": ["Na", "Cl"]}}
        for i in range(COUNT)
    ]
    recipe = load_recipe("jarvis")
    content = yaml.safe_load(recipe.path.read_text())
    content["sources"][0]["file"] = "jdft_3d.json"
    put(tmp_path / "jarvis.yaml", yaml.safe_dump(content))
    put(tmp_path / "jdft_3d.json", json.dumps(items))
    found = good(read(tmp_path / "jarvis.yaml", tmp_path))
    assert ["optb88vdw_bandgap" in item.scalars for item in found] == [True, False] * 10
    assert found[2].scalars == {"formation_energy_peratom": -1.0, "optb88vdw_bandgap": pytest.approx(0.2)}


# recipes of this kind


def recipe_of(folder: Path, **change: Any) -> Path:
    """Waters in two JSON lines files, with a table."""
    content: dict[str, Any] = {
        "name": "mine", "title": "mine", "domain": "molecule", "licence": "CC0-1.0", "citation": "none",
        "sources": [
            {"registry": "url", "package": "w", "version": "1", "file": "*.jsonl"},
            {"registry": "url", "package": "t", "version": "1", "file": "table.csv"},
        ],
        "reader": {
            "container": "jsonl",
            "join": {"file": "table.csv", "container": "csv", "key": "name", "pattern": r"(\d+)$"},
            "fields": {
                "node_type": {"constant": [8, 1, 1]}, "positions": {"from": "r"},
                "scalars": {"gap": {"from": "joined.gap", "unit": "eV", "optional": True}},
            },
        },
        "units": {"gap": "eV"}, "splits": {"by": "hash"}, "profiles": {"full": {}},
    }  # fmt: skip
    content["reader"]["join"] |= change.pop("join", {})
    put(folder / "mine.yaml", yaml.safe_dump(content | change))
    for name in ("a", "b"):
        put(folder / f"{name}.jsonl", "\n".join(json.dumps({"r": water(i).tolist()}) for i in range(COUNT)))
    put(folder / "table.csv", "name,gap\n" + "".join(f"{i},{i / 10}\n" for i in range(COUNT)))
    return folder / "mine.yaml"


@pytest.mark.parametrize(
    ("join", "table", "message"),
    [
        ({"kye": "name"}, "", "unknown key 'kye'; did you mean 'key'"),
        ({"pattern": r"\d+$"}, "", "has no group"),
        ({"pattern": "("}, "", "no regular expression"),
        ({"container": "cvs"}, "", "did you mean 'csv'"),
        ({"file": "other.csv"}, "", "none of the sources is called other.csv"),
        ({}, "name,gpa\n1,2\n", "has no column 'gap'; it has name, gpa"),
        ({}, "name,gap\n1,2\n1,3\n", "two rows of the key '1' differ"),
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path: Path, join: dict[str, str], table: str, message: str):
    recipe = recipe_of(tmp_path, join=join)
    if table:
        put(tmp_path / "table.csv", table)
    with pytest.raises(InputError, match=message):
        read(recipe, tmp_path)


def test_a_column_without_a_table_is_a_mistake(tmp_path: Path):
    content = yaml.safe_load(recipe_of(tmp_path).read_text())
    del content["reader"]["join"]
    put(tmp_path / "mine.yaml", yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"joined\.gap is a column of a table, and the reader has no `join`"):
        declared.check(load_recipe(tmp_path / "mine.yaml"))


def test_a_limit_holds_for_all_files_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tmp_path)
    monkeypatch.setattr(declared, "PART_BYTES", 0)
    found = read(recipe, tmp_path, train=9, val=1, test=1)
    splits = [item.groups["split"] for item in found]
    assert splits.count("train") == 9 and splits.count("val") <= 1 and splits.count("test") <= 1
    assert {item.id.split("/")[0] for item in found} == {"a.jsonl", "b.jsonl"}


def test_a_changed_reader_is_a_changed_corpus(monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe("spice2")
    before = recipe.fingerprint()
    read_by = (Path(declared.__file__).parent / "containers" / "hdf5.py").read_bytes()
    assert read_by in declared.code() and Path(declared.__file__).read_bytes() in declared.code()
    monkeypatch.setattr(declared, "code", lambda: b"other")
    assert recipe.fingerprint() != before


def test_records_without_end_are_refused(tmp_path: Path):
    put(tmp_path / "a.sdf", b"x" * (17 << 20))
    with pytest.raises(InputError, match="a record of more than"):
        list(records(tmp_path / "a.sdf", "sdf"))
    put(tmp_path / "a.txt", b"x" * (2 << 20))
    with pytest.raises(InputError, match="no table"):
        list(records(tmp_path / "a.txt", "lines", {"columns": ["a"]}))
    put(tmp_path / "b.txt", "# a b\n1 2 3\n\n4\n")
    rows = [row for _, row in records(tmp_path / "b.txt", "lines", {"columns": ["a", "b"], "comment": "#"})]
    assert rows[0] == {"a": "1", "b": "2"} and rows[1].code == "wrong-counts"


def test_a_bomb_within_an_archive_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(put(tmp_path / "packed", lzma.compress(bytes(70 << 20))), "a.parquet.xz")
    with pytest.raises(InputError, match="grows more than 200 times"):
        list(records(tmp_path / "a.tar", "parquet", {"columns": ["x"]}))


def test_the_page_tells_of_every_recipe_what_was_compared_and_what_is_open():
    lines = (DOCS / "large_corpora.md").read_text().splitlines()
    rows = {cells[1]: cells[2:-1] for line in lines if len(cells := [c.strip() for c in line.split("|")]) == 10}
    for recipe in list_recipes(large=True):
        if recipe.domain == "text":
            continue  # no geometry; not in this table
        gated = "yes" if any(source.gate for source in recipe.sources) else ""
        *told, compared, unclear = rows[f"`{recipe.name}`"]
        file = recipe.sources[0].file
        assert told == [recipe.domain, recipe.reader["container"], f"`{file}`", recipe.licence, gated]
        assert bool(compared) == bool(recipe.checked) and bool(unclear) == bool(recipe.unconfirmed)
        assert all("Source: " in statement for statement in recipe.checked)
