"""What is compiled says what the plain model says, for batches of any size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from peft import LoraConfig, get_peft_model
from torch import Tensor

from moiety.data.shards import Corpus
from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.processing_moiety import MoietyProcessor
from moiety.training.compiled import WrittenOut, compile_model
from moiety.training.config import OptimizerConfig, TrainingConfig
from moiety.training.engine import load_ds_config, refuse_to_compile

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "edge_channels": 8, "global_every": 1}
ROCK_SALT = bulk("NaCl", "rocksalt", a=5.64) * (2, 1, 1)
BATCHES: list[list[Atoms]] = [
    [molecule("CH3CH2OH"), molecule("H2O")],
    [molecule("C6H6")],
    [molecule("CH4"), ROCK_SALT, molecule("C6H6"), molecule("NH3"), molecule("CO2")],
]


def inputs_of(structures: list[Atoms]) -> dict[str, Tensor]:
    rattled = [atoms.copy() for atoms in structures]
    for atoms in rattled:
        atoms.rattle(0.05, seed=0)
    return doubled(MoietyProcessor(MoietyFeatureExtractor())(rattled))


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def predictor(lmax: int) -> MoietyForPrediction:
    torch.manual_seed(0)
    tasks = {"energy": {"kind": "energy", "references": {"C": -3.0}}, "charge": {"kind": "node"}}
    return MoietyForPrediction(MoietyConfig(**SHAPE, lmax=lmax, tasks=tasks)).double().train()


def learned(model: MoietyForPrediction, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Predictions, and the gradients of a loss on all of them."""
    predictions = model(**inputs).predictions
    assert predictions is not None
    loss = sum(value[value.isfinite()].square().mean() for value in predictions.values() if value.isfinite().any())
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    return predictions, list(gradients)


def as_it_is(graph: Any, **options: Any) -> Any:
    """In the place of the compiler."""
    return graph


@pytest.mark.parametrize("lmax", [1, 2])
def test_forces_written_out_are_those_of_the_model(lmax: int) -> None:
    model = predictor(lmax)
    written = copy.deepcopy(model)
    stand_in = WrittenOut(written, compiler=as_it_is)
    written.forward = stand_in
    for batch in BATCHES:
        inputs = inputs_of(batch)
        torch.testing.assert_close(
            learned(written, inputs), learned(model, inputs), rtol=1e-9, atol=1e-11, equal_nan=True
        )
    assert len(stand_in.graphs) == 1


def test_chains_are_another_graph() -> None:
    model = predictor(1)
    with torch.no_grad():
        model.moiety.blocks[0].local_attention.frames.weight.normal_()
    written = copy.deepcopy(model)
    stand_in = WrittenOut(written, compiler=as_it_is)
    written.forward = stand_in
    chains = Corpus.open(Path(__file__).parent / "data/corpora/proteins", split="train").read([0, 1])
    for batch in ([*chains, molecule("H2O")], chains[:1], [molecule("CH4")]):
        inputs = doubled(MoietyProcessor(MoietyFeatureExtractor())(batch))
        torch.testing.assert_close(
            learned(written, inputs), learned(model, inputs), rtol=1e-9, atol=1e-11, equal_nan=True
        )
    assert len(stand_in.graphs) == 2, "with residues, and without"


def test_an_adapter_is_written_out_with_the_model() -> None:
    targets = LoraConfig(r=2, target_modules=["content", "filter", "hidden"], init_lora_weights=False)
    adapted = get_peft_model(predictor(1), targets).train()
    written = copy.deepcopy(adapted)
    inner = written.get_base_model()
    inner.forward = WrittenOut(inner, compiler=as_it_is)
    inputs = inputs_of(BATCHES[0])
    gradients = []
    for model in (written, adapted):
        model(**inputs).predictions["forces"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all("lora" in name for name in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_outside_of_training_the_model_itself_answers() -> None:
    model = predictor(1)
    stand_in = WrittenOut(model, compiler=as_it_is)
    model.forward = stand_in
    model.eval()
    assert set(model(**inputs_of(BATCHES[0])).predictions) == {"energy", "charge", "forces", "stress"}
    assert not stand_in.graphs


def test_a_compiled_model_keeps_the_names_of_its_weights() -> None:
    for model in (predictor(1), MoietyForPreTraining(MoietyConfig(**SHAPE))):
        before = list(model.state_dict())
        compile_model(model)
        assert list(model.state_dict()) == before
        assert isinstance(model.forward, WrittenOut) or model.moiety.blocks[0]._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"ds": "zero3"}, "ZeRO-3"),
        ({"checkpoint_activations": True}, "checkpoint_activations"),
        ({"ds": "zero3", "compile": False}, None),
        ({"ds": "zero2"}, None),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(options: dict[str, Any], refused: str | None) -> None:
    training = TrainingConfig(**{"steps": 1, "compile": True, **options})
    settings = load_ds_config(training.ds, OptimizerConfig(), training, accumulation=1)
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        refuse_to_compile(predictor(1), settings, training)


@pytest.mark.slow
def test_compiled_forces_are_those_of_the_model() -> None:
    model = predictor(1)
    compiled = copy.deepcopy(model)
    compile_model(compiled)
    for batch in (BATCHES[0], BATCHES[2]):  # a structure alone is compiled anew
        inputs = inputs_of(batch)
        torch.testing.assert_close(
            learned(compiled, inputs), learned(model, inputs), rtol=1e-9, atol=1e-11, equal_nan=True
        )


@pytest.mark.slow
def test_compiled_blocks_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    model = MoietyForPreTraining(MoietyConfig(**SHAPE)).double().train()
    compiled = copy.deepcopy(model)
    compile_model(compiled)
    for batch in BATCHES:
        inputs = inputs_of(batch)
        target = torch.ones_like(inputs["positions"])
        losses = [m(noise_target=target, **inputs).loss for m in (compiled, model)]
        gradients = [
            torch.autograd.grad(loss, [*m.parameters()], allow_unused=True, materialize_grads=True)
            for loss, m in zip(losses, (compiled, model), strict=True)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-11)
