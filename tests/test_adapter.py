"""The adapter is plain peft: it starts as the base, trains alone, travels, merges, and knows its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from moiety.adapters.adapter import (
    ADAPTERS,
    DIRECTIONAL,
    AdapterSettings,
    add_adapter,
    load_adapted,
    load_base,
    save_adapter,
    trainable_share,
    trunk_linears,
)
from moiety.adapters.lora import SummedLinear
from moiety.adapters.starts import TYPES, Start, start_heads
from moiety.data.shards import Corpus
from moiety.errors import InputError
from moiety.inference.predict import load_predictor
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.vocabulary_moiety import FIRST_RESIDUE, RESIDUE_MASK
from moiety.tokens.batch import Batch, collate, with_neighbors
from moiety.training.config import PretrainConfig, load_config
from moiety.training.export import write_export

ROOT = Path(__file__).parents[1]
TASKS = {"dipole": {"kind": "dipole_norm", "mean": 2.7, "std": 1.5, "unit": "D"}}
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "edge_channels": 16}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "export"
    torch.manual_seed(0)
    model = MoietyForPreTraining(MoietyConfig(**SMALL))
    with torch.no_grad():  # no weight is zero, as after training
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    write_export(model.state_dict(), model.config, folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> Batch:
    corpus = Corpus.open(ROOT / "tests/data/corpora/qm9", split="train")
    return with_neighbors(collate(corpus.read(range(8))), 5.0)


def test_the_charges_of_a_fresh_dipole_do_not_pull_against_its_vectors(export: Path, batch: Batch) -> None:
    """Their common sign does not show in the norm, so opposite ones would be a minimum of their own."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = load_base(export, TASKS).eval()
        with torch.no_grad():
            output = model(**batch.inputs())
            vector_N3 = model.heads["dipole"].vector(output.node_features)
        total_B3 = torch.zeros(batch.num_structures, 3).index_add(0, batch.graph_index, vector_N3)
        expected_B = 1.5 * (total_B3.square().sum(-1) + 1e-6).sqrt()
        assert torch.allclose(output.predictions["dipole"], expected_B, rtol=1e-4)


def test_a_head_for_residues_starts_as_what_the_base_says_of_hidden_ones(export: Path) -> None:
    chains = Corpus.open(ROOT / "tests/data/corpora/proteins", split="train").read(range(2))
    batch = with_neighbors(collate(chains), 5.0)
    hidden = batch.replace(node_type=torch.full_like(batch.node_type, RESIDUE_MASK))
    model, base = load_base(export, {"residue": {"kind": "residues"}}), MoietyForPreTraining.from_pretrained(export)
    start_heads(model, export, {"residue": Start(TYPES, {"kind": "residues"})})
    with torch.no_grad():
        told = model.eval()(**batch.inputs()).predictions["residue"]
        expected = base.eval()(**hidden.inputs()).type_logits
    assert torch.allclose(told, expected[:, FIRST_RESIDUE : FIRST_RESIDUE + 20], atol=1e-6)


def randomized(model: PeftModel) -> PeftModel:
    """An adapter as training might leave it: no part of it is zero."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def dipole(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch.inputs()).predictions["dipole"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_new_adapter_predicts_what_the_base_predicts(kind: str, export: Path, batch: Batch) -> None:
    torch.manual_seed(0)
    base = load_base(export, TASKS).eval()
    expected = dipole(base, batch)
    assert torch.allclose(dipole(add_adapter(base, AdapterSettings(), kind).eval(), batch), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_loaded_and_merged_adapters_predict_the_same(
    kind: str, export: Path, batch: Batch, tmp_path: Path
) -> None:
    adapted = randomized(add_adapter(load_base(export, TASKS), AdapterSettings(), kind))
    expected = dipole(adapted, batch)
    assert (expected - dipole(load_base(export, TASKS).eval(), batch)).abs().max() > 1e-2
    save_adapter(adapted, tmp_path / "adapter", export, TASKS)

    by_peft = PeftModel.from_pretrained(load_base(export, TASKS), str(tmp_path / "adapter")).eval()
    by_us, _ = load_adapted(export, tmp_path / "adapter")
    assert torch.allclose(dipole(by_peft, batch), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(dipole(by_us, batch), expected, rtol=1e-5, atol=1e-5)
    if kind != "ia3":  # peft divides by its factors again, which near zero loses digits
        by_us.merge_adapter()
        assert torch.allclose(dipole(by_us, batch), expected, rtol=1e-4, atol=1e-4)
        by_us.unmerge_adapter()
    merged = by_us.merge_and_unload()
    assert isinstance(merged, MoietyForPrediction)
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, MoietyForPrediction.from_pretrained(tmp_path / "merged").eval()):
        assert torch.allclose(dipole(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_dora_refuses_a_trunk_that_was_never_trained() -> None:
    with pytest.raises(InputError, match="never trained"):
        add_adapter(MoietyForPrediction(MoietyConfig(**SMALL, tasks=TASKS)), AdapterSettings(), "dora")


def test_dora_spares_the_frames_of_a_base_that_saw_no_chain(export: Path) -> None:
    base = load_base(export, TASKS)
    with torch.no_grad():
        base.moiety.blocks[0].local_attention.frames.weight.zero_()
    names = set(trunk_linears(base))
    adapted = add_adapter(base, AdapterSettings(), "dora")
    layers = {name for name, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    found = {name.removeprefix("base_model.model.") for name in layers}
    assert names - found == {"moiety.blocks.0.local_attention.frames"}


def test_an_adapter_refuses_another_base(export: Path, tmp_path: Path) -> None:
    save_adapter(add_adapter(load_base(export, TASKS), AdapterSettings()), tmp_path / "adapter", export, TASKS)
    torch.manual_seed(9)
    other = MoietyForPreTraining(MoietyConfig(**SMALL))
    write_export(other.state_dict(), other.config, tmp_path / "other")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    theirs = config["auto_mapping"]["base_fingerprint"]
    with pytest.raises(InputError, match=theirs):
        load_adapted(tmp_path / "other", tmp_path / "adapter")


def test_adapters_on_one_trunk_are_switched_and_do_not_disturb_each_other(
    export: Path, batch: Batch, tmp_path: Path
) -> None:
    gap = {"gap": {"kind": "mean", "mean": 6.0, "std": 1.0, "unit": "eV"}}
    for name, tasks in (("dipole", TASKS), ("gap", gap)):
        adapted = randomized(add_adapter(load_base(export, tasks), AdapterSettings()))
        save_adapter(adapted, tmp_path / name, export, tasks)
    structures = Corpus.open(ROOT / "tests/data/corpora/qm9", split="train").read(range(4))
    alone = {name: load_predictor(export, tmp_path / name)(structures) for name in ("dipole", "gap")}
    both = load_predictor(export, {name: tmp_path / name for name in ("dipole", "gap")})
    for name in ("gap", "dipole", "gap"):
        for here, there in zip(both(structures, name), alone[name], strict=True):
            assert here.keys() == {name} and here[name]["value"] == pytest.approx(there[name]["value"], rel=1e-5)
    with pytest.raises(InputError, match="the trunk has dipole, gap"):
        both(structures)


def test_adapters_that_read_a_task_differently_are_not_mixed(export: Path, tmp_path: Path) -> None:
    for name, mean in (("one", 2.7), ("two", 3.0)):
        tasks = {"dipole": TASKS["dipole"] | {"mean": mean}}
        save_adapter(add_adapter(load_base(export, tasks), AdapterSettings()), tmp_path / name, export, tasks)
    with pytest.raises(InputError, match="load it alone"):
        load_adapted(export, {name: tmp_path / name for name in ("one", "two")})


def test_a_missing_adapter_and_a_missing_base_are_named(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_adapted(export, tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        load_base(tmp_path / "nowhere", TASKS)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_sum_of_the_weights_has_the_gradients_of_peft(
    kind: str, export: Path, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = randomized(add_adapter(load_base(export, TASKS), AdapterSettings(), kind)).double()
    save_adapter(ours, tmp_path / "adapter", export, TASKS)
    stock = PeftModel.from_pretrained(load_base(export, TASKS).double(), str(tmp_path / "adapter"), is_trainable=True)
    summed = [m for m in ours.modules() if isinstance(m, SummedLinear)]
    assert len(summed) == len(trunk_linears(load_base(export, TASKS)))
    assert not any(isinstance(m, SummedLinear) for m in stock.modules())
    inputs = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor).inputs()
    monkeypatch.setattr(Linear, "forward", lambda *_: pytest.fail("three products"))
    for model in (ours, stock.double().eval()):
        model(**inputs).predictions["dipole"].square().sum().backward()
        monkeypatch.undo()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 40
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("why", ["bfloat16", "autocast", "several", "disabled"])
def test_where_the_sum_would_be_wrong_the_layer_of_peft_acts(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    config = LoraConfig(target_modules=["0"], r=2)
    config._register_custom_module({nn.Linear: SummedLinear})
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    layer = next(m for m in adapted.modules() if isinstance(m, SummedLinear))
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 8)
    expected = super(SummedLinear, layer).forward(x)
    assert torch.allclose(layer(x), expected, atol=1e-6)

    calls = []
    monkeypatch.setattr(Linear, "forward", lambda _, x: calls.append(why) or x)
    layer(x)
    assert not calls
    if why == "bfloat16":
        layer.to(torch.bfloat16)
        x = x.bfloat16()
    elif why == "several":
        adapted.add_adapter("other", config)
        adapted.base_model.set_adapter(["default", "other"])
    elif why == "disabled":
        layer.enable_adapters(False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        layer(x)
    assert calls


def test_gradients_and_optimizer_state_exist_for_adapter_and_head_alone(export: Path, batch: Batch) -> None:
    adapted = add_adapter(load_base(export, TASKS), AdapterSettings())
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or (".heads.dipole." in name and "modules_to_save" in name) for name in trained)
    optimizer = torch.optim.AdamW(trained.values())
    adapted(**batch.inputs()).predictions["dipole"].sum().backward()
    optimizer.step()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == set(trained)
    assert sum(p.numel() for p in optimizer.state) == trainable_share(adapted)[0]


def test_every_linear_map_of_the_trunk_is_adapted_and_dropout_spares_directions(export: Path) -> None:
    base = load_base(export, TASKS)
    names = trunk_linears(base)
    adapted = add_adapter(base, AdapterSettings(dropout=0.5))
    layers = {name: m for name, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in layers} == set(names)
    for name, layer in layers.items():
        kind = nn.Identity if DIRECTIONAL.search(name) else nn.Dropout
        assert isinstance(layer.lora_dropout["default"], kind), name
        weight = layer.get_base_layer()
        assert not (isinstance(weight.bias, nn.Parameter) and DIRECTIONAL.search(name))


def test_a_recipe_chooses_what_is_adapted(export: Path, batch: Batch, tmp_path: Path) -> None:
    base = load_base(export, TASKS)
    wanted = {name for name in trunk_linears(base) if "local_attention" in name}
    adapted = randomized(add_adapter(base, AdapterSettings(targets="local_attention")))
    layers = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert layers == wanted
    save_adapter(adapted, tmp_path / "adapter", export, TASKS)
    again, _ = load_adapted(export, tmp_path / "adapter")
    assert torch.allclose(dipole(again, batch), dipole(adapted, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"no linear map .* moiety.blocks.0.local_attention"):
        add_adapter(load_base(export, TASKS), AdapterSettings(targets="wings"))
    with pytest.raises(InputError, match="no regular expression"):
        AdapterSettings(targets="(")


@pytest.mark.parametrize(("size", "rank", "limit"), [("tiny", 8, 0.20), ("small", 4, 0.05)])
def test_the_trainable_share_stays_small(size: str, rank: int, limit: float) -> None:
    config = load_config(PretrainConfig, ROOT / f"pretrain/configs/{size}.yaml").model_config()
    config.tasks = TASKS
    trained, total = trainable_share(add_adapter(MoietyForPrediction(config), AdapterSettings(rank=rank)))
    assert trained / total < limit
