"""Adapters under DeepSpeed and under the Trainer of Hugging Face: the same numbers, state for what is trained alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from moiety.adapters.adapter import AdapterSettings, add_adapter, load_base, save_adapter
from moiety.adapters.tasks import Task, TaskConfig
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.inference.predict import load_predictor
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.testing.launched import Forked, largest_difference, read_log
from moiety.tokens.batch import Batch, collate, with_neighbors
from moiety.training.export import save_model

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, exported; no weight of it is zero."""
    folder = tmp_path_factory.mktemp("base") / "export"
    torch.manual_seed(0)
    model = MoietyForPreTraining(MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(model, folder)
    return folder


def finetune(base: Path, out: Path, *words: str, ranks: int = 1) -> Forked:
    arguments = ["--config", ROOT / "finetune/configs/forces_direct.yaml", f"model={base}"]
    arguments += [f"corpus={SAMPLES / 'forces'}", "num_train=24", "num_test=4", f"steps={STEPS}", "log_every=1"]
    return Forked(ROOT / "finetune/lora.py", [*arguments, "warmup_steps=1", *words], out, ranks)


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run = finetune(base, out)
    assert run.wait() == 0, run.output
    sizes = json.loads((out / "metrics.json").read_text())[0]
    assert f"optimizer state: {8 * sizes['trainable_parameters']:,} bytes a process" in run.output
    return out


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_an_adapter_trains_on_two_ranks_as_on_one(alone: Path, base: Path, tmp_path: Path, stage: int):
    run = finetune(base, tmp_path / "run", f"ds=zero{stage}", ranks=2)
    assert run.wait() == 0, run.output
    assert largest_difference(read_log(tmp_path / "run"), read_log(alone)) < 1e-5
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in (alone, tmp_path / "run"))
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5), name


class Labelled(torch.nn.Module):
    """What the Trainer asks of a model: a loss in its output."""

    def __init__(self, model: torch.nn.Module, task: Task):
        super().__init__()
        self.model, self.objective = model, task.objective()

    def forward(self, batch: Batch) -> dict[str, Any]:
        output = self.model(**batch.inputs())
        loss = self.objective.loss_sum(output, batch).sum() / self.objective.scored(batch).sum()
        return {"loss": loss}


def test_the_trainer_of_hugging_face_trains_an_adapter(base: Path, tmp_path: Path):
    structures = list(Corpus.open(SAMPLES / "qm9", split="train"))
    task = Task.fit(TaskConfig(label="dipole", kind="dipole_norm", unit="D"), structures)
    adapted = add_adapter(load_base(base, task.head()), AdapterSettings())
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}

    def as_batch(chosen: list[Structure]) -> dict[str, Batch]:
        return {"batch": with_neighbors(collate(chosen, labels=task.objective().labels), 5.0)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=20, per_device_train_batch_size=16, learning_rate=5e-3,
        logging_steps=1, report_to="none", save_strategy="no", remove_unused_columns=False, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(Labelled(adapted, task), arguments, data_collator=as_batch, train_dataset=structures)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) > 20 and moved <= {name for name, p in adapted.named_parameters() if p.requires_grad}

    save_adapter(adapted, tmp_path / "adapter", base, task.head())
    (line,) = load_predictor(base, tmp_path / "adapter")(structures[:1])
    adapted.eval()
    with torch.no_grad():
        own = adapted(**as_batch(structures[:1])["batch"].inputs()).predictions["dipole"]
    assert line["dipole"]["value"] == pytest.approx(own.item(), rel=1e-5)
