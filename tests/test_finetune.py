"""Every recipe of finetune/configs trains, is scored beside its baselines, and leaves an adapter that predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.adapters.baselines import baselines, labels_of
from moiety.adapters.finetune import FinetuneConfig
from moiety.adapters.tasks import TaskConfig
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.inference.predict import load_predictor
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.testing import launched
from moiety.training.config import load_config
from moiety.training.export import save_model

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
RECIPES = ("forces_direct", "interactions_energy", "qm9_dipole", "qm9_gap", "qm9_mulliken", "surfaces_adsorption")
SHORT = ["steps=2", "log_every=1", "warmup_steps=1", "num_train=12", "num_test=8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that was never trained, exported."""
    folder = tmp_path_factory.mktemp("base") / "export"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "edge_channels": 8}
    save_model(MoietyForPreTraining(MoietyConfig(**shape)), folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_its_adapter_predicts(recipe: str, base: Path, tmp_path: Path):
    path = ROOT / f"finetune/configs/{recipe}.yaml"
    config = load_config(FinetuneConfig, path)
    corpus = SAMPLES / Path(config.data.corpus).name
    words = [*SHORT, f"model={base}", f"corpus={corpus}"]
    records = launched.train(ROOT / "finetune/lora.py", ["--config", path, *words], tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2] and records[-1]["skipped_steps"] == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "pretrained + LoRA" in metrics["results"] and len(metrics["results"]) >= 2
    assert all(np.isfinite(value) for value in metrics["results"].values())
    structure = Corpus.open(corpus, split="test")[0]
    (line,) = load_predictor(base, tmp_path / "run/adapter")([structure])
    per_node = config.task.target.per_node
    assert np.shape(line[config.task.label]["value"]) == (
        *((structure.num_nodes,) if per_node else ()),
        *config.task.target.shape,
    )


def molecules(*charges: list[float]) -> list[Structure]:
    """Water molecules whose atoms have these labels."""
    return [Structure(np.array([8, 1, 1]), np.eye(3), node_scalars={"charge": np.array(c)}) for c in charges]


def test_baselines_of_nodes_are_means_of_all_and_of_a_type():
    task = TaskConfig(label="charge", kind="node", unit="e")
    train, test = molecules([-0.8, 0.4, 0.4], [np.nan, 0.1, np.nan]), molecules([-1.0, 0.0, 0.0])
    found = baselines(task, train, test)
    assert found["mean predictor"] == pytest.approx([0.025] * 3)
    assert found["mean of a type"] == pytest.approx([-0.8, 0.3, 0.3])
    assert task.error(found["mean of a type"], labels_of(task, test)) == pytest.approx(0.8 / 3)


def test_baselines_of_classes_are_the_most_frequent():
    task = TaskConfig(label="charge", kind="classes", classes=("a", "b"))
    train, test = molecules([0, 1, 1], [0, 1, np.nan]), molecules([0, 1, 0])
    errors = {
        name: task.error(answers, labels_of(task, test)) for name, answers in baselines(task, train, test).items()
    }
    assert errors == pytest.approx({"most frequent class": 200 / 3, "most frequent class of a type": 100 / 3})


def test_the_baseline_of_a_tensor_is_isotropic():
    task = TaskConfig(label="alpha", kind="tensor", unit="bohr^3")
    structures = [
        Structure(np.array([6] * n), np.eye(3)[:n], tensors={"alpha": np.diag([1.0, 2.0, 3.0]) * n}) for n in (1, 2, 3)
    ]
    found = baselines(task, structures, structures)
    assert found["mean predictor"][0] == pytest.approx(4 * np.eye(3))
    assert found["linear in composition"][2] == pytest.approx(found["linear in composition"][2][0, 0] * np.eye(3))
    spread = task.spread(labels_of(task, structures))
    assert spread.mean == pytest.approx(4.0) and spread.std > 0


def test_labels_that_are_all_the_same_are_refused():
    with pytest.raises(InputError, match="nothing to learn"):
        TaskConfig(label="charge", kind="node").spread(np.array([0.5, 0.5]))


def test_classes_and_kinds_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="needs their names"):
        TaskConfig(label="fold", kind="classes")
    with pytest.raises(InputError, match="colour"):
        TaskConfig(label="fold", kind="colour")
