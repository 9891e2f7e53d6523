"""Large corpora in miniature: each written here with its own library and layout, read by its own recipe."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sqlite3
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import h5py
import lmdb
import msgpack
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice
from pymatgen.core import Structure as Crystal
from rdkit import Chem
from rdkit.Chem import AllChem

from moiety.data import declared, declared_texts, unit_names
from moiety.data.build import load_recipe, recipes_dir
from moiety.data.containers import records
from moiety.data.download import Archive
from moiety.data.structure import Structure
from moiety.data.validate import Verdict, check
from moiety.errors import InputError

COUNT = 20
LARGE = sorted(recipes_dir().glob("large/*.yaml"))
EXACT = {"rtol": 0, "atol": 1e-6}


def water(index: int) -> np.ndarray:
    """[3, 3] Å, O H H, a little different each."""
    base = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
    return base + np.random.default_rng(index).normal(scale=0.02, size=(3, 3))


def read(name: str, *paths: Path) -> list[Any]:
    """What a recipe makes of files, by their names."""
    recipe = load_recipe(name)
    archives = {path.name: Archive(path, recipe.sources[0], "1", "") for path in paths}
    parts = declared.parts(recipe, archives, {})
    return [found for part in parts for found in declared.structures(recipe, archives, {}, part)]


def good(found: list[Any], count: int = COUNT) -> list[Structure]:
    assert [item.reason for item in found if isinstance(item, Verdict)] == []
    assert len(found) == len({item.id for item in found}) == count
    assert [check(item) for item in found] == [None] * count
    assert {item.groups["split"] for item in found} <= {"train", "val", "test"}
    return found


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_every_recipe_reads_and_names_its_licence_and_traps(path: Path):
    recipe = load_recipe(path)
    (declared_texts if recipe.is_text else declared).check(recipe)
    assert recipe.licence and recipe.citation and recipe.traps and recipe.name == path.stem


def test_there_are_recipes_of_at_least_20_large_corpora():
    assert len(LARGE) >= 20


def test_spice_is_in_bohr_and_hartree_and_its_gradients_are_not_forces(tmp_path: Path):
    energy, gradient = np.linspace(-76.5, -76.4, COUNT), np.random.default_rng(0).normal(size=(COUNT, 3, 3))
    with h5py.File(tmp_path / "SPICE.hdf5", "w") as file:
        group = file.create_group("water")
        group["atomic_numbers"] = np.array([8, 1, 1], dtype=np.int16)
        group["conformations"] = np.stack([water(i) for i in range(COUNT)]) / units.Bohr
        group["dft_total_energy"], group["dft_total_gradient"] = energy, gradient
        group["smiles"] = ["[O:1]([H:2])[H:3]"]
    for index, found in enumerate(good(read("spice2", tmp_path / "SPICE.hdf5"))):
        np.testing.assert_allclose(found.positions, water(index), **EXACT)
        assert found.energy == pytest.approx(energy[index] * 27.211386, abs=1e-4)
        np.testing.assert_allclose(found.forces, -gradient[index] * 51.422067, rtol=1e-6)
        assert found.theory == "wB97M-D3BJ/def2-TZVPPD"


def test_labels_that_ani1x_lacks_are_left_out(tmp_path: Path):
    with h5py.File(tmp_path / "ani.h5", "w") as file:
        group = file.create_group("H2O")
        group["atomic_numbers"] = np.array([8, 1, 1])
        group["coordinates"] = np.stack([water(i) for i in range(COUNT)])
        group["wb97x_dz.energy"] = np.where(np.arange(COUNT) % 2, np.nan, -76.0)
        group["wb97x_dz.forces"] = np.ones((COUNT, 3, 3))
    found = good(read("ani1x", tmp_path / "ani.h5"))
    assert sum(item.energy is None for item in found) == COUNT // 2
    np.testing.assert_allclose(found[0].forces, units.Hartree)  # hartree/Å: coordinates are not in bohr


def test_transition_states_and_paths_are_read_once(tmp_path: Path):
    with h5py.File(tmp_path / "t1x.h5", "w") as file:
        reaction = file.create_group("data/H2O/rxn1")
        for group, count in ((reaction, COUNT - 1), (reaction.create_group("transition_state"), 1)):
            group["atomic_numbers"] = np.array([8, 1, 1])
            group["positions"] = np.stack([water(i) for i in range(count)])
            group["wB97x_6-31G(d).energy"], group["wB97x_6-31G(d).forces"] = np.ones(count), np.ones((count, 3, 3))
        file["train/rxn1"] = h5py.SoftLink("/data/H2O/rxn1")
    assert good(read("transition1x", tmp_path / "t1x.h5"))[0].energy == 1.0


def test_rmd17_is_in_kcal_per_mol(tmp_path: Path):
    frames = np.stack([water(i) for i in range(COUNT)])
    energies, forces = np.linspace(-1, 1, COUNT), np.ones((COUNT, 3, 3))
    np.savez(tmp_path / "rmd17_water.npz", nuclear_charges=[8, 1, 1], coords=frames, energies=energies, forces=forces)
    found = good(read("rmd17", tmp_path / "rmd17_water.npz", *every_frame(tmp_path)))
    np.testing.assert_allclose([item.positions for item in found], frames, **EXACT)
    np.testing.assert_allclose([item.energy for item in found], energies * 0.0433641, rtol=1e-5)
    with tarfile.open(tmp_path / "rmd17.tar.bz2", "w:bz2") as tar:
        tar.add(tmp_path / "rmd17_water.npz", "rmd17/npz_data/rmd17_water.npz")
        tar.add(tmp_path / "rmd17_water.npz", "rmd17/splits/other.npz")
    good(read("rmd17", tmp_path / "rmd17.tar.bz2", *every_frame(tmp_path)))


def every_frame(folder: Path) -> list[Path]:
    """The lists of a split that leaves no frame out."""
    lists = {"train": range(10), "test": range(10, COUNT)}
    paths = {folder / f"index_{split}_01.csv": numbers for split, numbers in lists.items()}
    return [path for path, numbers in paths.items() if path.write_text("\n".join(map(str, numbers)))]


@contextmanager
def database_of(path: Path, kind: str) -> Iterator[Any]:
    """A database of ASE, closed at the end: LMDB opens a file once."""
    database: Any = ase.db.connect(path, type=kind)
    with database:
        yield database
    if hasattr(database, "close"):
        database.close()


def crystals() -> list[ase.Atoms]:
    made = []
    for index in range(COUNT):
        atoms = ase.Atoms("NaCl", [[0, 0, 0], [2.8, 0.1, 0]], cell=np.eye(3) * (5.6 + 0.01 * index), pbc=True)
        labels = {"energy": -7.0 - index, "forces": np.full((2, 3), 0.1 * index), "stress": np.arange(6) / 100.0}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        made.append(atoms)
    return made


def assert_crystals(found: list[Structure]) -> None:
    for atoms, item in zip(crystals(), found, strict=True):
        np.testing.assert_allclose(item.positions, atoms.positions, **EXACT)
        np.testing.assert_allclose(item.cell, atoms.cell, **EXACT)
        assert item.energy == pytest.approx(atoms.get_potential_energy()) and item.pbc.all()
        np.testing.assert_allclose(item.forces, atoms.get_forces())


def test_rows_of_a_real_aselmdb_and_sids_that_repeat(tmp_path: Path):
    with database_of(tmp_path / "omat24.aselmdb", "aselmdb") as database:
        for atoms in crystals():
            database.write(atoms, data={"sid": "the same"})
    found = good(read("omat24", tmp_path / "omat24.aselmdb"))
    found.sort(key=lambda item: int(item.id.split("/")[-1]))
    assert_crystals(found)
    # Voigt: xx yy zz yz xz xy
    np.testing.assert_allclose(found[0].stress * 100, [[0, 5, 4], [5, 1, 3], [4, 3, 2]])


def test_molecules_of_omol_keep_their_charge_and_spin(tmp_path: Path):
    with database_of(tmp_path / "omol25.aselmdb", "aselmdb") as database:
        for index in range(COUNT):
            atoms = ase.Atoms("OH2", water(index))
            atoms.calc = SinglePointCalculator(atoms, energy=-2079.0, forces=np.zeros((3, 3)))
            database.write(atoms, data={"charge": 1, "spin": 2})
    found = good(read("omol25", tmp_path / "omol25.aselmdb"))
    assert {(item.charge, item.spin, item.cell is None) for item in found} == {(1, 2, True)}


def test_rows_of_ases_sqlite(tmp_path: Path):
    with database_of(tmp_path / "rows.db", "db") as database:
        for atoms in crystals():
            database.write(atoms, data={"sid": "s"}, extra=1)
    rows = [row for _, row in records(tmp_path / "rows.db", "ase_sqlite")]
    assert len(rows) == COUNT and rows[0]["data"]["sid"] == "s" and rows[0]["key_value_pairs"]["extra"] == 1
    np.testing.assert_allclose([row["positions"] for row in rows], [atoms.positions for atoms in crystals()], **EXACT)


def test_qh9_keeps_arrays_as_bytes(tmp_path: Path):
    with sqlite3.connect(tmp_path / "QH9Stable.db") as database:
        database.execute("CREATE TABLE data (id INTEGER, N INTEGER, Z BLOB, pos BLOB, Ham BLOB)")
        for index in range(COUNT):
            numbers = np.array([8, 1, 1], dtype=np.int32).tobytes()
            database.execute(
                "INSERT INTO data VALUES (?,?,?,?,?)", (index, 3, numbers, water(index).tobytes(), bytes(800))
            )
    database.close()
    found = good(read("qh9", tmp_path / "QH9Stable.db"))
    np.testing.assert_allclose([item.positions for item in found], [water(i) for i in range(COUNT)], **EXACT)


def salt(index: int) -> Crystal:
    return Crystal(Lattice.cubic(5.6 + 0.01 * index), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.02, 0]])


def test_mptrj_has_kbar_with_the_opposite_sign(tmp_path: Path):
    stress = np.arange(9.0).reshape(3, 3)
    frame = {"uncorrected_total_energy": -7.5, "force": [[0.1, 0, 0], [-0.1, 0, 0]], "stress": stress.tolist()}
    content = {
        f"mp-{i}": {f"mp-{i}-0-{k}": {**frame, "mp_id": f"mp-{i}", "structure": salt(i).as_dict()} for k in range(2)}
        for i in range(COUNT // 2)
    }
    (tmp_path / "MPtrj.json").write_text(json.dumps(content))
    found = good(read("mptrj", tmp_path / "MPtrj.json"))
    np.testing.assert_allclose(found[0].stress, -stress * units.GPa / 10)
    np.testing.assert_allclose(found[0].positions, salt(0).cart_coords, **EXACT)
    splits = {(item.groups["material"], item.groups["split"]) for item in found}
    assert len(splits) == COUNT // 2  # the frames of a material stay together


def test_alexandria_and_matbench_and_jarvis(tmp_path: Path):
    entries = [{"structure": salt(i).as_dict(), "energy": -7.0, "data": {"mat_id": f"agm{i}"}} for i in range(COUNT)]
    path = tmp_path / "alexandria_000.json.bz2"
    path.write_bytes(bz2.compress(json.dumps({"entries": entries}).encode()))
    assert good(read("alexandria", path))[3].id == "alexandria_000.json.bz2/agm3"
    rows = {"index": list(range(COUNT)), "data": [[salt(i).as_dict(), 0.1 * i] for i in range(COUNT)]}
    path = tmp_path / "matbench.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert good(read("matbench", path))[2].scalars["e_form"] == pytest.approx(0.2)
    atoms = {"lattice_mat": np.eye(3).tolist(), "coords": [[0, 0, 0], [0.5, 0.5, 0.5]], "cartesian": False}
    items = [
        {"jid": f"JVASP-{i}", "formation_energy_peratom": -1.0, "optb88vdw_bandgap": "na" if i == 1 else 2.0}
        | {"atoms": atoms | {"elements": ["Na", "Cl"], "lattice_mat": (np.eye(3) * 4).tolist()}}
        for i in range(COUNT + 1)
    ]
    (tmp_path / "jdft_3d.json").write_text(json.dumps(items))
    found = good(read("jarvis", tmp_path / "jdft_3d.json"), COUNT + 1)
    assert set(found[1].scalars) == {"formation_energy_peratom"}  # na is a label that is not there
    np.testing.assert_allclose(found[0].positions[1], [2, 2, 2], **EXACT)


def test_residues_of_cath_without_coordinates_leave_a_gap(tmp_path: Path):
    names = [f"1abc.{i}" for i in range(COUNT)]
    lines = []
    for name in names:
        ca = np.arange(6)[:, None] * [3.8, 0, 0]
        offsets = {"CA": [0, 0, 0], "N": [-1.2, -0.8, 0], "C": [1.2, 0.9, 0], "O": [1.2, 2.1, 0]}
        coords = {atom: (ca + np.array(offset)).tolist() for atom, offset in offsets.items()}
        coords["N"][2] = [float("nan")] * 3
        lines.append(json.dumps({"name": name, "seq": "ACDEFG", "coords": coords}))
    (tmp_path / "chain_set.jsonl").write_text("\n".join(lines))
    lists = {"train": names[:15], "validation": names[15:18], "test": names[18:], "cath_nodes": {}}
    (tmp_path / "chain_set_splits.json").write_text(json.dumps(lists))
    found = good(read("cath", tmp_path / "chain_set.jsonl", tmp_path / "chain_set_splits.json"))
    assert found[0].residue_index.tolist() == [1, 2, 4, 5, 6] and found[0].is_residue.all()
    assert [item.groups["split"] for item in found].count("val") == 3


def test_geom_packs_conformers_by_smiles(tmp_path: Path):
    with (tmp_path / "drugs.msgpack").open("wb") as file:
        for batch in range(2):
            xyz = [[[z, *p] for z, p in zip((8, 1, 1), water(i).tolist(), strict=True)] for i in range(5)]
            conformers = [{"xyz": rows, "totalenergy": -5.07, "boltzmannweight": 0.2} for rows in xyz]
            msgpack.pack({f"O{batch}{k}": {"totalconfs": 5, "conformers": conformers} for k in range(2)}, file)
    found = good(read("geom", tmp_path / "drugs.msgpack"))
    np.testing.assert_allclose(found[3].positions, water(3), **EXACT)
    assert found[0].energy == pytest.approx(-5.07 * units.Hartree)
    assert len({(item.text[0], item.groups["split"]) for item in found}) == 4


def test_qm9_prints_exponents_its_own_way(tmp_path: Path):
    with tarfile.open(tmp_path / "dsgdb9nsd.xyz.tar.bz2", "w:bz2") as tar:
        for index in range(COUNT):
            rows = [
                f"{s}\t" + "\t".join(f"{v:.10f}" for v in p) + "\t1.5*^-6"
                for s, p in zip("OHH", water(index), strict=True)
            ]
            values = "\t".join(["1.0"] * 5 + ["-0.29", "0.06", "0.36", "19.0", "0.021", "-76.4"] + ["1.0"] * 4)
            lines = ["3", f"gdb {index}\t{values}", *rows, "1.0\t2.0\t3.0", "O\tO", "InChI=1S\tInChI=1S"]
            path = tmp_path / f"dsgdb9nsd_{index:06d}.xyz"
            path.write_text("\n".join(lines))
            tar.add(path, path.name)
    found = good(read("qm9_xyz", tmp_path / "dsgdb9nsd.xyz.tar.bz2"))
    np.testing.assert_allclose([item.positions for item in found], [water(i) for i in range(COUNT)], **EXACT)
    np.testing.assert_allclose(found[0].node_scalars["mulliken"], 1.5e-6)
    assert found[0].scalars["gap"] == pytest.approx(0.36 * units.Hartree)


def test_structure_files_in_archives(tmp_path: Path):
    molecule = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    with Chem.SDWriter(str(tmp_path / "m.sdf")) as writer:
        for _ in range(COUNT):
            writer.write(molecule)
    with tarfile.open(tmp_path / "pcqm.sdf.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "m.sdf", "m.sdf")
    rows = b"".join(b"%d,CCO,5\n" % i for i in range(COUNT))
    (tmp_path / "data.csv.gz").write_bytes(gzip.compress(b"idx,smiles,homolumogap\n" + rows))
    found = good(read("pcqm4mv2", tmp_path / "pcqm.sdf.tar.gz", tmp_path / "data.csv.gz"))
    np.testing.assert_allclose(found[0].positions, molecule.GetConformer().GetPositions(), rtol=0, atol=1e-4)
    ase.io.write(tmp_path / "0.extxyz", crystals())
    (tmp_path / "0.extxyz.xz").write_bytes(lzma.compress((tmp_path / "0.extxyz").read_bytes()))
    (tmp_path / "0.txt.xz").write_bytes(lzma.compress(b"".join(b"random%d,frame0,-1.0\n" % i for i in range(COUNT))))
    with tarfile.open(tmp_path / "s2ef.tar", "w") as tar:
        tar.add(tmp_path / "0.extxyz.xz", "s2ef/0.extxyz.xz")
        tar.add(tmp_path / "0.txt.xz", "s2ef/0.txt.xz")
    assert_crystals(good(read("oc20_s2ef", tmp_path / "s2ef.tar")))


def test_fields_on_a_mesh_become_points_with_velocities(tmp_path: Path):
    with h5py.File(tmp_path / "2D_CFD.hdf5", "w") as file:
        file["x-coordinate"] = file["y-coordinate"] = np.arange(16.0)
        for name in ("Vx", "Vy", "density", "pressure"):
            file[name] = np.random.default_rng(ord(name[1])).normal(size=(4, 21, 16, 16))
    vx = np.random.default_rng(ord("x")).normal(size=(4, 21, 16, 16))[0, 5]
    found = good(read("pdebench", tmp_path / "2D_CFD.hdf5"), count=20)
    assert found[1].num_nodes == 16 and found[1].node_tensors["velocity"].shape == (16, 3)
    np.testing.assert_allclose(found[1].node_tensors["velocity"][:, 0], vx[::4, ::4].reshape(-1))


def test_parquet_csv_and_fasta_rows(tmp_path: Path):
    table = pyarrow.table({"z": [[8, 1, 1]] * COUNT, "r": [water(i).tolist() for i in range(COUNT)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in records(tmp_path / "a.parquet", "parquet", {"columns": ["z", "r"]})]
    np.testing.assert_allclose([row["r"] for row in rows], [water(i) for i in range(COUNT)], **EXACT)
    lines = ["mutant,DMS_score", *(f"A{i}C,{0.1 * i}" for i in range(COUNT)), '"=cmd|calc!A1",1', "short"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    cells = [row for _, row in records(tmp_path / "a.csv", "csv")]
    assert cells[-2]["mutant"] == "=cmd|calc!A1" and cells[-1].code == "wrong-counts" and len(cells) == COUNT + 2
    (tmp_path / "a.fasta").write_text("".join(f">U{i} name\nACDEF\nGHIK\n" for i in range(COUNT)) + ">bad\n<script>\n")
    found = list(records(tmp_path / "a.fasta", "fasta"))
    assert found[3] == ("U3", {"header": "U3 name", "sequence": "ACDEFGHIK"}) and found[-1][1].code == "unreadable"


def test_units_of_different_things_are_not_converted():
    assert unit_names.factor("kbar", "GPa") == pytest.approx(0.1)
    assert unit_names.factor("cal/(mol K)", "kJ/(mol K)") == pytest.approx(4.184e-3)
    with pytest.raises(InputError, match="did you mean 'hartree'"):
        unit_names.parse("hartre")
    with pytest.raises(InputError, match="different things"):
        unit_names.factor("hartree/bohr", "eV")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reader": {"container": "hdf6"}}, "unknown key 'hdf6'; did you mean 'hdf5'"),
        ({"reader": {"container": "jsonl", "feilds": {}}}, "did you mean 'fields'"),
        ({"reader": {"container": "jsonl", "fields": {"energy": {"from": "e", "unti": "eV"}}}}, "did you mean 'unit'"),
        ({"reader": {"container": "jsonl", "fields": {"energy": {"from": "e", "unit": "ev"}}}}, "did you mean 'eV'"),
        ({"splits": {"by": "chance"}}, "splits is a mapping"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_the_nearest(tmp_path: Path, change: dict[str, Any], message: str):
    content = yaml.safe_load((recipes_dir() / "large" / "cath.yaml").read_text()) | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        declared.check(load_recipe(tmp_path / "mine.yaml"))


def test_a_tag_in_a_recipe_runs_nothing(tmp_path: Path):
    canary = tmp_path / "canary"
    (tmp_path / "mine.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(InputError, match="not YAML"):
        load_recipe(tmp_path / "mine.yaml")
    assert not canary.exists()


def test_a_record_without_a_field_is_a_verdict(tmp_path: Path):
    np.savez(tmp_path / "a.npz", nuclear_charges=[8, 1], coords=np.ones((2, 2, 3)), energies=[1, 2], forces=[1, 2])
    assert {item.code for item in read("rmd17", tmp_path / "a.npz", *every_frame(tmp_path))} == {"wrong-shape"}
    (tmp_path / "chain_set.jsonl").write_text('{"name": "x"}\nnot json\n' + "[" * 100_000 + "\n")
    (tmp_path / "chain_set_splits.json").write_text('{"train": ["x"], "validation": [], "test": []}')
    found = read("cath", tmp_path / "chain_set.jsonl", tmp_path / "chain_set_splits.json")
    assert [item.code for item in found] == ["missing-field", "unreadable", "unreadable"]


def malicious_hdf5(path: Path, kind: str) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("m")
        group["atomic_numbers"] = [8]
        if kind == "link":
            group["conformations"] = h5py.ExternalLink("/etc/passwd", "/")
        elif kind == "external":
            storage = [("/etc/passwd", 0, 24)]
            group.create_dataset("conformations", (1, 1, 3), "<f8", external=storage)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((1, 1, 3), "<f8")
            layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (1, 1, 3))
            group.create_virtual_dataset("conformations", layout)
        else:
            group.create_dataset("conformations", (1, 1 << 40, 3), "<f8", chunks=(1, 1024, 3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("link", "another file"), ("external", "another file"), ("virtual", "other files"), ("huge", "declares")],
)
def test_hdf5_that_reaches_out_of_its_file_is_refused(tmp_path: Path, kind: str, message: str):
    malicious_hdf5(tmp_path / "a.h5", kind)
    with pytest.raises(InputError, match=message):
        list(records(tmp_path / "a.h5", "hdf5", {"layout": "conformers", "conformers": "conformations"}))


def test_npz_of_objects_and_of_lies_is_refused(tmp_path: Path):
    options = {"layout": "frames", "per_frame": ["x"]}
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="never loaded"):
        list(records(tmp_path / "a.npz", "npz", options))
    np.savez(tmp_path / "b.npz", x=np.zeros(4))
    content = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(content[:200])
    with pytest.raises(InputError):
        list(records(tmp_path / "c.npz", "npz", options))


def test_sqlite_runs_no_view_no_computed_column_and_loads_no_extension(tmp_path: Path):
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE t (id INTEGER, x TEXT)")
        database.execute("CREATE VIEW v AS SELECT id, load_extension('/tmp/evil.so') AS x FROM t")
        database.execute("CREATE TABLE g (id INTEGER, x TEXT GENERATED ALWAYS AS (upper('a')) VIRTUAL)")
    database.close()
    for table, message in (("v", "a view"), ("g", "computed columns"), ("w", "holds no table 'w'")):
        with pytest.raises(InputError, match=message):
            list(records(tmp_path / "a.db", "sqlite", {"table": table, "key": "id", "columns": ["x"]}))
    with pytest.raises(InputError, match="has no column 'y'"):
        list(records(tmp_path / "a.db", "sqlite", {"table": "t", "key": "id", "columns": ["y"]}))


def test_bombs_of_json_and_msgpack_are_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text("[" * 1_000_000)
    with pytest.raises(InputError, match="nested deeper"):
        list(records(tmp_path / "a.json", "json", {"prefix": "item"}))
    (tmp_path / "b.json").write_text('["a[[[[", "\\"[[[[", {"x": [1]}]')
    assert len(list(records(tmp_path / "b.json", "json", {"prefix": "item"}))) == 3
    for content in (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff"):
        (tmp_path / "a.msgpack").write_bytes(content)
        with pytest.raises(InputError, match="msgpack"):
            list(records(tmp_path / "a.msgpack", "msgpack"))


def test_lmdb_values_that_are_not_rows(tmp_path: Path):
    environment = lmdb.open(str(tmp_path / "a.aselmdb"), subdir=False)
    bomb = zlib.compress(b"[" * 100_000)
    evil = zlib.compress(b'{"numbers": {"__ndarray__": [[1], "object", ["x"]]}}')
    with environment.begin(write=True) as transaction:
        for index, value in enumerate((b"not compressed", bomb, evil, zlib.compress(b"[1]"))):
            transaction.put(str(index).encode(), value)
    environment.close()
    assert [row.code for _, row in records(tmp_path / "a.aselmdb", "aselmdb")] == ["unreadable"] * 4
    environment = lmdb.open(str(tmp_path / "b.aselmdb"), subdir=False)
    with environment.begin(write=True) as transaction:
        transaction.put(b"0", b"\x80\x04.")
    environment.close()
    with pytest.raises(InputError, match="its container is `pickled`"):
        list(records(tmp_path / "b.aselmdb", "aselmdb"))


@pytest.mark.parametrize("container", ["hdf5", "npz", "aselmdb", "ase_sqlite", "parquet", "json", "fasta", "csv"])
def test_garbage_is_named_and_never_crashes(tmp_path: Path, container: str):
    options = {
        "hdf5": {"layout": "conformers", "conformers": "x"},
        "npz": {"layout": "frames", "per_frame": ["x"]},
        "parquet": {"columns": ["x"]},
    }
    (tmp_path / "garbage").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InputError):
        list(records(tmp_path / "garbage", container, options.get(container, {})))
