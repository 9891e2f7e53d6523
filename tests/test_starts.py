"""Heads start as those of the base that say most of the labels, scaled to these; else from random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.adapters.finetune import FinetuneConfig, LabelledData, build_model
from moiety.adapters.outputs import predict
from moiety.adapters.starts import ENOUGH, fit
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.shards import Corpus, write_corpus
from moiety.data.structure import Structure
from moiety.data.subset import Subset
from moiety.inference.predict import load_predictor
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.testing import launched
from moiety.training.config import load_config
from moiety.training.export import save_model

ROOT = Path(__file__).parents[1]
QM9 = ROOT / "tests/data/corpora/qm9"
HEADS = {
    "energy": {"kind": "sum", "std": 0.3, "unit": "eV", "references": dict.fromkeys("HCNOF", -2.0)},
    "dipole": {"kind": "dipole_norm", "std": 2.0, "unit": "D"},
    "gap": {"kind": "mean", "mean": 4.0, "std": 1.5, "unit": "eV"},
    "mulliken": {"kind": "node", "std": 0.2, "unit": "e"},
    "forces": {"kind": "vector", "std": 0.7, "unit": "eV/Å"},
    "alpha": {"kind": "tensor", "mean": 50.0, "std": 3.0, "unit": "bohr^3"},
}


def alike(name: str) -> TaskConfig:
    return TaskConfig("u" if name == "energy" else name, HEADS[name]["kind"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with heads that say something: random weights, none of those that molecules meet zero."""
    folder = tmp_path_factory.mktemp("base") / "export"
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8, tasks=HEADS)
    model = MoietyForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("frames.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def labelled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules whose labels are what the base says, in other units and above other references; and noise."""
    corpus = Corpus.open(QM9, split="train")
    subset = Subset(corpus, np.arange(40))
    structures = subset.read(range(40))
    said = predict(
        MoietyForPrediction.from_pretrained(base), 5.0, subset, [Task(TaskConfig(n, HEADS[n]["kind"])) for n in HEADS]
    )
    at = np.cumsum([0, *(s.num_nodes for s in structures)])
    rng = np.random.default_rng(0)
    molecules = []
    for number, structure in enumerate(structures):
        nodes = slice(at[number], at[number + 1])
        carbons = int((structure.node_type == 6).sum())
        scalars = {
            "u": 0.5 * said["energy"][number] - 7.0 * carbons, "dipole": 3 * said["dipole"][number],
            "gap": 2 * said["gap"][number] + 1, "noise": rng.normal(),
        }  # fmt: skip
        structure = replace(
            structure, scalars=scalars, node_scalars={"mulliken": -said["mulliken"][nodes]},
            forces=4 * said["forces"][nodes], tensors={"alpha": 2 * said["alpha"][number] + 10 * np.eye(3)},
            groups=structure.groups | {"split": ("train", "test")[number >= 32]},
        )  # fmt: skip
        molecules.append(structure)
    out = tmp_path_factory.mktemp("labelled") / "corpus"
    write_corpus(molecules, out)
    return out


def configured(base: Path, corpus: Path, task: TaskConfig, *words: str) -> FinetuneConfig:
    tasks = f"tasks=[{{label: {task.label}, kind: {task.kind}}}]"
    words = (f"model={base}", f"corpus={corpus}", tasks, "num_train=32", "num_test=8", "off_task=''", *words)
    return load_config(FinetuneConfig, ROOT / "finetune/configs/qm9_gap.yaml", ["train_split=train", *words])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_starts_as_the_one_that_says_its_labels(name: str, base: Path, labelled: Path) -> None:
    config = configured(base, labelled, alike(name))
    data = LabelledData.open(config.data, config.tasks).started_from(config)
    (task,) = data.tasks
    start = data.starts[task.name]
    assert start.origin == name and start.explained == pytest.approx(1, abs=0.01)
    assert f"the base's own for {name}, which says 100%" in str(start)
    torch.manual_seed(1)
    model = build_model(config, data)
    unseen = data.test.read(range(len(data.test)), whole=True)
    error = task.error(predict(model, 5.0, data.test, [task])[task.name], task.labels(unseen))
    drawn_together = 0.02 if task.references else 0.001  # elements' references are, a little
    assert error < drawn_together * task.std, "before any step"


def test_the_scale_and_the_references_are_those_of_the_labels(base: Path, labelled: Path) -> None:
    config = configured(base, labelled, alike("energy"))
    start = LabelledData.open(config.data, config.tasks).started_from(config).starts["u"]
    assert start.head["std"] == pytest.approx(0.15, rel=0.03) and start.head["kind"] == "sum"
    assert start.head["references"]["C"] == pytest.approx(-8, abs=0.05)
    config = configured(base, labelled, alike("mulliken"))
    start = LabelledData.open(config.data, config.tasks).started_from(config).starts["mulliken"]
    assert start.head["std"] == pytest.approx(-0.2, rel=1e-3) and start.head["mean"] == pytest.approx(0, abs=1e-4)


def test_labels_that_no_head_says_are_learned_from_random_weights(base: Path, labelled: Path) -> None:
    config = configured(base, labelled, TaskConfig("noise", "mean"))
    data = LabelledData.open(config.data, config.tasks)
    assert data.started_from(config).starts == {} and data.heads == data.started_from(config).heads
    scratch = configured(base, labelled, alike("gap"), "method=scratch")
    data = LabelledData.open(scratch.data, scratch.tasks)
    assert data.started_from(scratch).starts == {}, "it has no base"


def test_what_is_explained_is_what_is_left_above_the_mean() -> None:
    rng = np.random.default_rng(0)
    said, noise = rng.normal(size=(2, 4000))
    molecules = [
        Structure(np.array([6]), np.zeros((1, 3)), scalars={"u": 5 + 2 * s + n})
        for s, n in zip(said, noise, strict=True)
    ]
    head, explained = fit(Task.fit(TaskConfig("u", "mean"), molecules), molecules, said)
    assert head["mean"] == pytest.approx(5, abs=0.1) and head["std"] == pytest.approx(2, abs=0.1)
    assert explained == pytest.approx(4 / 5, abs=0.03) and explained > ENOUGH


def one_step(base: Path, labelled: Path, out: Path, *words: str) -> launched.Forked:
    given = [f"model={base}", f"corpus={labelled}", "tasks=[{label: u, kind: sum}]", "train_split=train", "off_task=''"]
    given += ["num_train=32", "num_test=8", "steps=1", "lr=1e-9", "checkpoint_every=1", "log_every=1", *words]
    return launched.Forked(ROOT / "finetune/lora.py", ["--config", ROOT / "finetune/configs/qm9_gap.yaml", *given], out)


def test_a_run_says_where_its_head_is_from_and_the_adapter_brings_it(base: Path, labelled: Path, tmp_path: Path):
    run = one_step(base, labelled, tmp_path / "run")
    assert run.wait() == 0, run.output
    assert "head of u: starts as the base's own for energy, which says 100% of the variance" in run.output
    molecule = Corpus.open(labelled, split="test").read([0], whole=True)[0]
    (line,) = load_predictor(base, tmp_path / "run/adapter")([molecule])
    assert line["u"]["value"] == pytest.approx(molecule.scalars["u"], abs=0.01)


def test_a_run_under_way_does_not_go_on_with_a_head_of_another_scale(base: Path, labelled: Path, tmp_path: Path):
    own = tmp_path / "base"
    save_model(MoietyForPreTraining.from_pretrained(base), own)
    assert one_step(own, labelled, tmp_path / "run").wait() == 0
    without = MoietyForPreTraining.from_pretrained(base)
    without.heads, without.config.tasks = torch.nn.ModuleDict(), None
    save_model(without, own)
    run = one_step(own, labelled, tmp_path / "run", "steps=2")
    assert run.wait() == 2 and "weights that are not trained, have changed" in run.output, run.output
