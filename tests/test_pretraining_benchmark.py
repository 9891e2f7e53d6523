"""Arms of a comparison differ in what they compare alone, and the tables say what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from moiety.objectives import build_objectives
from moiety.training.config import PretrainConfig, load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def pretraining(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("pretraining")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "pretraining.json")
    page = tmp_path / "pretraining.md"
    page.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "PAGE", page)
    ledger = module.Ledger("base")
    for task in module.FINE_TUNINGS:
        ledger.add(module.Job(task, "scratch", 1000, 0, 1e-3), {"results": {module.METHODS["scratch"]: 2.0}})
    monkeypatch.setattr(module, "transfer", lambda: ledger)
    return module


def config_of(pretraining: Any, arm: Any, steps: int) -> PretrainConfig:
    _, path, *overrides = pretraining.words(arm, steps)
    return load_config(PretrainConfig, path, overrides)


def test_objectives_are_configurations_at_equal_cost(pretraining: Any) -> None:
    for name, arm in pretraining.PARTS["objectives"].items():
        config = config_of(pretraining, arm, 1200)
        objectives = [objective.name for objective in build_objectives(config.objectives)]
        assert config.training.steps == (900 if "self_conditioned" in objectives else 1200), name
        others = [Path(s.path).name for s in config.data.sources][1:]
        assert others == (["gfn1"] if config.tasks else ["forces"])


@pytest.mark.parametrize(
    ("part", "recipe", "steps"),
    [("domains", "released_denoising", [900, 150, 200]), ("labelled_domains", "released", [600, 400, 1300])],
)
def test_a_domain_alone_has_what_the_mixture_spent_on_it(pretraining: Any, part: str, recipe: str, steps: list[int]):
    configs = {name: config_of(pretraining, arm, sum(steps)) for name, arm in pretraining.PARTS[part].items()}
    released = load_config(PretrainConfig, BENCHMARKS.parent / f"pretrain/configs/{recipe}.yaml")
    assert configs["all"].objectives == released.objectives and configs["all"].tasks == released.tasks
    assert {(s.path, s.weight, s.supervised) for s in configs["all"].data.sources} == {
        (s.path, s.weight, s.supervised) for s in released.data.sources
    }
    assert configs["all"].training.steps == sum(steps)
    assert [config.training.steps for name, config in configs.items() if name != "all"] == steps


@pytest.fixture
def calls(pretraining: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The fine-tunings that were run; those at 5e-3 are good."""
    errors = {"all": 1.1, "molecules": 1.0, "crystals": 0.9, "proteins": 1.2}
    calls = []

    def finetune(job: Any, model: Path, out: Path) -> None:
        calls.append(job)
        results = {pretraining.LORA: errors[model.parent.name] if job.rate == 5e-3 else 9.0}
        target = pretraining.FINE_TUNINGS[job.task].target
        entry = {"target": target, "results": results, "validation": 1 / job.rate}
        (out / job.name).mkdir(parents=True)
        (out / job.name / "metrics.json").write_text(json.dumps([entry]))

    monkeypatch.setattr(pretraining, "pretrain", lambda *_: None)
    monkeypatch.setattr(pretraining.runs, "finetune", finetune)
    return calls


def test_the_table_says_what_the_mixture_keeps(pretraining: Any, calls: list[Any], tmp_path: Path) -> None:
    assert pretraining.main(["domains", "--out", str(tmp_path)]) == 0
    page = pretraining.PAGE.read_text()
    assert "| all | 1.1 (-45%) | 1.1 (-45%) | 1.1 (-45%) |" in page
    assert "| proteins | – | – | 1.2 (-40%) |" in page
    assert "| kept by all of the gain of one | 90% | 82% | 112% |" in page
    assert "Not measured yet" not in page
    done = len(calls)
    assert done == (3 + 1 + 1 + 1) * (3 + 1), "three seeds at the better rate, one at the other"
    assert pretraining.main(["domains", "--out", str(tmp_path / "elsewhere")]) == 0 and len(calls) == done


def test_what_was_measured_at_a_worse_rate_does_not_stay(
    pretraining: Any, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = pretraining.RATES
    monkeypatch.setattr(pretraining, "RATES", rates[:1])
    assert pretraining.main(["domains", "--tasks", "residues", "--out", str(tmp_path)]) == 0
    assert "| proteins | 9 (" in pretraining.PAGE.read_text()
    monkeypatch.setattr(pretraining, "RATES", rates)
    assert pretraining.main(["domains", "--tasks", "residues", "--out", str(tmp_path)]) == 0
    assert "| proteins | 1.2 (" in pretraining.PAGE.read_text()


def test_a_part_that_is_not_there_is_refused(pretraining: Any):
    with pytest.raises(SystemExit):
        pretraining.main(["colours"])
