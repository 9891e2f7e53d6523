"""The evidence for pretraining: every run is a valid one, runs are paired, and tables say what was measured."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moiety.adapters.finetune import FinetuneConfig
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.shards import Corpus
from moiety.training.config import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("transfer")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results/transfer.json")
    page = tmp_path / "transfer.md"
    page.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "PAGE", page)
    return module


def test_every_run_is_a_configuration_and_arms_differ_in_method_and_rate_alone(transfer: Any):
    for name, task in transfer.TASKS.items():
        for count in task.counts:
            jobs = [transfer.Job(name, arm, count, 1, rates[0]) for arm, rates in transfer.ARMS.items()]
            configs = [load_config(FinetuneConfig, job.words("base")[1], job.words("base")[2:]) for job in jobs]
            assert len({c.method for c in configs}) == len(transfer.ARMS)
            assert len({(c.data, c.training, c.tasks) for c in configs}) == 1
            assert configs[0].data.num_train == count and configs[0].data.num_val > 0
            assert any(t.label == task.target for t in configs[0].tasks)


def canned(transfer: Any, calls: list[list[str]]) -> Any:
    """In the place of a fine-tuning: errors that a seed and a method give."""

    def finetune(job: Any, model: Path, out: Path) -> None:
        calls.append(job.words(str(model)))
        method = transfer.METHODS[job.arm]
        error = {"scratch": 2.0, "full": 1.0, "lora": 1.1, "head": 3.0}[job.arm] + 0.1 * job.seed
        entry = {"target": transfer.TASKS[job.task].target, "results": {method: error, "mean predictor": 9.0}}
        (out / job.name).mkdir(parents=True)
        (out / job.name / "metrics.json").write_text(json.dumps([{**entry, "validation": abs(job.rate - 2e-3)}]))

    return finetune


def others(jobs: Any, model: Path, out: Path) -> None:
    for job in jobs:
        (out / job.draw).write_text(
            json.dumps({"fingerprint + gradient boosting": 5.0, "GFN1-xTB + least squares": 4.0})
        )


def test_rates_come_from_validation_and_the_table_says_what_it_is_worth(
    transfer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[list[str]] = []
    monkeypatch.setattr(transfer.runs, "finetune", canned(transfer, calls))
    monkeypatch.setattr(transfer, "others", others)
    words = ["--tasks", "dipole", "--arms", "scratch,lora", "--counts", "1000", "--out", str(tmp_path / "runs")]
    assert transfer.main(words) == 0
    pilots = json.loads(transfer.RESULTS.read_text())["pilots"]["dipole"]
    assert pilots.keys() == {"scratch", "lora"}
    assert len(pilots["scratch"]) == 3 and pilots["lora"].keys() == {"0.001", "0.002", "0.005", "0.01"}
    page = transfer.PAGE.read_text()
    assert "| pretrained + LoRA | 1.2 ± 0.1 (-43%) |" in page and "| mean predictor | 9 (+329%) |" in page
    assert "Not measured yet" not in page
    done = len(calls)
    assert done == 3 + 4 + 2 * 2, "pilots, of which one is the first seed, and two more seeds"
    assert transfer.main(words) == 0 and len(calls) == done, "what is finished is not run again"
    shutil.rmtree(tmp_path / "runs")
    assert transfer.main(words) == 0 and len(calls) == done, "nor what the repository has"
    assert "| pretrained + LoRA | 1.2 ± 0.1 (-43%) |" in transfer.PAGE.read_text()
    assert transfer.main([*words, "--show"]) == 0
    written = transfer.RESULTS.read_text()
    assert transfer.main(["--quick", *words[-2:]]) == 0 and len(calls) == done + 2 * 2, "its runs anew, no pilots"
    assert transfer.RESULTS.read_text() == written
    assert "fingerprint" in page and transfer.RESULTS.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        ({}, [1, 2, 4]),
        ({1: 0.3, 2: 0.2}, [1, 2, 4]),
        ({1: 0.3, 2: 0.2, 4: 0.4}, [1, 2, 4]),
        ({1: 0.1, 2: 0.2, 4: 0.4}, [0.5, 1, 2, 4]),
        ({1: 0.3, 2: 0.2, 4: 0.1}, [1, 2, 4, 8]),
        ({1: 0.3, 2: 0.2, 4: 0.1, 8: 0.05}, [1, 2, 4, 8]),
    ],
)
def test_rates_go_on_beyond_the_edge_where_the_best_is(transfer: Any, scores: dict[float, float], tried: list[float]):
    assert transfer.rates(scores, (1, 2, 4)) == tried


def test_a_missing_base_is_an_error(transfer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert transfer.main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "no model here" in capsys.readouterr().err


def test_another_base_keeps_what_does_not_depend_on_it(transfer: Any, tmp_path: Path):
    ledger = transfer.Ledger("one", {"gap": {"scratch": {"0.001": 0.3}, "lora": {"0.005": 0.2}}})
    for arm in ("scratch", "lora"):
        entry = {"results": {transfer.METHODS[arm]: 0.5, "mean predictor": 1.0}}
        ledger.add(transfer.Job("gap", arm, 1000, 0, 1e-3), entry)
    ledger.write(tmp_path / "ledger.json")
    assert transfer.Ledger.open(tmp_path / "ledger.json", "one") == ledger
    other = transfer.Ledger.open(tmp_path / "ledger.json", "two")
    assert other.rate("gap", "scratch") == 1e-3 and other.rate("gap", "lora") is None
    assert other.errors["gap"]["1000"] == {"from scratch": {"0": 0.5}, "mean predictor": {"0": 1.0}}


def test_a_teacher_is_fitted_to_the_task(transfer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A label that is its answer times two, and a little of every carbon, is found again."""
    pytest.importorskip("tblite")
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))
    structures = Corpus.open(BENCHMARKS.parent / "tests/data/corpora/gfn1", split="train").read(range(24), whole=True)
    for structure in structures:
        assert structure.energy is not None and structure.forces is not None
        structure.scalars["u"] = 2 * structure.energy + 0.5 * (structure.node_type == 6).sum()
        structure.forces = 3 * structure.forces
    for label, kind, name in (("u", "sum", "u0"), ("forces", "vector", "forces")):
        task = Task.fit(TaskConfig(label, kind), structures[:16])
        answers = transfer.TASKS[name].teacher.fitted(task, structures[:16], structures[16:])
        assert task.error(answers, task.labels(structures[16:])) < 1e-5


def test_a_teacher_of_crystals_is_fitted_with_reference_energies(
    transfer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("chgnet")
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))
    path = BENCHMARKS.parent / "tests/data/corpora/r2scan"
    crystals = Corpus.open(path, split="train").read(range(24), whole=True)
    for crystal in crystals:
        says = crystal.scalars["energy_per_atom"]
        crystal.energy = crystal.num_nodes * says + 0.01 * float((crystal.node_type - 20).sum())
    task = Task.fit(TaskConfig("energy", "energy", unit="eV/atom"), crystals)
    answers = transfer.TASKS["crystals"].teacher.fitted(task, crystals, crystals)
    assert task.error(answers, task.labels(crystals)) < 1e-3
