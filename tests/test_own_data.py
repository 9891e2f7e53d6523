"""Own data, in whatever form it comes, becomes a split corpus, a plan, and an adapter that beats what needs none."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write

from moiety import cli
from moiety.adapters.finetune import interval
from moiety.adapters.own import choose_tasks, finetune_own
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.convert import to_ase
from moiety.data.own import assign_splits, read_own
from moiety.data.shards import Corpus
from moiety.data.splits import SPLITS
from moiety.data.structure import Structure
from moiety.errors import InputError

SAMPLES = Path(__file__).parent / "data/corpora"
SMILES = ["C" * n + tail for n in range(1, 9) for tail in ("O", "N", "C(=O)O", "c1ccccc1", "Cl")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules as SMILES, with two bad rows; `size` grows with the molecule, `bend` does not."""
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "SMILES", "size [bohr^3]", "bend (eV)"])
        for number, smiles in enumerate(SMILES):
            rows.writerow([f"m{number}", smiles, 10.0 * len(smiles), 5 + 0.1 * (-1) ** number])
        rows.writerow(["bad", "C1CC", 1, 1])
        rows.writerow(["open", "CCCCCC=C", "", 5.0])
    return path


def own_xyz(path: Path, energy: str = "energy", forces: str = "forces") -> Path:
    frames = []
    for structure in Corpus.open(SAMPLES / "forces", split="train"):
        atoms = to_ase(structure)
        if energy != "energy":
            atoms.calc = None
            atoms.info[energy], atoms.arrays[forces] = structure.energy, structure.forces
        frames.append(atoms)
    write(path, frames)
    return path


def test_smiles_become_molecules_split_by_scaffold(table: Path):
    own = read_own(table)
    rejected = [verdict for verdict in own.verdicts if not verdict.ok]
    assert [(verdict.index, verdict.code) for verdict in rejected] == [(len(SMILES), "unreadable")]
    assert own.split_by == "scaffold" and "RDKit" in own.origin
    assert own.units == {"size": "bohr^3", "bend": "eV"}
    rings = {s.groups["split"] for s in own.structures if "c1" in s.groups["smiles"]}
    assert len(rings) == 1, "one scaffold, one split"
    assert "size" not in own.structures[-1].scalars and own.structures[-1].scalars["bend"] == 5.0
    again = read_own(table)
    for one, two in zip(own.structures, again.structures, strict=True):
        assert np.array_equal(one.positions, two.positions) and one.groups == two.groups


def test_what_grows_with_the_molecule_is_learned_as_a_sum(table: Path):
    own = read_own(table)
    (size,), (bend,) = (choose_tasks(own, name, "", "", "mine.csv") for name in ("size", "bend"))
    assert (size.kind, size.unit, bend.kind, bend.unit) == ("sum", "bohr^3", "mean", "eV")


def test_what_the_elements_average_to_is_learned_above_their_average(table: Path):
    own = read_own(table)
    rng = np.random.default_rng(0)
    for s in own.structures:
        s.scalars["mass"] = float(np.sqrt(s.node_type).mean() + 0.01 * rng.standard_normal())
    (task,) = choose_tasks(own, "mass", "", "", "mine.csv")
    assert task.kind == "average"


def test_a_label_that_is_not_there_is_named_with_the_nearest(table: Path):
    with pytest.raises(InputError, match=r"no label 'bent'; there are bend, size; did you mean 'bend'"):
        choose_tasks(read_own(table), "bent", "", "", "mine.csv")


def test_a_parquet_table_is_read_as_a_csv_is(table: Path, tmp_path: Path):
    with table.open() as file:
        rows = list(csv.DictReader(file))[:30]
    pq.write_table(pa.table({"smiles": [r["SMILES"] for r in rows], "bend": [float(r["bend (eV)"]) for r in rows]}),
                   tmp_path / "mine.parquet")  # fmt: skip
    own = read_own(tmp_path / "mine.parquet")
    assert [s.scalars["bend"] for s in own.structures] == [float(r["bend (eV)"]) for r in rows]


def test_energies_take_their_forces_along_whatever_their_names(tmp_path: Path):
    plain, named = own_xyz(tmp_path / "a.extxyz"), own_xyz(tmp_path / "b.extxyz", "REF_energy", "REF_forces")
    for path, target in ((plain, "energy"), (plain, "forces"), (named, "REF_energy")):
        own = read_own(path)
        tasks = choose_tasks(own, target, "", "", path.name)
        assert [(t.label, t.kind, t.unit) for t in tasks] == [("energy", "energy", "eV"), ("forces", "forces", "eV/Å")]
        assert all(s.energy is not None and s.forces is not None for s in own.structures)


def test_frames_of_a_trajectory_are_split_in_stretches():
    water = molecule("H2O")
    frames = [Structure(water.numbers, water.positions + 0.01 * n, id=str(n)) for n in range(200)]
    assert assign_splits(frames) == "stretches of frames in a row"
    splits = [frame.groups["split"] for frame in frames]
    assert {name: splits.count(name) for name in SPLITS} == {"train": 160, "val": 20, "test": 20}
    assert sum(here != there for here, there in pairwise(splits)) <= 8, "few frames have a neighbour in another split"


def test_crystals_are_split_by_prototype_and_scored_per_atom(tmp_path: Path):
    kinds = ("fcc", "bcc", "sc", "hcp", "diamond")
    structures = [
        Structure(a.numbers, a.positions, cell=np.array(a.cell), pbc=a.pbc, energy=-3.0 - 0.1 * n, id=str(n))
        for n, a in enumerate(bulk("Cu", kind, a=3.6 + 0.1 * step) for step in range(8) for kind in kinds)
    ]
    assert assign_splits(structures) == "stretches of frames in a row", "five prototypes are too few to hold some out"
    write(tmp_path / "c.extxyz", [to_ase(s) for s in structures])
    (task,) = choose_tasks(read_own(tmp_path / "c.extxyz"), "energy", "", "", "c")
    assert task.unit == "eV/atom"


def test_a_folder_of_files_takes_labels_from_its_table(tmp_path: Path):
    names = ["H2O", "CH4", "NH3", "CH3OH", "C2H6", "C2H4", "C2H2", "C6H6", "HCN", "CO2", "H2CO", "CH3CH2OH"] * 2
    for number, name in enumerate(names):
        write(tmp_path / f"s{number}.xyz", molecule(name))
    rows = "".join(f"s{number}.xyz,{len(name)}\n" for number, name in enumerate(names))
    (tmp_path / "labels.csv").write_text("file,value (eV)\n" + rows + "gone.xyz,3\n")
    own = read_own(tmp_path)
    assert [s.scalars["value"] for s in own.structures] == [len(name) for name in names]
    assert [verdict.code for verdict in own.verdicts if not verdict.ok] == ["no-file"]
    (tmp_path / "labels.csv").write_text("file,value (eV)\nnowhere,3\n")
    with pytest.raises(InputError, match="names of files"):
        read_own(tmp_path)


def test_bad_input_says_what_to_do(tmp_path: Path, base: Path):
    with pytest.raises(InputError, match="no such file"):
        read_own(tmp_path / "gone.csv")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="name it `smiles`"):
        read_own(tmp_path / "no.csv")
    (tmp_path / "torn.csv").write_text("smiles,b\nC\n")
    with pytest.raises(InputError, match="line 2: has other cells"):
        read_own(tmp_path / "torn.csv")
    write(tmp_path / "few.xyz", [Atoms("He"), Atoms("Ne"), Atoms("Ar")])
    with pytest.raises(InputError, match="at least 20 are needed"):
        finetune_own(tmp_path / "few.xyz", "energy", base, tmp_path / "out")


def test_one_command_trains_tests_and_draws(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a real sample; few steps, since the network was never trained. The same command again changes nothing."""
    monkeypatch.setattr("moiety.adapters.own.FEWEST", 6)
    monkeypatch.setattr("moiety.adapters.own.STEPS_AT_1000", 6)
    path, out = own_xyz(tmp_path / "mine.extxyz"), tmp_path / "out"
    words = ["finetune", "--data", str(path), "--target", "energy", "--model", str(base), "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    energy, forces = json.loads((out / "metrics.json").read_text())
    assert energy["results"]["pretrained + LoRA"] < energy["results"]["mean predictor"]
    low, high = forces["interval"]
    assert low < forces["results"]["pretrained + LoRA"] < high
    assert (out / "adapter/adapter_config.json").exists() and (out / "validation.jsonl").exists()
    assert "pretrained + LoRA" in (out / "report.html").read_text()
    with pytest.raises(SystemExit):
        cli.main(words)
    assert json.loads((out / "metrics.json").read_text())[0]["results"] == energy["results"]


def test_the_interval_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    structures = [Structure(np.array([6]), np.zeros((1, 3)), scalars={"gap": float(v)}) for v in rng.normal(size=400)]
    task = Task.fit(TaskConfig("gap", "mean"), structures)
    low, high = interval(task, np.zeros(400), task.labels(structures), np.ones(400, dtype=int))
    errors = np.abs(task.labels(structures))
    spread = 1.96 * errors.std() / 20
    assert (low, high) == pytest.approx((errors.mean() - spread, errors.mean() + spread), abs=0.02)
