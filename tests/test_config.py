"""The configuration loader: overrides, and errors that tell what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.errors import InputError
from moiety.training.config import PretrainConfig, load_config
from moiety.training.engine import REMOVED_KEYS, REMOVED_ZERO_KEYS, load_ds_config

CONFIGS = sorted((Path(__file__).parents[1] / "pretrain/configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")


def load(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, TINY, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_fits_its_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where nothing has been trained
    config = load_config(PretrainConfig, path)
    if config.model:
        assert config.model_config().hidden_size == config.model["hidden_size"]
    else:
        with pytest.raises(InputError, match="no model here"):
            config.model_config()  # of a run that goes before
    assert len(path.read_text().splitlines()) <= 40


def test_full_and_short_keys_override_the_same_value():
    assert load("training.steps=30").training.steps == 30
    assert load("steps=30", "ds=zero2").training.ds == "zero2"
    assert load("hidden_size=32").model["hidden_size"] == 32
    assert load("objectives.types.weight=0.5").objectives["types"] == {"weight": 0.5}


def test_lists_are_replaced_whole_or_by_index():
    assert load("sources=[{path: a}]").data.sources[0].weight == 1.0
    assert load("data.sources.0.path=elsewhere").data.sources[0].path == "elsewhere"


def test_numbers_may_be_written_as_people_write_them():
    assert load("lr=1e-3").optimizer.lr == 1e-3
    assert load("steps=1e4").training.steps == 10_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "training.steps"),
        ("training.step=3", "training.steps"),
        ("seed=1", "data.seed, training.seed"),
        ("steps", "key=value"),
        ("steps=[", "not YAML"),
        ("steps=many", "training.steps is 'many'"),
        ("steps=1.5", "training.steps is 1.5"),
        ("steps=0", "at least 1"),
        ("precision=fp8", "fp32 and bf16"),
        ("betas=[0.9]", "optimizer.betas"),
        ("data.sources=somewhere", "data.sources"),
        ("sources=[{path: a, wieght: 1}]", "'data.sources.0.wieght'; did you mean 'data.sources.0.weight'"),
    ],
)
def test_a_bad_override_is_refused_with_what_to_write(override: str, message: str):
    with pytest.raises(InputError) as error:
        load(override)
    assert message in str(error.value)


def test_an_unknown_key_in_the_file_names_the_nearest_one(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(TINY.read_text().replace("node_budget", "node_buget"))
    with pytest.raises(InputError, match=r"run.yaml: unknown key 'data.node_buget'; did you mean 'data.node_budget'"):
        load_config(PretrainConfig, path)


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(line for line in TINY.read_text().splitlines() if "node_budget" not in line))
    with pytest.raises(InputError, match=r"data.node_budget is missing"):
        load_config(PretrainConfig, path)
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read"):
        load_config(PretrainConfig, tmp_path / "nowhere.yaml")


def test_model_numbers_that_do_not_exist_or_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(TINY.read_text().replace("num_heads", "num_haeds"))
    with pytest.raises(InputError, match=r"model.num_haeds.*did you mean 'model.num_heads'"):
        load_config(PretrainConfig, path).model_config()
    with pytest.raises(InputError, match="lmax is 5"):
        load("lmax=5").model_config()
    with pytest.raises(InputError, match=r"did you mean 'model.num_radial'"):
        load("model.num_radials=5").model_config()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_blank_of_the_deepspeed_files_is_filled(stage: int):
    config = load(f"ds=zero{stage}", "grad_clip=0.5", "precision=bf16")
    settings = load_ds_config(config.training.ds, config.optimizer, config.training, accumulation=3)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == (0.5 if stage else 0.0)
    assert settings["torch_autocast"]["enabled"] is True
    assert "'auto'" not in str(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage is "auto"'),
        ('{"elasticity": {"enabled": true}}', "'elasticity' was removed from DeepSpeed"),
        ('{"zero_optimization": {"mics_shard_size": 4}}', "'zero_optimization.mics_shard_size' was removed"),
        ('{"zero_optimization": {"offload_param": {"device": "nvme"}}}', "checkpoints do not reach it"),
        ('{"optimizer": {"type": "AdamW"}}', "'optimizer' belongs to the recipe"),
        ("{", "not JSON"),
    ],
)
def test_a_deepspeed_file_with_leftovers_is_refused_by_name(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.json"
    path.write_text(text)
    config = load(f"ds={path}")
    with pytest.raises(InputError) as error:
        load_ds_config(config.training.ds, config.optimizer, config.training, accumulation=1)
    assert message in str(error.value) and "mine.json" in str(error.value)


def test_the_removed_keys_are_those_of_this_deepspeed():
    from deepspeed.runtime import config as of_deepspeed

    assert set(REMOVED_KEYS) >= of_deepspeed._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    assert set(REMOVED_ZERO_KEYS) >= of_deepspeed._REMOVED_ZERO_CONFIG_KEYS.keys()


def test_an_unknown_deepspeed_file_lists_those_there_are():
    config = load("ds=zero7")
    with pytest.raises(InputError, match="zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"):
        load_ds_config("zero7", config.optimizer, config.training, accumulation=1)
