"""Training as users start it: launched, on several processes, killed, resumed, exported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ase.build import bulk
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moiety.inference.report import write_report
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.processing_moiety import MoietyProcessor
from moiety.testing import launched
from moiety.testing.launched import Forked, Launched, largest_difference, read_log, repeatable
from moiety.training.config import OptimizerConfig, PretrainConfig, load_config
from moiety.training.export import check_export
from moiety.training.flops import training_flops
from moiety.training.loop import learning_rate
from moiety.training.mixture import Mixture
from moiety.training.plan import STRATEGIES, Speed, activation_bytes, make_plan, state_bytes

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "pretrain/train.py"
CONFIGS = ROOT / "pretrain/configs"
SAMPLES = ", ".join(f"{{path: {ROOT}/tests/data/corpora/{n}}}" for n in ("qm9", "crystals", "proteins", "ccd"))
SMALL = [f"data.sources=[{SAMPLES}]", "node_budget=300", "edge_budget=9000", "micro_batches=4", "log_every=1"]
SHAPE = ["hidden_size=16", "num_layers=2", "num_heads=2", "edge_channels=8"]
SHORT = [*SMALL, *SHAPE, "steps=7", "warmup_steps=3", "checkpoint_every=2"]


def start(out: Path, *arguments: str, ranks: int = 1) -> Forked:
    return Forked(TRAIN, ["--config", CONFIGS / "tiny.yaml", *arguments], out, ranks)


def train(out: Path, *arguments: str, ranks: int = 1, config: str = "tiny") -> list[dict[str, Any]]:
    return launched.train(TRAIN, ["--config", CONFIGS / f"{config}.yaml", *arguments], out, ranks)


def train_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_train", TRAIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 7 steps of the tiny configuration on four corpora."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(out, *SHORT)
    return out


def test_losses_and_gradient_norms_are_the_golden_ones(alone: Path):
    """A change of the engine that changes what is trained; rewrite the file on purpose only, from the run's log."""
    golden = json.loads((ROOT / "tests/golden/engine.json").read_text())
    assert largest_difference(read_log(alone), golden) < 1e-4  # machines round differently


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_different_domains_train_as_one_process(alone: Path, tmp_path: Path, stage: int):
    records = train(tmp_path / "run", *SHORT, f"ds=zero{stage}", ranks=2)
    assert {"molecule", "crystal", "protein"} <= records[0]["losses"].keys()
    assert largest_difference(records, read_log(alone)) < 1e-5
    assert_same_export(tmp_path / "run/export", alone / "export", tolerance=1e-5)


def assert_same_export(a: Path, b: Path, tolerance: float) -> None:
    from safetensors.torch import load_file

    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= tolerance


def test_a_killed_run_goes_on_bit_by_bit(alone: Path, tmp_path: Path):
    run = start(tmp_path / "run", *SHORT)
    run.until_logged(3)
    run.until((tmp_path / "run/checkpoints/latest").exists)
    run.kill()
    assert repeatable(train(tmp_path / "run", *SHORT)) == repeatable(read_log(alone))
    assert_same_export(tmp_path / "run/export", alone / "export", tolerance=0)


def test_a_run_directory_tells_what_ran(alone: Path):
    record = read_log(alone)[-1]
    assert set(record["time"]) == {"data", "forward", "backward", "step", "save"}
    assert record["structures_per_s"] > 0 and record["nodes_per_s"] > record["structures_per_s"]
    assert 0 < record["mfu"] < 1
    facts = json.loads((alone / "run.json").read_text())
    assert facts["corpora"]["proteins"]["domain"] == "protein" and facts["machine"]["processes"] == 1
    card = (alone / "export/README.md").read_text()
    assert "CC0-1.0" in card and "from_pretrained" in card and "| protein |" in card


def test_a_run_under_way_has_a_report(tmp_path: Path):
    run = start(tmp_path / "run", *SHORT, "steps=100000")
    try:
        run.until_logged(3)
        path = write_report(run.out)
        assert run.exit_code() is None
        assert '<section id="losses">' in path.read_text() and '<section id="speed">' in path.read_text()
    finally:
        run.kill()


def test_an_export_loads_without_moiety_to_the_last_bit(alone: Path, tmp_path: Path):
    script = """
import json, sys
sys.modules["moiety"] = None  # an import of it fails
import torch
from ase import Atoms
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, AutoProcessor
folder = sys.argv[1]
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
atoms = [Atoms(s["node_type"], s["positions"], cell=s["cell"], pbc=s["pbc"])
         for s in json.load(open(folder + "/probe.json"))["structures"]]
with torch.no_grad():
    output = model(**processor(atoms))
for name, expected in load_file(folder + "/probe.safetensors").items():
    assert torch.equal(output[name], expected), name
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == model.config.hidden_size
assert AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True).cutoff == model.config.cutoff
AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(alone / "export")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_changed_export_is_noticed(alone: Path, tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "export"
    shutil.copytree(alone / "export", folder)
    check_export(folder)
    weights = load_file(folder / "model.safetensors")
    weights["moiety.blocks.0.local_attention.content.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="graph_features differ"):
        check_export(folder)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_configuration_trains_two_steps(tmp_path: Path, name: str):
    little = [f"data.sources=[{SAMPLES.split(', ')[0]}]", "node_budget=100", "micro_batches=2", "steps=2"]
    options = ["precision=bf16", "checkpoint_activations=true"]
    records = train(tmp_path / "run", *SMALL, *little, *options, config=name)
    assert [r["step"] for r in records] == [1, 2] and records[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("name", ["self_conditioned", "blocks", "dens"])
def test_every_displacement_trains(tmp_path: Path, name: str):
    """Two ranks whose micro-batches come from different domains, with and without forces, are as one."""
    with_forces = f"data.sources=[{SAMPLES}, {{path: {ROOT}/tests/data/corpora/forces}}]"
    options = [*SHORT, with_forces, f"objectives={{types: {{}}, cell: {{}}, {name}: {{}}}}", "steps=3"]
    records = train(tmp_path / "two", *options, "ds=zero3", ranks=2)
    assert name in records[-1]["losses"]["molecule"] and records[-1]["skipped_steps"] == 0
    assert largest_difference(records, train(tmp_path / "one", *options)) < 1e-5


@pytest.mark.slow
def test_two_compiled_ranks_train_as_plain_ones(tmp_path: Path):
    options = [*SMALL, f"data.sources=[{SAMPLES.split(', ')[0]}]", *SHAPE, "global_every=0", "steps=3", "ds=zero2"]
    plain = train(tmp_path / "plain", *options, ranks=2)
    compiled = train(tmp_path / "compiled", *options, "compile=true", ranks=2)
    assert largest_difference(plain, compiled) < 1e-5


@pytest.mark.parametrize(("name", "parameters"), [("base", 1e8), ("large", 1e9)])
def test_the_plan_of_a_large_configuration_starts_nothing(name: str, parameters: float, capsys: Any, tmp_path: Path):
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--out", str(tmp_path / "run"), "--plan"]
    assert train_script().main(arguments) == 0
    assert "FLOPs per step" in capsys.readouterr().out and not (tmp_path / "run").exists()
    plan = make_plan(load_config(PretrainConfig, CONFIGS / f"{name}.yaml"), None, Speed(1e12, 1e11))
    assert abs(plan.parameters / parameters - 1) < 0.1
    memory = [plan.state_bytes[strategy, 8] for strategy in STRATEGIES]
    on_device = [state.device for state in memory]
    assert on_device[:4] == sorted(on_device[:4], reverse=True) and on_device[0] == 20 * plan.parameters
    for strategy in ("zero2", "zero3"):  # what is moved out is not lost
        moved = plan.state_bytes[f"{strategy}_offload", 8]
        assert moved.host > 0 and sum(moved) == plan.state_bytes[strategy, 8].device


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("shape", [{"lmax": 1, "global_every": 0}, {"lmax": 2, "global_every": 2}])
def test_the_plan_counts_what_is_kept_for_the_backward_pass(
    shape: dict[str, int], gathers: bool, monkeypatch: pytest.MonkeyPatch
):
    if gathers:
        monkeypatch.setattr("moiety.models.geometry_moiety.available", lambda device: False)
    config = MoietyConfig(hidden_size=96, num_layers=4, num_heads=4, edge_channels=48, **shape)
    model = MoietyForPreTraining(config).train()
    inputs = MoietyProcessor(MoietyFeatureExtractor())([bulk("Cu", cubic=True) * (3, 3, 3)])
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs, noise_target=torch.zeros_like(inputs["positions"]))
    measured = sum(len(storage) for pointer, storage in kept.items() if pointer not in weights)
    nodes, edges = len(inputs["positions"]), inputs["edge_index"].shape[1]
    assert output.loss is not None
    assert activation_bytes(config, nodes, edges, gathers) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("lmax", "tasks"), [(1, None), (2, None), (2, {"energy": {"kind": "energy", "unit": "eV"}})])
def test_the_work_of_a_step_is_what_torch_counts(lmax: int, tasks: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "moiety.models.geometry_moiety.available", lambda device: False
    )  # sparse products are not counted
    config = MoietyConfig(hidden_size=96, num_layers=4, num_heads=4, edge_channels=48, lmax=lmax, tasks=tasks)
    inputs = MoietyProcessor(MoietyFeatureExtractor())([bulk("Cu", cubic=True) * (3, 3, 3)])
    model = (MoietyForPrediction if tasks else MoietyForPreTraining)(config).train()
    with FlopCounterMode(display=False) as counter:
        if tasks:
            model(**inputs).predictions["forces"].square().sum().backward()
        else:
            model(**inputs, noise_target=torch.zeros_like(inputs["positions"])).loss.backward()
    estimate = training_flops(model, len(inputs["positions"]), inputs["edge_index"].shape[1])
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.slow
def test_the_planned_memory_is_the_peak_of_a_run(tmp_path: Path):
    words = [f"data.sources=[{SAMPLES}]", "node_budget=1200", "edge_budget=40000", "micro_batches=1", "steps=12"]
    config = load_config(PretrainConfig, CONFIGS / "tiny.yaml", words)
    planned = make_plan(config, Mixture.open(config.data), Speed(1.0, 1.0)).peak_bytes("zero0", 1)
    run = Launched([sys.executable, TRAIN, "--config", CONFIGS / "tiny.yaml", *words], tmp_path / "run")
    assert run.wait() == 0, run.output
    assert planned == pytest.approx(read_log(run.out)[-1]["peak_memory_mib"] * 2**20, rel=0.2)


def test_on_one_rank_zero_saves_nothing():
    assert state_bytes(1000, "zero3", 1, ema=True) == state_bytes(1000, "zero0", 64, ema=True) == (20_000, 0)


def test_the_first_step_has_a_learning_rate_and_the_last_has_the_final_one():
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(step, 20, optimizer) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
