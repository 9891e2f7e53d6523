"""A run directory: checkpoints that are intact or refused by name, resuming, refusals, steps that are not applied.

Training runs inside this process: a group of one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from moiety.errors import InputError
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.testing.launched import RANK_VARIABLES, read_log, repeatable
from moiety.training import checkpoint, loop
from moiety.training.checkpoint import Damaged, SaveFailed, complete, verify
from moiety.training.config import PretrainConfig, load_config
from moiety.training.engine import cure_stale_locks
from moiety.training.loop import fit
from moiety.training.mixture import Mixture
from moiety.training.run import Run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "pretrain/configs"
SAMPLES = ", ".join(f"{{path: {ROOT}/tests/data/corpora/{n}}}" for n in ("qm9", "crystals", "proteins", "ccd"))
SMALL = [f"data.sources=[{SAMPLES}]", "node_budget=300", "edge_budget=9000", "micro_batches=2", "log_every=1"]
TINY = ["hidden_size=16", "edge_channels=8", "num_layers=1", "global_every=0"]


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
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
    """Coordinate denoising whose loss is infinite, or too large by a factor, in some calls."""

    def __init__(self, bad_calls: set[int], factor: float = torch.inf) -> None:
        self.factor = factor
        self.inner = objective = build_objectives({"coordinates": {}})[0]
        self.bad_calls, self.calls = bad_calls, 0
        self.name, self.weight, self.labels, self.scored, self.corrupt = (
            objective.name,
            objective.weight,
            objective.labels,
            objective.scored,
            objective.corrupt,
        )

    def loss_sum(self, output: Any, batch: Any) -> Tensor:
        self.calls += 1
        return self.inner.loss_sum(output, batch) * (self.factor if self.calls - 1 in self.bad_calls else 1)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, stage: int):
    objectives = [Poisoned(bad_calls={2})]  # the first micro-batch of the second step
    run = fit_here(tmp_path, "steps=2", "ema=0", f"ds=zero{stage}", objectives=objectives)
    weights = {name: p.detach().clone() for name, p in run.engine.module.named_parameters()}
    assert read_log(tmp_path)[-1]["skipped_steps"] == 1
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["step"] == 2 and event["what"] == "loss not finite, skipped on all ranks"
    assert list(event["micro_batches"]) == ["2"] and all(event["micro_batches"]["2"])
    clean = fit_here(tmp_path / "clean", "steps=1", "ema=0", f"ds=zero{stage}", objectives=[objectives[0].inner])
    assert read_log(tmp_path)[0]["loss"] == read_log(tmp_path / "clean")[0]["loss"]
    for name, parameter in clean.engine.module.named_parameters():
        assert torch.isfinite(weights[name]).all() and (parameter - weights[name]).abs().max() < 2.1e-3, name


def test_a_loss_spike_is_told_with_its_structures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moiety.training.spikes.FEWEST", 4)
    objectives = [Poisoned(bad_calls={14}, factor=1000)]
    fit_here(tmp_path, "steps=9", objectives=objectives)
    assert [record["loss_spikes"] for record in read_log(tmp_path)] == [0] * 7 + [1] * 2
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["step"] == 8 and list(event["micro_batches"]) == ["14", "15"]
    assert "step 8: loss" in capsys.readouterr().err


def test_training_gives_up_after_too_many_steps_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 3)
    objectives = [Poisoned(bad_calls=set(range(2, 100)))]
    with pytest.raises(FloatingPointError, match="3 steps in a row not finite, last 4"):
        fit_here(tmp_path, "steps=9", objectives=objectives)


def test_a_run_of_another_configuration_is_refused_with_the_difference(tmp_path: Path):
    fit_here(tmp_path, "steps=1")
    with pytest.raises(InputError, match=r"optimizer.lr: 0.001 -> 0.01\nuse --fresh"):
        fit_here(tmp_path, "steps=1", "lr=1e-2")
    assert len(fit_here(tmp_path, "steps=2").log_path.read_text().splitlines()) == 2  # more steps are welcome
    fit_here(tmp_path, "steps=1", "lr=1e-2", fresh=True)
    assert len(read_log(tmp_path)) == 1


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path):
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


# Checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_steps") / "run"
    fit_here(out, "steps=2", "checkpoint_every=1")
    return out


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "model.safetensors", "config.json"])
def test_a_flipped_byte_in_a_checkpoint_is_refused_by_name(two_steps: Path, tmp_path: Path, name: str):
    folder = copied(two_steps / "checkpoints/step_00000002", tmp_path / "step_00000002")
    verify(folder)
    size = (folder / name).stat().st_size
    for place in (0, size // 3, size // 2, size - 1):
        flip(folder / name, place)
        with pytest.raises(Damaged, match=f"step_00000002/{name} is damaged"):
            verify(folder)
        flip(folder / name, place)
    verify(folder)


def test_files_that_are_short_or_gone_are_refused_by_name(two_steps: Path, tmp_path: Path):
    folder = copied(two_steps / "checkpoints/step_00000002", tmp_path / "step_00000002")
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    with pytest.raises(Damaged, match=r"model.safetensors has \d+ bytes instead of \d+"):
        verify(folder)
    weights.unlink()
    with pytest.raises(Damaged, match=r"model.safetensors is missing"):
        verify(folder)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = copied(two_steps, tmp_path / "run")
    flip(out / "checkpoints/step_00000002/rank_00000.safetensors", 5000)
    fit_here(out, "steps=2", "checkpoint_every=1")
    said = capsys.readouterr().err
    assert "step_00000002/rank_00000.safetensors is damaged" in said and "resumed at step 1" in said
    assert repeatable(read_log(out)) == repeatable(read_log(two_steps))
    assert (out / "checkpoints/step_00000002.damaged").is_dir()
    assert complete(out / "checkpoints") == ["step_00000001", "step_00000002"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = copied(two_steps, tmp_path / "run")
    for folder in (out / "checkpoints").glob("step_*"):
        flip(folder / "manifest.json", 100)
    with pytest.raises(InputError, match="no checkpoint is intact"):
        fit_here(out, "steps=2", "checkpoint_every=1")
    assert "step_00000001/manifest.json is damaged" in capsys.readouterr().err
    assert len(read_log(out)) == 2


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path):
    fit_here(tmp_path, "steps=5", "checkpoint_every=1", "keep_checkpoints=2")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000005"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000005"


def test_a_checkpoint_is_a_directory_for_from_pretrained(two_steps: Path):
    folder = two_steps / "checkpoints/step_00000002"
    model, exported = AutoModel.from_pretrained(folder), load_file(folder / "model.safetensors")
    assert all(torch.equal(exported[f"moiety.{name}"], tensor) for name, tensor in model.state_dict().items())
    written = MoietyForPreTraining.from_pretrained(folder).state_dict()
    assert written.keys() == exported.keys()


@pytest.mark.parametrize("stages", [(2, 0), (3, 1), (0, 3)])
def test_another_zero_stage_goes_on_from_the_same_checkpoint(two_steps: Path, tmp_path: Path, stages: tuple[int, int]):
    first, second = stages
    out = fit_here(tmp_path / "run", "steps=2", "checkpoint_every=1", f"ds=zero{first}").path
    shutil.rmtree(out / "checkpoints/step_00000002")
    fit_here(out, "steps=2", "checkpoint_every=1", f"ds=zero{second}")
    pairs = zip(read_log(out), read_log(two_steps), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-6) for a, b in pairs)


def test_leftovers_of_a_kill_are_removed_and_never_taken_for_a_checkpoint(two_steps: Path, tmp_path: Path):
    out = copied(two_steps, tmp_path / "run")
    shutil.copytree(out / "checkpoints/step_00000002", out / "checkpoints/step_00000003.partial")
    (out / "checkpoints/latest.tmp").write_text("step_0")
    fit_here(out, "steps=2")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["latest", "step_00000001", "step_00000002"]


def test_a_full_disk_loses_no_checkpoint_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Usage(NamedTuple):
        free: int

    room = iter([2**40, 1000, 2**40])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(next(room)))
    fit_here(tmp_path, "steps=3", "checkpoint_every=1", "keep_checkpoints=5")
    assert complete(tmp_path / "checkpoints") == ["step_00000001", "step_00000003"]
    assert "step_00000002: not written: it needs" in capsys.readouterr().err
    assert [record["failed_saves"] for record in read_log(tmp_path)] == [0, 0, 1]


@pytest.mark.parametrize("failing", ["save_file", "sync_folder", "write_text"])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
):
    fit_here(tmp_path, "steps=1", "checkpoint_every=1")

    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, failing, fails)
    with pytest.raises(SaveFailed, match="the last checkpoint could not be written"):
        fit_here(tmp_path, "steps=2", "checkpoint_every=1")
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]
    monkeypatch.undo()
    fit_here(tmp_path, "steps=2", "checkpoint_every=1")
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fit_here(tmp_path, "steps=1", "checkpoint_every=1")
    write_rank = checkpoint.write_rank

    def poisoned(partial: Path, rank: int, snapshot: checkpoint.Snapshot) -> None:
        snapshot.tensors["exp_avg"][7] = torch.nan
        write_rank(partial, rank, snapshot)

    monkeypatch.setattr(checkpoint, "write_rank", poisoned)
    with pytest.raises(SaveFailed):
        fit_here(tmp_path, "steps=2", "checkpoint_every=1")
    assert "exp_avg of moiety.embedding.node_type.weight is not finite" in capsys.readouterr().err
    assert complete(tmp_path / "checkpoints") == ["step_00000001"]


def reseal(folder: Path, **changes: Any) -> None:
    """Another manifest, with the hash that belongs to it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(checkpoint._sealed(manifest | changes))


def test_code_that_computes_something_else_is_noticed(two_steps: Path, tmp_path: Path):
    out = copied(two_steps, tmp_path / "run")
    probe = json.loads((out / "checkpoints/step_00000002/manifest.json").read_text())["probe"]
    probe["noise"][0] += 0.01
    reseal(out / "checkpoints/step_00000002", probe=probe)
    with pytest.raises(InputError, match="its code, or weights that are not trained, have changed"):
        fit_here(out, "steps=2")


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(two_steps: Path, tmp_path: Path):
    out = copied(two_steps, tmp_path / "run")
    parameters = json.loads((out / "checkpoints/step_00000002/manifest.json").read_text())["parameters"]
    parameters["moiety.extra.weight"] = parameters.pop("moiety.embedding.node_type.weight")
    reseal(out / "checkpoints/step_00000002", parameters=parameters)
    with pytest.raises(InputError, match=r"moiety.embedding.node_type.weight: absent -> \[\d+, \d+\]\n  moiety.extra"):
        fit_here(out, "steps=2")


def test_a_checkpoint_of_other_structures_is_refused_with_the_difference(two_steps: Path, tmp_path: Path):
    out = copied(two_steps, tmp_path / "run")
    other = copied(ROOT / "tests/data/corpora/ccd", tmp_path / "qm9")
    sources = SAMPLES.replace(f"{ROOT}/tests/data/corpora/qm9", str(other))
    with pytest.raises(InputError, match=r"other structures, or another order:\n  sources.0.fingerprint: \w+ -> \w+"):
        fit_here(out, f"data.sources=[{sources}]", "steps=2")


def test_the_log_is_written_for_tensorboard_too(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit_here(tmp_path, "steps=2", "tensorboard=true", "checkpoint_every=1")
    fit_here(tmp_path, "steps=3", "tensorboard=true", "checkpoint_every=1")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {scalar.step: scalar.value for scalar in events.Scalars("losses/crystal/cell")}
    logged = {r["step"]: r["losses"]["crystal"]["cell"] for r in read_log(tmp_path) if "crystal" in r["losses"]}
    assert found == pytest.approx(logged) and "time/data" in events.Tags()["scalars"]


# Compilations


def locked(cache: Path, age: float) -> Path:
    """A lock in the folder of an extension, `age` s after the last change there."""
    folder = cache / "py311_cpu/fused_adam"
    folder.mkdir(parents=True)
    for path in (folder / "main.cpp", folder / "lock"):
        path.touch()
        os.utime(path, (time.time() - age, time.time() - age))
    return folder / "lock"


def test_the_lock_of_a_killed_build_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lock = locked(tmp_path, age=7200)
    cure_stale_locks(tmp_path)
    assert not lock.exists() and "left by a build that was killed 2.0 h ago; removed" in capsys.readouterr().err


def test_the_lock_of_a_build_that_goes_on_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    lock = locked(tmp_path, age=5)
    cure_stale_locks(tmp_path)
    assert lock.exists() and "a build is going on" in capsys.readouterr().err
    silent = locked(tmp_path / "other", age=7200)
    monkeypatch.chdir(silent.parent)  # as a compiler would stand there
    cure_stale_locks(tmp_path / "other")
    assert silent.exists()
