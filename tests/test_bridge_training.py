"""The stages of the bridge run through the engine, alone and on two ranks of which one has text alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety import cli
from moiety.bridge.export import load_bridge
from moiety.bridge.stages import BridgeSourceConfig, some_of
from moiety.testing.launched import Forked, largest_difference, train

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "finetune/bridge.py"
CORPORA = ROOT / "tests/data/corpora"
ISOMERS, QM9, ENGLISH = CORPORA / "isomers", CORPORA / "qm9", CORPORA / "english"
SMALL = (
    "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4, "
    "tie_word_embeddings: true}"
)
# Of bridge_language, bridge_align, bridge_numbers, bridge_generate, bridge_instruct, bridge_search, bridge_calibrate.
SOURCES = {
    "language": [(ENGLISH, "prose", 1.0), (ISOMERS, "single", 1.0)],
    "align": [(ISOMERS, "partners", 1.0), (QM9, "composition", 1.0)],
    "numbers": [(QM9, "single", 1.0)],
    "generate": [(ISOMERS, "partners", 1.0), (QM9, "composition", 1.0)],
    "instruct": [(ISOMERS, "partners", 1.0), (ENGLISH, "prose", 1.0)],
    "search": [(ISOMERS, "partners", 1.0), (QM9, "composition", 1.0)],
    "calibrate": [(ISOMERS, "single", 1.0), (QM9, "single", 1.0)],
}


def stage(name: str, out: Path, *more: str) -> list[object]:
    listed = ", ".join(f"{{path: {path}, kind: {kind}, weight: {weight}}}" for path, kind, weight in SOURCES[name])
    config = ROOT / f"finetune/configs/bridge_{name}.yaml"
    return ["--config", config, "--out", out, f"data.sources=[{listed}]", "log_every=1", *more]


@pytest.fixture(scope="module")
def stages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every stage, two steps each, from the export of the one before."""
    out = tmp_path_factory.mktemp("bridge")
    new = [f"tower={base}", "bridge={hidden_size: 32}"]
    start = [*new, f"new_language={SMALL}"]
    for name in SOURCES:
        run = Forked(SCRIPT, stage(name, out / name, "steps=2", *start), out / name)
        assert run.wait() == 0, run.output[-4000:]
        start = (
            [*new, f"language={out / name / 'export'}"] if name == "language" else [f"start={out / name / 'export'}"]
        )
    return {name: out / name for name in SOURCES}


def test_every_stage_trains_what_it_says(stages: dict[str, Path]) -> None:
    stages = {name: path for name, path in stages.items() if name != "language"}
    models = {name: load_bridge(path / "export")[0].state_dict() for name, path in stages.items()}
    speaking = ("pointer.", "bridge.out.", "bridge.hand.out.", "language_model.")
    parts: dict[str, Any] = {
        "align": ("tower.", "bridge.", "number_head."),
        "numbers": "number_head.",
        "generate": speaking,
        "instruct": speaking,
        "search": "space.",
        "calibrate": "calibration.",
    }
    names = list(stages)
    for before, after in pairwise(names):
        moved = {key for key, value in models[after].items() if not torch.equal(value, models[before][key])}
        assert moved and all(key.startswith(parts[after]) for key in moved), after
    assert (stages["instruct"] / "export/adapter/adapter_config.json").is_file()


def test_a_calibration_looks_at_as_many_structures_as_its_source_says() -> None:
    assert len(some_of(BridgeSourceConfig(str(ISOMERS), most=3), "train", 0)) == 3
    assert len(some_of(BridgeSourceConfig(str(ISOMERS)), "train", 0)) > 3


@pytest.mark.parametrize(("name", "zero"), [("instruct", "zero2"), ("instruct", "zero3"), ("align", "zero3")])
def test_two_ranks_train_as_one(stages: dict[str, Path], tmp_path: Path, name: str, zero: str) -> None:
    """In `instruct` one of them has text alone; in `align` the language model is not walked backwards."""
    settings = [f"start={stages['generate'] / 'export'}", "language=''", "steps=3", "data.micro_batches=2"]
    alone = train(SCRIPT, stage(name, tmp_path / "one", *settings), tmp_path / "one")
    together = train(SCRIPT, stage(name, tmp_path / zero, *settings, f"ds={zero}"), tmp_path / zero, ranks=2)
    assert largest_difference(together, alone) < 1e-4


def test_the_stage_of_the_quickstart_answers(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = ROOT / "finetune/configs/bridge_quickstart.yaml", tmp_path / "bridge"
    sources = f"data.sources=[{{path: {ISOMERS}, kind: partners}}]"
    run = Forked(SCRIPT, ["--config", config, "--out", out, sources, f"tower={base}", "steps=2", "log_every=1"], out)
    assert run.wait() == 0, run.output[-4000:]
    asked = [str(ROOT / "docs/examples/ethanol_water.xyz"), "Are the two molecules touching or apart?"]
    choices = ["--choice", "touching", "--choice", "apart"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["ask", *asked, *choices, "--model", str(out / "export"), "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["choices"].values()) == pytest.approx(1)
    assert found["answer"] in ("touching", "apart") and len(found["controls"]) == 3
