"""The table of recipes: every one is a configuration, and what is known is not run again."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moiety.adapters.finetune import METHODS, FinetuneConfig
from moiety.training.config import load_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("recipes")
    page = tmp_path / "recipes.md"
    page.write_text(module.PAGE.read_text())
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "recipes.json")
    return module


def test_every_recipe_is_run_on_what_pretraining_has_not_seen(recipes: Any):
    page = recipes.PAGE.read_text()
    for recipe in recipes.RECIPES:
        assert f"`{recipe}`" in page, "the page says what it is tested on"
        lora, scratch = (recipes.Run(recipe, arm, 1).words() for arm in recipes.ARMS)
        one, other = (load_config(FinetuneConfig, words[1], words[2:]) for words in (lora, scratch))
        assert (one.data, one.training, one.tasks) == (other.data, other.training, other.tasks)
        assert one.method == "lora" and other.method == "scratch" and one.data.corpus.startswith("corpora/full/")
        assert one.data.train_split == "val" or not one.data.corpus.endswith("qm9")


def test_the_table_has_every_target_beside_the_best_without_a_network(
    recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def finetune(run: Any, out: Path) -> None:
        calls.append(run)
        error = {"lora": 1.0, "scratch": 2.0}[run.arm] + 0.1 * run.seed
        results = {METHODS[run.arm]: error, "mean predictor": 9.0, "linear in composition": 4.0}
        (out / run.name).mkdir(parents=True)
        entry = {"target": "logS", "metric": "MAE", "unit": "kcal/mol", "results": results}
        (out / run.name / "metrics.json").write_text(json.dumps([entry]))

    monkeypatch.setattr(recipes, "finetune", finetune)
    words = ["freesolv", "--out", str(tmp_path / "runs")]
    assert recipes.main(words) == 0 and len(calls) == 6
    row = "| `freesolv` | logS, MAE in kcal/mol | 1.1 ± 0.1 (-48%) | 2.1 ± 0.1 | 4, linear in composition |"
    assert row in recipes.PAGE.read_text()
    shutil.rmtree(tmp_path / "runs")
    assert recipes.main(words) == 0 and len(calls) == 6 and row in recipes.PAGE.read_text()
    monkeypatch.setattr(recipes, "base_fingerprint", lambda path: "another")
    assert recipes.main([*words, "--show"]) == 0 and len(calls) == 6
