"""A run directory: what was asked, what happened, and everything needed to go on after a kill.

config.json            the configuration; a run only resumes with the same one
run.json               what ran: parameters, corpora, machine, versions
log.jsonl              one record every `training.log_every` steps
checkpoints/step_N/    DeepSpeed's files, each rank's averaged weights, state.json; complete.json is written last
checkpoints/latest     the newest complete checkpoint
export/                the model in Hub layout
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from moiety.errors import InputError
from moiety.training.engine import WeightAverage, start_distributed
from moiety.training.progress import Progress

FREE_TO_CHANGE = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "path"}


class Run:
    """One training run on disk. `fit` drives it; resuming needs nothing but the same command."""

    def __init__(self, path: Path, config: Any, rank: int, world_size: int) -> None:
        self.path = path
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.checkpoints = path / "checkpoints"
        self.engine: Any = None  # set by fit, with the averaged weights, for export
        self.average: WeightAverage | None = None
        self.progress = Progress(enabled=rank == 0)

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
        if path.exists() and not known.exists() and (not path.is_dir() or any(path.iterdir())):
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
        self.progress.close()

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

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
            self.progress.show(record, total_steps)

    def save(self, engine: Any, average: WeightAverage, state: dict[str, Any], keep: int) -> None:
        """Writes a checkpoint. It counts only once complete.json lists every file, so a torn one is never chosen."""
        tag = f"step_{state['step']:08d}"
        folder = self.checkpoints / tag
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier kill left half written
        distributed.barrier()
        engine.save_checkpoint(str(self.checkpoints), tag=tag, save_latest=False)
        torch.save(average.means, folder / f"average_rank_{self.rank}.pt")
        distributed.barrier()
        if self.rank == 0:
            write_json(folder / "state.json", state | {"world_size": self.world_size})
            write_json(folder / "complete.json", {p.name: p.stat().st_size for p in _files(folder)})
            write_text(self.checkpoints / "latest", tag)
            for old in self._complete()[:-keep]:
                shutil.rmtree(self.checkpoints / old)
        distributed.barrier()

    def resume(self, engine: Any, average: WeightAverage, mixture_fingerprint: str) -> dict[str, Any] | None:
        """Loads the newest complete checkpoint and cuts the log back to it; None where there is none.

        Raises:
            InputError: the checkpoint was written by another number of processes or from other data.
        """
        tag = next(reversed(self._complete()), None)
        state = json.loads((self.checkpoints / tag / "state.json").read_text()) if tag else None
        distributed.barrier()
        if self.rank == 0:
            self._cut_log(state["step"] if state else 0)
        if tag is None or state is None:
            return None
        for what, now, remedy in (
            ("world_size", self.world_size, "start as many processes as before"),
            ("mixture", mixture_fingerprint, "restore the corpora"),
        ):
            if state[what] != now:
                raise InputError(f"{self.checkpoints / tag}: {what} was {state[what]}, now {now}; {remedy}, or --fresh")
        engine.load_checkpoint(str(self.checkpoints), tag=tag)
        means = torch.load(self.checkpoints / tag / f"average_rank_{self.rank}.pt", weights_only=True)
        for mean, loaded in zip(average.means, means, strict=True):
            mean.copy_(loaded)
        self.progress.note(f"{self.path}: resumed at step {state['step']}")
        return state

    def _complete(self) -> list[str]:
        """Tags of checkpoints whose every listed file is there with its size, oldest first."""
        tags = []
        for marker in sorted(self.checkpoints.glob("step_*/complete.json")):
            sizes = json.loads(marker.read_text())
            if all((marker.parent / n).is_file() and (marker.parent / n).stat().st_size == s for n, s in sizes.items()):
                tags.append(marker.parent.name)
        return tags

    def _cut_log(self, last_step: int) -> None:
        """Drops what was logged after the checkpoint (those steps run again) and a line torn by a kill."""
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]
        write_text(self.log_path, "".join(kept))

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        old, new = _flatten(before), _flatten(_plain(self.config))
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        refused = [key for key in changed if key.rpartition(".")[2] not in FREE_TO_CHANGE]
        if refused:
            lines = "".join(f"\n  {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in refused)
            raise InputError(f"{self.path}: a run of another configuration:{lines}\nuse --fresh, or another --out")
        for key in changed:
            self.progress.note(f"{key}: {old.get(key)} -> {new.get(key)}")


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it sees the old or the new text, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON gives it back (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {key: value for name, inner in items for key, value in _flatten(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: node}
