"""Checkpoints: a folder under its name is complete and was read back; everything else is a `.partial`.

step_00000250/
  rank_00000.safetensors ...   what each rank held: pieces of weights, moments and averages (see fragments)
  model.safetensors            the averaged weights, whole; with config.json a directory for `from_pretrained`
  config.json
  manifest.json                state of the run, what the model says of the probe, size and sha256 of every file
latest                         the newest step's name, for people and scripts

Ranks copy their pieces, which takes milliseconds, and train on while a thread writes: to the disk, back from it,
compared, hashed; then rank 0 lists everything in the manifest and renames the folder. Nothing here is a pickle.
"""
# Shapes: all tensors of the rank files are flat.

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moiety.data.parts import sha256
from moiety.errors import InputError
from moiety.training.files import sync_folder, write_text
from moiety.training.fragments import Span

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
FORMAT = 2
POLL = 0.02  # s between two looks for the other ranks' files
SPARE = 1.05  # room that is asked for, in sizes of the checkpoint


class Damaged(InputError):
    """A checkpoint that is not what was written; the message names the file."""


class SaveFailed(Exception):
    """A checkpoint that could not be written. Earlier ones are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """Copies of what a rank writes: training goes on while they are written."""

    step: int
    spans: list[Span]
    tensors: dict[str, Tensor]  # weight, exp_avg, exp_avg_sq, average where there is one; one after the other as spans
    facts: dict[str, Any]  # the rest of the manifest: rank 0's are written
    shapes: dict[str, list[int]]  # of all parameters
    config: str  # the model's config.json


class Writer:
    """Writes one checkpoint after the other from a thread; `failure` tells what went wrong with the last one."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.failure: str | None = None
        self._thread: threading.Thread | None = None
        self._own_part_done = threading.Event()
        self._give_up = threading.Event()

    def start(self, snapshot: Snapshot, keep: int) -> None:
        """Begins to write; the one before must be finished."""
        assert self._thread is None or not self._thread.is_alive()
        self.failure = None
        self._own_part_done.clear()
        self._give_up.clear()
        self._thread = threading.Thread(target=self._run, args=(snapshot, keep), name="checkpoint", daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """Tells rank 0 not to wait for a rank whose part has failed."""
        self._give_up.set()

    def wait_for_own_part(self) -> None:
        self._own_part_done.wait()

    def wait(self) -> None:
        """On rank 0 until the whole checkpoint is there."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, snapshot: Snapshot, keep: int) -> None:
        partial = self.folder / f"{step_name(snapshot.step)}.partial"
        try:
            write_rank(partial, self.rank, snapshot)
            self._own_part_done.set()
            if self.rank == 0:
                entries = self._entries_of_all(partial)
                entries |= write_weights(partial, snapshot, self.world_size)
                commit(partial, entries, snapshot.facts | {"parameters": snapshot.shapes})
                prune(self.folder, keep)
        except Exception as error:  # whatever it is: training goes on, and says that it has no new checkpoint
            reason = error if isinstance(error, SaveFailed) else f"{type(error).__name__}: {error}"
            self.failure = f"{partial.with_suffix('')}: not written: {reason}"
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            self._own_part_done.set()

    def _entries_of_all(self, partial: Path) -> dict[str, Any]:
        """The manifest's entries of the rank files, once all of them are there."""
        entries: dict[str, Any] = {}
        while len(entries) < self.world_size:
            entries = {}
            for path in partial.glob("rank_*.json"):
                entries[f"{path.stem}.safetensors"] = json.loads(path.read_text())
            if self._give_up.is_set():
                raise SaveFailed("another rank could not write its part")
            time.sleep(POLL if len(entries) < self.world_size else 0)
        for path in partial.glob("rank_*.json"):
            path.unlink()
        return entries


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def make_room(folder: Path, step: int, num_bytes: int) -> Path:
    """The empty folder that a checkpoint is written to.

    Raises:
        SaveFailed: the disk has no room for it.
    """
    partial = folder / f"{step_name(step)}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SaveFailed(f"{partial.with_suffix('')}: not written: {error}") from error
    if free < SPARE * num_bytes:
        partial.rmdir()
        raise SaveFailed(
            f"{partial.with_suffix('')}: not written: it needs {SPARE * num_bytes / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free"
        )
    return partial


def write_rank(partial: Path, rank: int, snapshot: Snapshot) -> None:
    """A rank's file, read back and compared, then its size and sha256 beside it for rank 0."""
    for name, tensor in snapshot.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SaveFailed(f"{name} of {_first_bad(snapshot.spans, tensor)} is not finite")
    path = partial / f"rank_{rank:05d}.safetensors"
    save_file(snapshot.tensors, path, metadata={"spans": json.dumps(snapshot.spans)})
    entry = _settle(path, snapshot.tensors)
    write_text(path.with_suffix(".json"), json.dumps(entry))


def write_weights(partial: Path, snapshot: Snapshot, world_size: int) -> dict[str, Any]:
    """The whole model from the pieces in the rank files, and its configuration; returns their manifest entries."""
    kind = "average" if "average" in snapshot.tensors else "weight"
    pieces = Pieces(partial, world_size)
    weights = {}
    for name, shape in snapshot.shapes.items():
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        pieces.fill(flat, Span(name, 0, len(flat)), kind)
        weights[name] = flat.view(shape)
    save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    write_text(partial / "config.json", snapshot.config)
    return {WEIGHTS: _settle(partial / WEIGHTS, weights), "config.json": _entry(partial / "config.json")}


def commit(partial: Path, entries: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Lists the files in the manifest; from the renaming on the checkpoint exists."""
    content = {"format": FORMAT, "files": dict(sorted(entries.items())), **facts}
    write_text(partial / MANIFEST, _sealed(content))
    sync_folder(partial)
    folder = partial.with_suffix("")
    partial.rename(folder)
    sync_folder(folder.parent)
    write_text(folder.parent / "latest", folder.name)


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the newest; a folder loses its name first, so that a kill leaves no half of one."""
    for name in complete(checkpoints)[:-keep]:
        doomed = checkpoints / f"{name}.partial"
        (checkpoints / name).rename(doomed)
        shutil.rmtree(doomed)


def complete(checkpoints: Path) -> list[str]:
    """Names of the checkpoints, oldest first; whether they are still intact is for `verify` to say."""
    return sorted(path.name for path in checkpoints.glob("step_*") if not path.suffix)


def remove_leftovers(checkpoints: Path) -> None:
    """What earlier kills left half written or half removed."""
    for path in checkpoints.glob("step_*.partial"):
        shutil.rmtree(path)
    for path in checkpoints.glob("*.tmp"):
        path.unlink()


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has its size and its sha256.

    Raises:
        Damaged: naming the first file that has not.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise Damaged(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise Damaged(f"{path} is damaged: its sha256 is not the manifest's")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, which carries its own hash.

    Raises:
        Damaged: it is missing, not what was written, or of another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    try:
        content = json.loads(text)
        del content["sha256"]
        intact = _sealed(content).encode() == text
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise Damaged(f"{path} is damaged: its own sha256 does not fit")
    if content["format"] != FORMAT:
        raise Damaged(f"{path} has format {content['format']}, this version reads {FORMAT}")
    return content


class Pieces:
    """The rank files of a checkpoint, whoever wrote them, as one address space of parameters."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._files = [safe_open(folder / f"rank_{rank:05d}.safetensors", "pt") for rank in range(world_size)]
        self._places: dict[str, list[tuple[Span, int, int]]] = defaultdict(list)  # span, file, offset in it
        for number, file in enumerate(self._files):
            offset = 0
            for fields in json.loads(file.metadata()["spans"]):
                span = Span(*fields)
                self._places[span.name].append((span, number, offset))
                offset += span.length

    def fill(self, target: Tensor, wanted: Span, kind: str) -> None:
        """Copies a span into a flat tensor; ValueError where the files together do not hold all of it."""
        filled = 0
        for span, number, offset in self._places[wanted.name]:
            low = max(span.start, wanted.start)
            high = min(span.start + span.length, wanted.start + wanted.length)
            if low < high:
                first = offset + low - span.start
                piece = self._files[number].get_slice(kind)[first : first + high - low]
                target[low - wanted.start : high - wanted.start].copy_(piece)
                filled += high - low
        if filled != wanted.length:
            raise ValueError(f"{wanted.name}: {filled} of {wanted.length} numbers of {kind} in the checkpoint")


def _settle(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sees a file safely on the disk and reads it back; returns its manifest entry."""
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it, whatever the umask
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with safe_open(path, "pt") as found:  # one after the other: all of them are already held once
        same = all(torch.equal(found.get_tensor(name), tensor) for name, tensor in expected.items())
    if not same:
        raise SaveFailed(f"{path} reads back other than it was written")
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _sealed(content: Mapping[str, Any]) -> str:
    """A manifest's text; its last line is the hash of what stands before."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def _first_bad(spans: Sequence[Span], tensor: Tensor) -> str:
    place = int((~torch.isfinite(tensor)).nonzero()[0])
    for span in spans:
        if place < span.length:
            return span.name
        place -= span.length
    raise AssertionError("spans cover the tensor")
