"""Accuracy for the same compute: the arrays, the loop and the tables, on the sample corpora. No peer is needed here."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moiety.data.build import load_recipe
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.tokens.batch import collate, with_neighbors

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SAMPLES = ROOT / "tests/data/corpora"


def loaded(path: str) -> Any:
    """A script of the benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(f"of_{Path(path).stem}", BENCHMARKS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arrays")
    assert loaded("accuracy/prepare.py").main(["--corpora", str(SAMPLES), "--out", str(out)]) == 0
    return out


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """train.py with small models and batches."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = loaded("accuracy/train.py")
    monkeypatch.setattr(module, "NUM_PARAMETERS", 40_000)
    small = {name: dataclasses.replace(task, batch=8) for name, task in module.TASKS.items()}
    monkeypatch.setattr(module, "TASKS", small)
    monkeypatch.setattr(importlib.import_module("peers.models"), "TOLERANCE", 0.4)  # widths of small models are coarse
    return module


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch, arrays: Path, tmp_path: Path) -> Any:
    """accuracy.py, writing elsewhere."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = loaded("accuracy.py")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{module.tables.BEGIN}\nold\n{module.tables.END}\nafter\n")
    settings = tmp_path / "settings.json"
    settings.write_text(module.SETTINGS.read_text())
    for name, value in {"ARRAYS": arrays, "PAGE": page, "RESULTS": tmp_path / "r.json", "SETTINGS": settings}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "PEERS_PYTHON", Path(sys.executable))
    return module


def trained(script: Any, arrays: Path, out: Path, *arguments: str) -> dict[str, Any]:
    common = ["--model", "moiety-l1", "--lr", "2e-3", "--data", str(arrays), "--out", str(out)]
    assert script.main([*common, *arguments]) == 0
    return json.loads(out.read_text())


# arrays


def test_any_choice_of_molecules_has_the_edges_that_a_search_finds(arrays: Path, script: Any):
    corpus = Corpus.open(SAMPLES / "forces", "train")
    with np.load(arrays / "forces.npz") as stored:
        split = {name.partition("/")[2]: stored[name] for name in stored if name.startswith("train/")}
    chosen = [5, 0, 31]
    batch, _, forces = script.Molecules(split, "energy").batch(torch.tensor(chosen))
    expected = with_neighbors(collate([corpus[index] for index in chosen]), 5.0)
    assert torch.equal(batch.edge_index, expected.edge_index)
    assert torch.equal(batch.node_type, expected.node_type) and torch.equal(batch.graph_index, expected.graph_index)
    assert torch.equal(batch.positions, expected.positions) and batch.num_graphs == 3
    assert forces.numpy() == pytest.approx(np.concatenate([corpus[index].forces for index in chosen]), abs=1e-6)


def test_energies_are_less_the_elements_and_trivial_predictors_are_judged_on_test(arrays: Path):
    with np.load(arrays / "qm9.npz") as stored:
        energies = {split: stored[f"{split}/energy"] for split in ("train", "test")}
        gap = {split: stored[f"{split}/gap"] for split in ("train", "test")}
    u0 = [molecule.scalars["u0"] for molecule in Corpus.open(SAMPLES / "qm9", "train")]
    assert energies["train"].std() < 0.01 * np.std(u0) and abs(energies["train"].mean()) < 0.1
    baselines = json.loads((arrays / "qm9.json").read_text())["baselines"]
    assert baselines["gap"]["mean predictor"] == pytest.approx(np.abs(gap["test"] - gap["train"].mean()).mean())
    assert 0 < baselines["gap"]["linear in composition"] < baselines["gap"]["mean predictor"]


def test_missing_corpora_are_named_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert loaded("accuracy/prepare.py").main(["--corpora", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "moiety data build qm9" in capsys.readouterr().err


# the loop


@pytest.mark.parametrize(("task", "key"), [("u0", "label"), ("gap", "label"), ("forces", "forces")])
def test_the_loss_of_eight_molecules_falls_and_the_run_is_written_down(
    script: Any, arrays: Path, tmp_path: Path, task: str, key: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "shuffled", lambda *_: itertools.repeat(torch.arange(8)))
    run = trained(script, arrays, tmp_path / "run.json", "--task", task, "--passes", "320", "--points", "4")
    first, last = run["points"][0], run["points"][-1]
    assert last["train_loss"] < 0.9 * first["train_loss"]
    assert [point["passes"] for point in run["points"]] == [80, 160, 240, 320]
    assert 0 < first["seconds"] < last["seconds"]
    best = min(run["points"], key=lambda point: point["val"][key])
    assert run["val"] == pytest.approx(best["val"])  # of the weights that were tested
    assert run["test"].keys() == run["val"].keys()
    assert abs(run["num_parameters"] / script.NUM_PARAMETERS - 1) < 0.4
    assert (run["model"], run["task"], run["lr"], run["passes"]) == ("moiety-l1", task, 2e-3, 320)


def test_the_same_seed_in_passes_is_the_same_run(script: Any, arrays: Path, tmp_path: Path):
    def errors(seed: int) -> list[Any]:
        budget = ("--task", "gap", "--passes", "48", "--points", "2", "--seed", str(seed))
        points = trained(script, arrays, tmp_path / "run.json", *budget)["points"]
        return [{key: point[key] for key in ("passes", "train_loss", "val")} for point in points]

    assert errors(3) == errors(3) != errors(4)


def test_forces_are_the_slope_of_the_energy(script: Any, arrays: Path):
    with np.load(arrays / "forces.npz") as stored:
        split = {name.partition("/")[2]: stored[name] for name in stored if name.startswith("val/")}
    molecules = script.Molecules(split, "energy")
    torch.manual_seed(0)
    model = script.build("moiety-l1", script.NUM_PARAMETERS)
    predictor = script.Predictor(model, script.TASKS["forces"], False, molecules).double().eval()
    batch = molecules.batch(torch.tensor([2]))[0].to(torch.float64)
    _, forces = predictor(batch)
    step = torch.zeros_like(batch.positions)
    step[3, 1] = 1e-4
    up, down = (predictor._label(batch, batch.positions + sign * step).item() for sign in (1, -1))
    assert forces[3, 1].item() == pytest.approx(-(up - down) / 2e-4, rel=1e-5)


def test_the_average_starts_at_the_weights_and_lags_behind_them(script: Any):
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = script.Average(model, 0.9)
    model.weight.data.fill_(2.0)
    average.update()
    average.swap()
    assert 1.0 < model.weight.item() < 2.0
    average.swap()
    assert model.weight.item() == 2.0


def test_the_rate_rises_then_falls_to_nothing(script: Any):
    rates = [script.schedule(progress) for progress in (0.0, script.WARMUP, 0.5, 1.0, 1.1)]
    assert rates[0] < 0.01 and rates[1] > 0.99 and rates[2] == pytest.approx(0.5) and rates[3] == rates[4] == 0


def test_without_arrays_or_with_an_unknown_model_training_says_what_to_do(
    script: Any, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--task", "u0", "--passes", "8", "--out", str(tmp_path / "run.json")]
    assert script.main([*common, "--model", "moiety-l1", "--data", str(tmp_path)]) == 2
    assert "prepare.py" in capsys.readouterr().err
    assert script.main([*common, "--model", "moiety-l9", "--data", str(arrays)]) == 2
    assert "moiety-l9" in capsys.readouterr().err


# the matrix


def entry(task: str, model: str, seed: int, **errors: float) -> dict[str, Any]:
    point = {"seconds": 510.2, "passes": 1000, "train_loss": 1.0, "val": errors}
    return {
        "model": model, "task": task, "seed": seed, "seconds": 510.0, "passes": None, "lr": 1e-3, "readout": "sum",
        "num_parameters": 400_000, "val": errors, "test": errors, "points": [point],
    }  # fmt: skip


def test_the_table_has_means_seeds_and_ratios_to_the_best_peer(matrix: Any, tmp_path: Path):
    runs = [
        *(entry("u0", "moiety-l1", seed, label=40.0 + 2 * seed) for seed in (0, 1)),
        *(entry("u0", "tensornet", seed, label=80.0 + 4 * seed) for seed in (0, 1)),
        entry("u0", "visnet", 0, label=200.0),
        entry("forces", "visnet", 0, label=9.0, forces=5.0),
    ]
    folder = tmp_path / "runs"
    folder.mkdir()
    for index, run in enumerate(runs):
        (folder / f"{index}.json").write_text(json.dumps(run))
    assert matrix.main(["--show", "--out", str(folder)]) == 0
    page = matrix.PAGE.read_text()
    assert "510 CPU seconds" in page and page.startswith("before") and page.endswith("after\n") and "old" not in page
    assert "| moiety-l1 | 41.0 (40.0 42.0), x0.50 | – | – | – |" in page
    assert "| tensornet | 82.0 (80.0 84.0), x1.00 |" in page
    assert "| visnet | 200.0 (200.0), x2.44 | – | 5.0 (5.0), x1.00 | 9.0 (9.0), x1.00 |" in page
    zero = json.loads((matrix.ARRAYS / "forces.json").read_text())["baselines"]["forces"]["zero forces"]
    assert f"| zero forces | – | – | {1000 * zero:.1f} | – |" in page
    assert len(json.loads(matrix.RESULTS.read_text())["runs"]) == len(runs)
    assert "<svg" in matrix.RESULTS.with_suffix(".svg").read_text()


def test_finished_runs_are_not_run_again_and_broken_ones_are_named(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        model, out = command[command.index("--model") + 1], Path(command[command.index("--out") + 1])
        asked.append(model)
        if model == "mace":
            return subprocess.CompletedProcess(command, 3, "", "it fell over")
        out.write_text(json.dumps(entry("u0", model, 0, label=1.0)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(matrix.subprocess, "run", run)
    jobs = [matrix.Job("u0", model, "510s", 0) for model in ("moiety-l1", "visnet", "mace")]
    broken = matrix.run(jobs, tmp_path)
    assert len(broken) == 1 and "u0-mace-510s-0: exit 3" in broken[0] and "it fell over" in broken[0]
    matrix.run(jobs, tmp_path)
    assert sorted(asked) == ["mace", "mace", "moiety-l1", "visnet"]


def test_the_pilot_takes_the_rate_of_lowest_validation_error(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = {("0.0005", "mean"): 9.0, ("0.001", "mean"): 4.0, ("0.001", "sum"): 3.0, ("0.002", "mean"): 5.0}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        of = {name: command[command.index(f"--{name}") + 1] for name in ("lr", "readout", "out")}
        found = entry("gap", "visnet", 0, label=error.get((of["lr"], of["readout"]), 99.0))
        Path(of["out"]).write_text(json.dumps(found | {"test": None}))  # test errors have no say
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(matrix.subprocess, "run", run)
    (tmp_path / "pilot").mkdir()
    assert matrix.main(["--pilot", "--tasks", "gap", "--models", "visnet", "--out", str(tmp_path)]) == 0
    chosen = json.loads(matrix.SETTINGS.read_text())["gap"]["visnet"]
    assert (chosen["lr"], chosen["readout"]) == (1e-3, "sum") and len(chosen["validation"]) == 5


@pytest.mark.parametrize("arguments", [["--budgets", "510"], ["--tasks", "u1"], ["--models", "moiety"]])
def test_words_the_matrix_does_not_know_are_refused(matrix: Any, arguments: list[str]):
    with pytest.raises(SystemExit) as refused:
        matrix.main(arguments)
    assert refused.value.code == 2


# the corpus


def test_noise_depends_on_the_name_alone_and_is_as_wide_as_said():
    module = load_recipe("forces").module()
    molecule = Structure(np.full(3000, 6), np.zeros((3000, 3)), id="A", groups={"split": "train"})
    first, again = module.rattled(molecule), module.rattled(molecule)
    assert np.array_equal(first.positions, again.positions)
    assert first.positions.std() == pytest.approx(first.scalars["sigma"], rel=0.05)
    molecule.id = "B"
    assert module.rattled(molecule).scalars["sigma"] != first.scalars["sigma"]


def test_what_ccd_holds_out_is_never_trained_on():
    module = load_recipe("forces").module()
    members = {
        split: [
            Structure(np.array([6]), np.zeros((1, 3)), id=f"{split}{i}", groups={"split": split}) for i in range(400)
        ]
        for split in ("train", "val", "test")
    }
    found = module.held_out(members)
    assert {s.id.rstrip("0123456789") for s in found["train"]} == {"train"}
    assert [s.id for s in found["val"]] == [f"val{i}" for i in range(module.NUM_VAL)]
    assert {s.id for s in found["test"]} == {s.id for split in ("val", "test") for s in members[split]} - {
        s.id for s in found["val"]
    }
    assert all(s.groups["split"] == split for split, of in found.items() for s in of)


def test_forces_of_the_sample_balance_and_are_those_of_shaken_molecules():
    module = load_recipe("forces").module()
    for molecule in Corpus.open(SAMPLES / "forces"):
        assert np.abs(molecule.forces.sum(axis=0)).max() < 1e-8 and molecule.theory == "GFN2-xTB"
        assert 0.1 < np.sqrt((molecule.forces**2).mean()) < np.linalg.norm(molecule.forces, axis=1).max() <= 50
        assert module.SIGMAS[0] <= molecule.scalars["sigma"] <= module.SIGMAS[1] and molecule.num_nodes <= 30
