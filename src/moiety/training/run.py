"""A run directory: what was asked, what happened, and everything needed to go on after a kill.

config.json            the configuration; a run only resumes with the same one
run.json               what ran: parameters, corpora, machine, versions
log.jsonl              one record every `training.log_every` steps
events.jsonl           steps that were not applied and loss spikes, with their structures; where there were any
checkpoints/           see `checkpoint`
export/                the model in Hub layout
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed

from moiety.data.shards import MANIFEST
from moiety.errors import InputError
from moiety.training.board import Board
from moiety.training.checkpoint import (
    WEIGHTS,
    Damaged,
    SaveFailed,
    Writer,
    complete,
    make_room,
    read_manifest,
    remove_leftovers,
    step_name,
    verify,
)
from moiety.training.engine import WeightAverage, start_distributed
from moiety.training.files import differences, write_json, write_text
from moiety.training.fragments import parameter_shapes
from moiety.training.progress import Progress
from moiety.training.snapshot import restore, take_snapshot

NONE, ALL_DAMAGED = -1, -2  # in the place of a step
FREE_TO_CHANGE = {
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "path",
    "ds",
    "hang_timeout_s",
    "tensorboard",
    "workers",
}


class Run:
    """One training run on disk. `fit` drives it; resuming needs nothing but the same command."""

    def __init__(self, path: Path, config: Any, rank: int, world_size: int) -> None:
        self.path = path
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.checkpoints = path / "checkpoints"
        self.engine: Any = None  # set by fit
        self.progress = Progress(enabled=rank == 0)
        self.failed_saves = 0
        self._board = Board(path if rank == 0 and config.training.tensorboard else None)
        self._writer = Writer(self.checkpoints, rank, world_size)
        self._pending = False  # a checkpoint was begun and not settled
        self._last_saved = True

    @classmethod
    def open(cls, out: str | Path, config: Any, fresh: bool = False) -> Run:
        """Creates or reopens a run directory; every process calls it.

        Args:
            out: the directory.
            config: the run's dataclass.
            fresh: forget an earlier run in that directory.

        Raises:
            InputError: the directory holds something else, or a run of another configuration.
        """
        path = Path(out)
        rank, world_size = start_distributed()
        run = cls(path, config, rank, world_size)
        known = path / "config.json"
        if path.exists() and not known.exists() and (not path.is_dir() or _strangers(path)):
            raise InputError(f"{path}: exists and is not a run directory; choose another --out")
        if known.exists() and not fresh:
            run._refuse_changes(json.loads(known.read_text()))
        distributed.barrier()  # nobody writes before everybody has looked
        if rank == 0:
            if fresh and known.exists():
                shutil.rmtree(path)
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(known, _plain(config))
        distributed.barrier()
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        self.progress.close()

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    def describe(self, facts: dict[str, Any]) -> None:
        """Writes run.json: what ran, on what, with which versions."""
        if self.rank == 0:
            packages = ("moiety", "torch", "deepspeed", "transformers", "vesin")
            versions = {name: metadata.version(name) for name in packages}
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            machine = {"processes": self.world_size, "threads": torch.get_num_threads(), "device": device}
            write_json(self.path / "run.json", facts | {"machine": machine, "versions": versions})

    def log(self, record: dict[str, Any], total_steps: int) -> None:
        """Appends a record on rank 0 and shows it."""
        if self.rank == 0:
            with self.log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._board.add(record)
            self.progress.show(record, total_steps)

    def log_event(self, step: int, what: str, structures: Callable[[], dict[int, list[str]]]) -> None:
        """Tells what was odd about a step, and writes down its structures by micro-batch."""
        if self.rank == 0:
            self.progress.note(f"step {step}: {what}; its structures are in {self.events_path}")
            with self.events_path.open("a") as file:
                file.write(json.dumps({"step": step, "what": what, "micro_batches": structures()}) + "\n")

    def save(self, engine: Any, average: WeightAverage, state: dict[str, Any], keep: int) -> None:
        """Begins a checkpoint, once the one before is written; every process calls it.

        A failure is told and counted, and training goes on: the earlier checkpoints are still there, and the next one
        may find the disk in a better state.
        """
        self.settle()
        problem = ""
        if self.rank == 0:
            num_bytes = self._bytes_of_checkpoint(engine, average)
            try:
                make_room(self.checkpoints, state["step"], num_bytes)
            except SaveFailed as error:
                problem = str(error)
        if self._any_rank(bool(problem)):
            self._last_saved = False
            self._tell_failure(problem)
            return
        snapshot = take_snapshot(engine, average, state["step"], {"state": state})
        self._writer.start(snapshot, keep)
        self._pending = True

    def settle(self) -> bool:
        """Waits until the checkpoint that was begun last is on the disk; False if it is not. Every process calls it."""
        if not self._pending:
            return self._last_saved
        self._writer.wait_for_own_part()
        if self._any_rank(self._writer.failure is not None):
            self._writer.give_up()
        self._writer.wait()
        self._pending = False
        self._last_saved = not self._any_rank(self._writer.failure is not None)
        if not self._last_saved:
            self._tell_failure(self._writer.failure)
        return self._last_saved

    def finish(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            SaveFailed: it is not there; the reason has been told.
        """
        if not self.settle():
            raise SaveFailed(f"{self.path}: the last checkpoint could not be written; run the same command again")

    def stop(self, exit_code: int) -> NoReturn:
        """Ends this process after the last checkpoint."""
        self.finish()
        self.progress.note(f"{self.path}: stopped as asked, after a checkpoint; the same command goes on")
        raise SystemExit(exit_code)

    def weights(self) -> dict[str, Tensor] | None:
        """The averaged weights of the newest checkpoint, whole, by name; None on other ranks than the first."""
        distributed.barrier()
        return load_file(self.checkpoints / complete(self.checkpoints)[-1] / WEIGHTS) if self.rank == 0 else None

    def resume(self, engine: Any, average: WeightAverage, mixture: dict[str, Any]) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is intact and cuts the log back to it; None where there is none.

        Damaged ones are named and put aside. The number of processes and the ZeRO stage may be others than before.

        Args:
            engine: the DeepSpeed engine.
            average: its averaged weights.
            mixture: the facts that the order of structures depends on.

        Raises:
            InputError: the checkpoint is from other data or of another model; the differences are named.
        """
        newest = self._newest_intact() if self.rank == 0 else 0
        step = torch.tensor(newest, device=engine.device)
        distributed.broadcast(step, 0)
        if step == ALL_DAMAGED:
            raise InputError(f"{self.checkpoints}: no checkpoint is intact; restore one, or start over with --fresh")
        if self.rank == 0:
            self._cut_logs(newest)
        if step == NONE:
            return None
        folder = self.checkpoints / step_name(int(step))
        manifest = read_manifest(folder)
        changed = differences(manifest["state"]["mixture"], mixture)
        for key in [key for key in changed if key.startswith("damaged")]:
            self.progress.note(f"{key}: {changed.pop(key)[1]}; from here on the structures come in another order")
        if changed:
            lines = "".join(f"\n  {key}: {old} -> {new}" for key, (old, new) in changed.items())
            raise InputError(f"{folder}: other structures, or another order:{lines}\nrestore the corpora, or --fresh")
        restore(engine, average, folder, manifest)
        before, now = manifest["world_size"], self.world_size
        ranks = "" if before == now else f", with {now} processes instead of {before}"
        self.progress.note(f"{self.path}: resumed at step {int(step)}{ranks}")
        return manifest["state"]

    def _newest_intact(self) -> int:
        """The step of the newest checkpoint whose files are what was written, NONE or ALL_DAMAGED."""
        remove_leftovers(self.checkpoints)
        problems = []
        for name in reversed(complete(self.checkpoints)):
            try:
                verify(self.checkpoints / name)
            except Damaged as error:
                problems.append((name, error))
                continue
            for damaged, error in problems:
                aside = self.checkpoints / f"{damaged}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.checkpoints / damaged).rename(aside)
                self.progress.note(f"{error}; put aside as {aside.name}")
            return int(name.removeprefix("step_"))
        if problems:
            for _, error in problems:
                self.progress.note(str(error))
            return ALL_DAMAGED
        return NONE

    def _bytes_of_checkpoint(self, engine: Any, average: WeightAverage) -> int:
        """Four bytes a number: weights, two moments, the whole model, and averages where there are any."""
        numbers = sum(torch.Size(shape).numel() for shape in parameter_shapes(engine.module).values())
        return 4 * numbers * (5 if average.means else 4)

    def _any_rank(self, flag: bool) -> bool:
        flags = torch.tensor(float(flag), device=self.engine.device)
        distributed.all_reduce(flags)
        return bool(flags > 0)

    def _tell_failure(self, problem: str | None) -> None:
        self.failed_saves += 1
        if problem:
            print(f"rank {self.rank}: {problem}; training goes on", file=sys.stderr, flush=True)

    def _cut_logs(self, last_step: int) -> None:
        """Drops what was logged after the checkpoint (those steps run again) and a line torn by a kill."""
        for path in (self.log_path, self.events_path):
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]
                write_text(path, "".join(kept))

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        changed = differences(before, _plain(self.config))
        refused = {key: values for key, values in changed.items() if key.rpartition(".")[2] not in FREE_TO_CHANGE}
        if refused:
            lines = "".join(f"\n  {key}: {old} -> {new}" for key, (old, new) in refused.items())
            raise InputError(f"{self.path}: a run of another configuration:{lines}\nuse --fresh, or another --out")
        for key, (old, new) in changed.items():
            self.progress.note(f"{key}: {old} -> {new}")


def _strangers(path: Path) -> list[Path]:
    """What is in a folder besides corpora, which may be the data of the run to come."""
    return [inside for inside in path.iterdir() if not (inside / MANIFEST).is_file()]


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON gives it back (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
