"""Replay keeps what the base could do: its micro-batches are spoilt and scored as in pretraining, others are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moiety.adapters.adapter import AdapterSettings, add_adapter, load_base
from moiety.adapters.finetune import FinetuneConfig
from moiety.adapters.replay import (
    PRETRAINING,
    BesideBase,
    KeptFeatures,
    ReplayConfig,
    forgetting,
    off_task,
    replayed,
)
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.shards import Corpus
from moiety.data.subset import Unlabelled
from moiety.errors import InputError
from moiety.inference.predict import load_predictor
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.testing import launched
from moiety.tokens.batch import collate, with_neighbors
from moiety.tokens.labels import Label
from moiety.training.config import SourceConfig, load_config

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
DIPOLE = {"dipole": {"kind": "dipole_norm", "std": 1.5, "unit": "D"}}


def test_replayed_structures_have_no_labels_and_labelled_ones_no_noise():
    corpus = Corpus.open(SAMPLES / "qm9", split="train")
    labelled = corpus.read(range(4), whole=True)
    task = Task.fit(TaskConfig("dipole", "dipole_norm", "D"), labelled)
    bare = Unlabelled(corpus).read(range(4), whole=True)
    assert not any(s.scalars for s in bare)
    learned = task.objective()
    config = ReplayConfig((SourceConfig("any"),), weight=0.2, objectives={"coordinates": {"weight": 3}})
    coordinates, features = replayed(config, [learned])
    assert coordinates.name == "replayed coordinates" and coordinates.weight == pytest.approx(0.6)
    assert features.name == "replayed features" and features.weight == pytest.approx(20)
    for structures, is_replayed in ((labelled, False), (bare, True)):
        batch = collate(structures, labels=learned.labels)
        seen = coordinates.corrupt(batch, torch.Generator().manual_seed(0))
        assert torch.equal(seen.positions, batch.positions) is not is_replayed
        assert bool(coordinates.scored(seen).any()) is bool(features.scored(seen).all()) is is_replayed
        assert bool(task.objective().scored(seen).any()) is not is_replayed


def test_nothing_is_forgotten_before_training_and_something_after_damage(base: Path):
    structures = [s for name in ("qm9", "crystals") for s in Corpus.open(SAMPLES / name, split="train").read(range(6))]
    adapted = add_adapter(load_base(base, DIPOLE), AdapterSettings())
    found = forgetting(base, adapted, structures, build_objectives(PRETRAINING))
    assert found.keys() == {"molecule", "crystal"} and found["crystal"].keys() == PRETRAINING.keys()
    assert all(abs(entry["change"]) < 1e-5 for by_objective in found.values() for entry in by_objective.values())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    damaged = forgetting(base, adapted, structures, build_objectives(PRETRAINING))
    assert max(abs(entry["change"]) for entry in damaged["molecule"].values()) > 0.01


def test_the_base_comes_back_frozen_and_says_what_is_to_be_kept(base: Path):
    pretrained = MoietyForPreTraining.from_pretrained(base).eval()
    model = BesideBase(load_base(base, DIPOLE), pretrained).eval()
    batch = with_neighbors(collate(Corpus.open(SAMPLES / "qm9", split="train").read(range(3))), 5.0)
    with torch.no_grad():
        one, other = model(**batch.inputs()), pretrained(**batch.inputs())
    assert torch.equal(one.noise, other.noise) and torch.equal(one.type_logits, other.type_logits)
    assert torch.equal(one.base_features, other.graph_features)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"model"}
    assert all(p.requires_grad for p in model.model.parameters())
    kept = KeptFeatures(1.0)
    assert kept.loss_sum(one, batch).tolist() == [0, 0, 0]
    with torch.no_grad():
        next(model.model.parameters()).mul_(1.5)
    assert (kept.loss_sum(model(**batch.inputs()), batch) > 0.01).all()


def test_a_property_that_was_not_trained_on_suffers_from_damage(base: Path):
    corpus = Corpus.open(SAMPLES / "qm9", split="train")
    train, test = corpus.read(range(40), whole=True), corpus.read(range(40, 60), whole=True)
    adapted = add_adapter(load_base(base, DIPOLE), AdapterSettings())
    found = off_task(base, adapted, Label("gap"), train, test)
    assert found["now"] == pytest.approx(found["base"]) == pytest.approx(found["refit"]) and found["mean"] > 0
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    damaged = off_task(base, adapted, Label("gap"), train, test)
    assert damaged["now"] > 1.2 * found["now"] and damaged["refit"] < damaged["now"]


def test_a_label_that_nothing_has_is_no_off_task(base: Path, tmp_path: Path):
    words = ["steps=1", "num_train=12", "num_test=4", f"model={base}", f"corpus={SAMPLES / 'qm9'}", "off_task=colour"]
    command = [sys.executable, ROOT / "finetune/lora.py", "--config", ROOT / "finetune/configs/qm9_dipole.yaml", *words]
    done = subprocess.run([*command, "--out", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 2 and "off_task: 'colour'" in done.stderr


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_replay_tells_both_losses_and_what_was_forgotten(method: str, base: Path, tmp_path: Path):
    config = ROOT / "finetune/configs/qm9_dipole.yaml"
    words = ["steps=4", "log_every=4", "warmup_steps=1", "num_train=12", "num_test=4", "node_budget=256"]
    words += [f"model={base}", f"corpus={SAMPLES / 'qm9'}", f"method={method}"]
    words += [f"replay={{sources: [{{path: {SAMPLES / 'proteins'}}}], share: 0.5}}"]
    (record,) = launched.train(ROOT / "finetune/lora.py", ["--config", config, *words], tmp_path / "run")
    assert record["losses"]["protein"].keys() == {"replayed types", "replayed coordinates", "replayed features"}
    assert record["losses"]["molecule"].keys() == {"dipole"}
    (metrics,) = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["off_task"].keys() == {"base", "now", "refit", "mean"}
    assert metrics["forgetting"]["protein"].keys() == {"types", "coordinates"}
    where = (base, tmp_path / "run/adapter") if method == "lora" else (tmp_path / "run/export", None)
    (line,) = load_predictor(*where)(Corpus.open(SAMPLES / "qm9", split="test").read([0]))
    assert line["dipole"]["unit"] == "D"


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("qm9_dipole", ["method=scratch"], "nothing to forget"),
        ("proteins_residues", [], "hides the residues"),
        ("qm9_dipole", ["replay.share=1.5"], "between 0 and 1"),
        ("qm9_dipole", ["replay.objectives={colour: {}}"], "no such objective"),
        ("qm9_dipole", ["replay.objectives={dens: {}}"], "takes forces"),
    ],
)
def test_replay_that_makes_no_sense_is_refused(recipe: str, words: list[str], says: str):
    words = ["replay={sources: [{path: corpora/full/qm9}]}", *words]
    with pytest.raises(InputError, match=says):
        load_config(FinetuneConfig, ROOT / f"finetune/configs/{recipe}.yaml", words)
