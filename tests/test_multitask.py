"""Pretraining from labels beside denoising, and from the weights of an earlier model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moiety.errors import InputError
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.testing import launched
from moiety.training.config import PretrainConfig, load_config
from moiety.training.mixture import Mixture
from moiety.training.multitask import build
from moiety.training.stream import Prepared

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
CONFIG = ROOT / "pretrain/configs/released.yaml"


LABELS = {
    "gfn1": {"energy", "forces", "dipole", "gap", "mulliken"},
    "r2scan": {"energy_per_atom", "forces", "virial"},
}


def overrides(start: Path | str) -> list[str]:
    names = ("gfn1", "r2scan", "qm9", "crystals", "proteins")
    sources = [{"path": str(SAMPLES / name), "supervised": name in LABELS} for name in names]
    tasks = yaml.safe_load(CONFIG.read_text())["tasks"]
    given = [f"start={start}", f"data.sources={json.dumps(sources)}", f"tasks={json.dumps(tasks)}"]
    return [*given, "warmup_steps=1", "micro_batches=4"]


def configured(base: Path | str, *words: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIG, [*overrides(base), *words])


def test_supervised_sources_are_learned_from_as_they_are_and_others_have_no_labels(base: Path):
    config = configured(base, "objectives.coordinates.clean=0")
    mixture = Mixture.open(config.data)
    _, objectives, tasks = build(config, mixture)
    assert {task.name: task.config.unit for task in tasks} == {
        "energy": "eV", "forces": "eV/Å", "dipole": "D", "gap": "eV", "mulliken": "e", "energy_per_atom": "eV",
        "virial": "eV",
    }  # fmt: skip
    prepared = Prepared(mixture, objectives, cutoff=5.0, seed=0)
    seen = set()
    for number in range(12):
        source = config.data.sources[mixture.micro_batch(number).source]
        labels = LABELS.get(Path(source.path).name, set())
        supervised = bool(labels)
        seen.add(Path(source.path).name)
        batch = prepared[number]
        clean = {s.id: s.positions for s in mixture.read(mixture.micro_batch(number))}
        first = clean[batch.ids[0]]
        moved = len(first) != int(batch.num_nodes_B[0]) or not np.allclose(batch.positions[: len(first)], first)
        assert moved is not supervised
        scored = {objective.name: bool(objective.scored(batch).any()) for objective in objectives}
        assert {task.name for task in tasks if scored[task.name]} == labels
        assert scored["coordinates"] is not supervised
    assert seen >= {*LABELS, "qm9"}


def test_training_goes_on_from_a_model_and_leaves_one_of_the_same_kind(base: Path, tmp_path: Path):
    arguments = ["--config", CONFIG, *overrides(base), "steps=2", "log_every=1", "checkpoint_every=2"]
    first, last = launched.train(ROOT / "pretrain/train.py", arguments, tmp_path / "run")
    assert LABELS["gfn1"] <= last["losses"]["molecule"].keys()
    assert {"coordinates", "types"} <= first["losses"]["molecule"].keys()
    export = tmp_path / "run/export"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, export))
    of_labels = {name.split(".")[1] for name in after.keys() - before.keys()}
    tasks = json.loads((export / "config.json").read_text())["tasks"]
    assert set().union(*LABELS.values()) == of_labels == set(tasks), "their heads are kept"
    changes = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert 0 < max(changes.values()) < 0.01, "two steps away from where it started"
    labelled = MoietyForPreTraining.from_pretrained(export).heads
    assert set(labelled) == of_labels
    card = (export / "README.md").read_text().replace("\n", " ")
    assert (
        "labels of GFN1-xTB: energy, forces, dipole, gap, mulliken; r2SCAN by CHGNet (teacher model, not DFT): " in card
    )


@pytest.mark.parametrize("part", ["released_denoising", "released_labels", "released_continued"])
def test_the_parts_before_take_two_steps(part: str, base: Path, tmp_path: Path):
    config = CONFIG.with_stem(part)
    words = overrides(base)
    if part == "released_denoising":
        words = [f"data.sources=[{{path: {SAMPLES / 'qm9'}}}, {{path: {SAMPLES / 'proteins'}}}]", "micro_batches=2"]
    words += ["steps=2", "log_every=1", "checkpoint_every=2", "workers=0", "node_budget=640", "edge_budget=20000"]
    _, last = launched.train(ROOT / "pretrain/train.py", ["--config", config, *words], tmp_path / "run")
    assert np.isfinite(last["loss"]) and (tmp_path / "run/export/model.safetensors").exists()


def test_a_new_model_can_learn_from_labels_too(base: Path):
    tree = yaml.safe_load(CONFIG.read_text())
    del tree["start"]
    numbers = json.loads((base / "config.json").read_text())
    tree["model"] = {name: numbers[name] for name in ("hidden_size", "num_layers", "num_heads", "edge_channels")}
    tree["data"]["sources"] = [{"path": str(SAMPLES / name), "supervised": True} for name in LABELS]
    path = base.parent / "new.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(PretrainConfig, path)
    torch.manual_seed(0)
    model, objectives, tasks = build(config, Mixture.open(config.data))
    assert model.config.hidden_size == 16 and set(model.config.tasks) == {task.name for task in tasks}
    assert len(objectives) == 3 + 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model={hidden_size: 16}"], "either model"),
        (["start=''"], "either model"),
        (["tasks=[]"], "both, or none"),
        (["data.sources=[{path: a}]"], "both, or none"),
        (["objectives={dens: {}}"], "dens does not go with tasks"),
        (["tasks=[{label: gap, kind: mean}, {label: gap, kind: mean}]"], "gap comes twice"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(words: list[str], message: str):
    with pytest.raises(InputError, match=message):
        configured("anywhere", *words)


def test_a_start_or_a_label_that_is_not_there_is_named(base: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere: no model here"):
        configured(tmp_path / "nowhere").model_config()
    config = configured(base, "tasks=[{label: colour, kind: mean}]")
    with pytest.raises(InputError, match=r"colour: no training structure has this label"):
        build(config, Mixture.open(config.data))
