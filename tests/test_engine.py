"""Training as users start it: launched, on several processes, killed, resumed, exported."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ase.build import bulk
from torch import Tensor

from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.models.processing_moiety import MoietyProcessor
from moiety.objectives import build_objectives
from moiety.training import loop
from moiety.training.config import OptimizerConfig, PretrainConfig, load_config
from moiety.training.export import check_export
from moiety.training.loop import fit, learning_rate
from moiety.training.mixture import Mixture
from moiety.training.plan import activation_bytes, make_plan, state_bytes
from moiety.training.run import Run

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "pretrain/train.py"
CONFIGS = ROOT / "pretrain/configs"
SAMPLES = ", ".join(f"{{path: {ROOT}/tests/data/corpora/{n}}}" for n in ("qm9", "crystals", "proteins", "ccd"))
SMALL = [f"data.sources=[{SAMPLES}]", "node_budget=300", "edge_budget=9000", "micro_batches=4", "log_every=1"]
SHORT = [*SMALL, "steps=7", "warmup_steps=3", "checkpoint_every=2"]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
REPEATABLE = ("step", "loss", "losses", "grad_norm", "lr", "skipped_steps", "samples")  # bit by bit after a resume


def start(out: Path, *arguments: str, ranks: int = 1, config: str = "tiny") -> subprocess.Popen[str]:
    """train.py by plain python, or by the deepspeed launcher on several ranks, in a process group of its own."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", ranks, "--master_port", port]
    command = [*(launcher if ranks > 1 else [sys.executable]), TRAIN, "--config", CONFIGS / f"{config}.yaml"]
    return subprocess.Popen(
        [str(part) for part in (*command, "--out", out, *arguments)],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def train(out: Path, *arguments: str, ranks: int = 1, config: str = "tiny") -> list[dict[str, Any]]:
    process = start(out, *arguments, ranks=ranks, config=config)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return read_log(out)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Relative, over every loss of every domain and every gradient norm."""
    assert [r["samples"] for r in a] == [r["samples"] for r in b]
    pairs = [(x["grad_norm"], y["grad_norm"]) for x, y in zip(a, b, strict=True)]
    for x, y in zip(a, b, strict=True):
        assert x["losses"].keys() == y["losses"].keys()
        pairs += [(x["losses"][d][o], y["losses"][d][o]) for d in x["losses"] for o in x["losses"][d]]
    return max(abs(p - q) / abs(q) for p, q in pairs)


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


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_different_domains_train_as_one_process(alone: Path, tmp_path: Path, stage: int):
    records = train(tmp_path / "run", *SHORT, f"ds=zero{stage}", ranks=2)
    assert {"molecule", "crystal", "protein"} <= records[0]["losses"].keys()
    assert largest_difference(records, read_log(alone)) < 1e-5
    ours = torch.load(tmp_path / "run/checkpoints/step_00000007/average_rank_0.pt", weights_only=True)
    assert all(mean.dtype == torch.float32 for mean in ours)
    assert_same_export(tmp_path / "run/export", alone / "export", tolerance=1e-5)


def assert_same_export(a: Path, b: Path, tolerance: float) -> None:
    from safetensors.torch import load_file

    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= tolerance


def test_a_killed_run_goes_on_bit_by_bit(alone: Path, tmp_path: Path):
    process = start(tmp_path / "run", *SHORT)
    kill_when_logged(process, process.pid, tmp_path / "run", lines=3)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000002"
    assert_repeats(train(tmp_path / "run", *SHORT), read_log(alone))
    assert_same_export(tmp_path / "run/export", alone / "export", tolerance=0)


def kill_when_logged(process: subprocess.Popen[str], victim: int, out: Path, lines: int) -> None:
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < lines:
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    process.wait(timeout=60)


def assert_repeats(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [{key: r[key] for key in REPEATABLE} for r in records] == [{k: r[k] for k in REPEATABLE} for r in expected]


def test_a_run_directory_tells_what_ran(alone: Path):
    record = read_log(alone)[-1]
    assert set(record["time"]) == {"data", "neighbours", "forward", "backward", "step"}
    assert record["structures_per_s"] > 0 and record["nodes_per_s"] > record["structures_per_s"]
    facts = json.loads((alone / "run.json").read_text())
    assert facts["corpora"]["proteins"]["domain"] == "protein" and facts["machine"]["processes"] == 1
    card = (alone / "export/README.md").read_text()
    assert "CC0-1.0" in card and "from_pretrained" in card and "| protein |" in card


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


def test_the_small_configuration_trains_two_steps(tmp_path: Path):
    little = [f"data.sources=[{SAMPLES.split(', ')[0]}]", "node_budget=100", "micro_batches=2", "steps=2"]
    options = ["precision=bf16", "checkpoint_activations=true"]
    records = train(tmp_path / "run", *SMALL, *little, *options, config="small")
    assert [r["step"] for r in records] == [1, 2] and records[-1]["skipped_steps"] == 0


@pytest.mark.slow
def test_two_compiled_ranks_train_as_plain_ones(tmp_path: Path):
    shape = ["hidden_size=16", "num_layers=2", "num_heads=2", "edge_channels=8", "global_every=0"]
    options = [*SMALL, f"data.sources=[{SAMPLES.split(', ')[0]}]", *shape, "steps=3", "ds=zero2"]
    plain = train(tmp_path / "plain", *options, ranks=2)
    compiled = train(tmp_path / "compiled", *options, "compile=true", ranks=2)
    assert largest_difference(plain, compiled) < 1e-5


@pytest.mark.parametrize(("name", "parameters"), [("base", 1e8), ("large", 1e9)])
def test_the_plan_of_a_large_configuration_starts_nothing(name: str, parameters: float, capsys: Any, tmp_path: Path):
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--out", str(tmp_path / "run"), "--plan"]
    assert train_script().main(arguments) == 0
    assert "FLOPs per step" in capsys.readouterr().out and not (tmp_path / "run").exists()
    plan = make_plan(load_config(PretrainConfig, CONFIGS / f"{name}.yaml"), None, flops_per_s=1e12)
    assert abs(plan.parameters / parameters - 1) < 0.1
    memory = [plan.state_bytes[stage, 8] for stage in (0, 1, 2, 3)]
    assert memory == sorted(memory, reverse=True) and memory[0] == 20 * plan.parameters


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


def test_on_one_rank_zero_saves_nothing():
    assert state_bytes(1000, 3, 1, ema=True) == state_bytes(1000, 0, 64, ema=True) == 20_000


def test_the_first_step_has_a_learning_rate_and_the_last_has_the_final_one():
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(step, 20, optimizer) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


# Runs inside this process: a group of one.


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def fit_here(out: Path, *overrides: str, objectives: list[Any] | None = None, fresh: bool = False) -> Run:
    numbers = ["hidden_size=16", "edge_channels=8", "num_layers=1", "global_every=0"]
    config = load_config(PretrainConfig, CONFIGS / "tiny.yaml", [*SMALL, *numbers, "micro_batches=2", *overrides])
    mixture = Mixture.open(config.data)
    with Run.open(out, config, fresh=fresh) as run:
        torch.manual_seed(0)
        model = MoietyForPreTraining(config.model_config())
        fit(run, model, mixture, objectives or build_objectives(config.objectives), config.optimizer, config.training)
    return run


class Poisoned:
    """Coordinate denoising whose loss is infinite in some calls."""

    def __init__(self, bad_calls: set[int]) -> None:
        self.inner = objective = build_objectives({"coordinates": {}})[0]
        self.bad_calls, self.calls = bad_calls, 0
        self.name, self.weight, self.scored, self.corrupt = (
            objective.name,
            objective.weight,
            objective.scored,
            objective.corrupt,
        )

    def loss_sum(self, output: Any, batch: Any) -> Tensor:
        self.calls += 1
        return self.inner.loss_sum(output, batch) * (torch.inf if self.calls - 1 in self.bad_calls else 1)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(group_of_one: None, tmp_path: Path, stage: int):
    objectives = [Poisoned(bad_calls={2})]  # the first micro-batch of the second step
    run = fit_here(tmp_path, "steps=2", "ema=0", f"ds=zero{stage}", objectives=objectives)
    weights = {name: p.detach().clone() for name, p in run.engine.module.named_parameters()}
    assert read_log(tmp_path)[-1]["skipped_steps"] == 1
    clean = fit_here(tmp_path / "clean", "steps=1", "ema=0", f"ds=zero{stage}", objectives=[objectives[0].inner])
    assert read_log(tmp_path)[0]["loss"] == read_log(tmp_path / "clean")[0]["loss"]
    for name, parameter in clean.engine.module.named_parameters():
        assert torch.isfinite(weights[name]).all() and (parameter - weights[name]).abs().max() < 2.1e-3, name


def test_training_gives_up_after_too_many_steps_that_are_not_finite(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 3)
    objectives = [Poisoned(bad_calls=set(range(2, 100)))]
    with pytest.raises(FloatingPointError, match="3 steps in a row not finite, last 4"):
        fit_here(tmp_path, "steps=9", objectives=objectives)


def test_a_torn_checkpoint_is_passed_over(group_of_one: None, tmp_path: Path):
    run = fit_here(tmp_path, "steps=4", "checkpoint_every=2")
    expected = read_log(tmp_path)
    newest = tmp_path / "checkpoints/step_00000004/state.json"
    newest.write_text(newest.read_text()[:-10])
    assert run._complete() == ["step_00000002"]
    fit_here(tmp_path, "steps=4", "checkpoint_every=2")
    assert_repeats(read_log(tmp_path), expected)


def test_old_checkpoints_go_and_the_newest_stay(group_of_one: None, tmp_path: Path):
    run = fit_here(tmp_path, "steps=5", "checkpoint_every=1", "keep_checkpoints=2")
    assert run._complete() == ["step_00000004", "step_00000005"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == run._complete()


def test_a_run_of_another_configuration_is_refused_with_the_difference(group_of_one: None, tmp_path: Path):
    fit_here(tmp_path, "steps=1")
    with pytest.raises(InputError, match=r"optimizer.lr: 0.001 -> 0.01\nuse --fresh"):
        fit_here(tmp_path, "steps=1", "lr=1e-2")
    assert len(fit_here(tmp_path, "steps=2").log_path.read_text().splitlines()) == 2  # more steps are welcome
    fit_here(tmp_path, "steps=1", "lr=1e-2", fresh=True)
    assert len(read_log(tmp_path)) == 1


def test_a_directory_of_something_else_is_left_alone(group_of_one: None, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match="not a run directory"):
            fit_here(tmp_path, "steps=1", fresh=fresh)
    assert (tmp_path / "thesis.txt").exists()


def test_ranks_that_cannot_share_the_micro_batches_are_told_what_fits(monkeypatch: pytest.MonkeyPatch):
    from moiety.training import engine

    monkeypatch.setattr(engine, "start_distributed", lambda: (0, 3))
    config = load_config(PretrainConfig, CONFIGS / "tiny.yaml")
    with pytest.raises(
        InputError, match=r"data.micro_batches=4 cannot be shared by 3 processes; set data.micro_batches=6"
    ):
        engine.start_engine(torch.nn.Linear(1, 1), config.optimizer, config.training, micro_batches=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_as_one_process_and_survives_the_death_of_a_rank(tmp_path: Path, stage: int):
    arguments = [*SMALL, "steps=30", "warmup_steps=10", "checkpoint_every=7"]
    single = train(tmp_path / "single", *arguments)
    whole = train(tmp_path / "whole", *arguments, f"ds=zero{stage}", ranks=2)
    assert largest_difference(whole, single) < 1e-5
    process = start(tmp_path / "killed", *arguments, f"ds=zero{stage}", ranks=2)
    while not (victim := rank_of(process.pid, rank=1)):
        time.sleep(0.1)
    kill_when_logged(process, victim, tmp_path / "killed", lines=17)
    assert_repeats(train(tmp_path / "killed", *arguments, f"ds=zero{stage}", ranks=2), whole)


def rank_of(launcher: int, rank: int) -> int | None:
    """Process id of a rank below a launcher."""
    import psutil

    for child in psutil.Process(launcher).children(recursive=True):
        if f"--local_rank={rank}" in child.cmdline():
            return child.pid
    return None
