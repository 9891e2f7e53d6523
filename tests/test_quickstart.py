"""The path that `make quickstart` walks, in small: the same scripts, configs and commands on the sample corpora."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moiety import cli

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests" / "data" / "corpora"
ETHANOL = ROOT / "docs" / "examples" / "ethanol.xyz"
SHORT = ["training.steps=2", "training.log_every=1", "optimizer.warmup_steps=1"]
FEW_LABELS = ["data.num_train=30", "data.num_test=30", f"data.corpus={SAMPLES / 'qm9'}"]

# One process for all scripts: starting Python with torch and DeepSpeed costs more than what is tested.
SCRIPTS = """
import json, runpy, sys
for script, arguments in json.loads(sys.argv[1]):
    code = runpy.run_path(script)["main"](arguments)
    assert code == 0, (script, code)
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run directory as the quickstart leaves it, after two steps of everything."""
    run = tmp_path_factory.mktemp("quickstart")
    sources = [{"path": str(SAMPLES / name), "weight": 1} for name in ("qm9", "crystals", "proteins")]
    overrides = [f"data.sources={json.dumps(sources)}", "node_budget=300", "edge_budget=9000", "micro_batches=3"]
    pretrain = ["--config", str(ROOT / "pretrain/configs/quickstart.yaml"), "--out", str(run), *SHORT, *overrides]
    calls = [("pretrain/train.py", pretrain)]
    for config, out, method in (
        ("qm9_dipole", "dipole", "lora"),
        ("qm9_dipole", "dipole_scratch", "scratch"),
        ("qm9_gap", "gap", "lora"),
    ):
        finetune = ["--config", str(ROOT / f"finetune/configs/{config}.yaml"), "--out", str(run / out)]
        calls.append(("finetune/lora.py", [*finetune, f"model={run}/export", f"method={method}", *SHORT, *FEW_LABELS]))
    calls = [(str(ROOT / script), arguments) for script, arguments in calls]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPTS, json.dumps(calls)], capture_output=True, text=True, env=os.environ | quiet
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def test_the_adapter_predicts_a_file_of_the_user(run_dir: Path, capsys):
    arguments = [
        "predict",
        str(ETHANOL),
        "--model",
        str(run_dir / "export"),
        "--adapter",
        str(run_dir / "dipole/adapter"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    line = json.loads(capsys.readouterr().out)
    assert line["predictions"]["dipole"]["unit"] == "D" and line["predictions"]["dipole"]["value"] >= 0


def test_a_model_trained_whole_predicts_without_an_adapter(run_dir: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(ETHANOL), "--model", str(run_dir / "dipole_scratch/export")])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["predictions"]["dipole"]["unit"] == "D"


def test_the_report_shows_the_whole_path(run_dir: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run_dir), "--json"])
    assert stop.value.code == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results["structures"]) == {"molecule", "crystal", "protein"}
    scored = {(row["domain"], row["objective"]) for row in results["losses"]}
    assert {("molecule", "coordinates"), ("crystal", "cell"), ("protein", "types")} <= scored
    assert all(row["trivial"] > 0 for row in results["losses"])
    methods = {target["target"]: set(target["results"]) for target in results["targets"]}
    assert {"pretrained + LoRA", "from scratch", "mean predictor"} <= methods["dipole"]
    assert "pretrained + LoRA" in methods["gap"]
    sections = re.findall(r'<section id="(\w+)">', (run_dir / "report.html").read_text())
    assert sections == ["results", "structures", "transfer", "losses", "speed", "facts"]


def test_the_quickstart_names_only_files_and_commands_that_exist():
    script = (ROOT / "launch/quickstart.sh").read_text()
    for path in re.findall(r"\b(?:pretrain|finetune|docs|launch)/[\w./]+\.\w+", script):
        assert (ROOT / path).exists(), path
    commands = set(re.findall(r"(?:step |=\()moiety (\w+)", script))
    assert commands == {"data", "predict", "report", "ask"}
    configs = (
        "pretrain/configs/quickstart.yaml",
        "finetune/configs/qm9_dipole.yaml",
        "finetune/configs/bridge_quickstart.yaml",
    )
    for config in configs:
        assert config in script
    recipes = re.search(r"for corpus in ([\w ]+);", script)
    assert recipes and all((ROOT / f"data_recipes/{name}.yaml").exists() for name in recipes[1].split())


def test_the_quickstart_finetunes_from_structures_that_pretraining_does_not_see():
    pretrain = yaml.safe_load((ROOT / "pretrain/configs/quickstart.yaml").read_text())["data"]
    assert pretrain.get("split", "train") == "train"
    for name in ("qm9_dipole", "qm9_gap"):
        data = yaml.safe_load((ROOT / f"finetune/configs/{name}.yaml").read_text())["data"]
        assert "train" not in (data.get("train_split", "val"), data.get("test_split", "test"))


def test_a_measured_command_says_what_it_cost_and_passes_its_exit_code_on():
    measured = [sys.executable, str(ROOT / "launch/measured.py"), sys.executable, "-c"]
    result = subprocess.run(
        [*measured, "import time; time.sleep(0.2); raise SystemExit(3)"], capture_output=True, text=True
    )
    assert result.returncode == 3
    assert re.search(r"^\$ .+\n  0 min 0\.\d s, peak memory \d\.\d\d GB$", result.stdout.strip(), re.MULTILINE)
