"""Corpora on disk: zstd Parquet shards beside a manifest, opened as memory-mapped Arrow.

A shard is written once, hashed, and never touched again; a corpus appears under its name only when it is complete.
Opening caches each shard as uncompressed Arrow (`.arrow/`), so that reading a structure is a slice of a mapped file.
Training opens it `checked`: a cache that is not what was written is made anew, a shard whose Parquet is damaged as well
is left out and named.
"""
# Shapes: n structures in the corpus, N nodes of one structure.

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moiety.data.columns import INTERNAL, Shard
from moiety.data.parts import PartResult, merge, sha256, write_part
from moiety.data.structure import Array, Structure
from moiety.data.validate import Verdict
from moiety.errors import InputError

MANIFEST = "manifest.json"
MOST_DAMAGED = 0.05  # share of the structures that may be left out


def write_corpus(
    structures: Iterable[Structure | Verdict],
    out_dir: str | Path,
    *,
    name: str | None = None,
    source: str = "",
    licence: str = "",
    citation: str = "",
    units: dict[str, str] | None = None,
    **manifest_fields: Any,
) -> dict[str, Any]:
    """Validates structures, writes them to shards, one set of shards a split, and describes them in a manifest.

    The directory appears when everything is written: an interrupted build leaves an earlier corpus as it was.

    Args:
        structures: what to store; a Verdict that is not ok is counted as rejected under its code.
        out_dir: where; an earlier corpus there is replaced, anything else is refused.
        name: of the corpus; the directory's name when not given.
        source: where the data came from.
        licence: SPDX identifier or a short sentence.
        citation: what to cite.
        units: label name -> unit.
        **manifest_fields: anything else that belongs in the manifest (JSON).

    Returns:
        The manifest.

    Raises:
        InputError: out_dir is in the way, or no structure passed validation.
    """
    out_dir = Path(out_dir)
    with complete_or_absent(out_dir) as partial:
        return write_manifest(
            [write_part(structures, partial)],
            partial,
            name=name or out_dir.name,
            source=source,
            licence=licence,
            citation=citation,
            units=units or {},
            **manifest_fields,
        )


def write_manifest(results: Sequence[PartResult], folder: Path, **manifest_fields: Any) -> dict[str, Any]:
    """Merges the parts that were written to `folder` and describes the whole in its manifest, which is returned.

    Raises:
        InputError: no structure of any part passed validation.
    """
    merged = merge(results, folder)
    if not merged["shards"]:
        raise InputError(
            f"{manifest_fields['name']}: no structure passed validation (rejected: {merged['counts']['rejected']})"
        )
    versions = {package: version(package) for package in ("moiety", "numpy", "pyarrow", "vesin")}
    manifest = {**manifest_fields, **merged, "versions": versions}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


class Corpus:
    """A corpus on disk, or one split of it. Cheap to open and to index, safe to share between processes."""

    def __init__(self, path: Path, manifest: dict[str, Any], split: str | None, shards: list[Shard]) -> None:
        self.damaged: dict[str, str] = {}  # file of a shard that was left out -> what is wrong with it
        self.path = path
        self.manifest = manifest
        self.split = split
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    @classmethod
    def open(cls, path: str | Path, split: str | None = None, checked: bool = False) -> Corpus:
        """Opens a corpus directory.

        Args:
            path: the directory that `write_corpus` made.
            split: "train", "val", "test" or whatever the corpus was built with; None opens everything.
            checked: hash what will be read, and do without damaged shards where they are few: see `damaged`.

        Raises:
            InputError: no such corpus or split; a shard whose checksum is not the manifest's (it is named), or more of
                them than a checked corpus can do without.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if "text" in manifest["domains"]:
            raise InputError(f"{path}: holds texts, no structures; open it with moiety.data.texts.TextCorpus")
        if split is not None and split not in manifest["splits"]:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(sorted(manifest['splits']))}")
        entries = [entry for entry in manifest["shards"] if split in (None, entry["split"])]
        if not checked:
            return cls(path, manifest, split, [Shard(mapped(path, entry)) for entry in entries])
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(lambda entry: _table_or_problem(path, entry), entries))
        corpus = cls(path, manifest, split, [Shard(table) for table in tables if isinstance(table, pa.Table)])
        corpus._leave_out({e["file"]: (e, t) for e, t in zip(entries, tables, strict=True) if isinstance(t, str)})
        return corpus

    def _leave_out(self, problems: dict[str, tuple[dict[str, Any], str]]) -> None:
        """Notes the damaged shards; InputError where they are too many."""
        self.damaged = {name: problem for name, (_, problem) in problems.items()}
        lost = sum(entry["structures"] for entry, _ in problems.values())
        if lost > MOST_DAMAGED * (lost + len(self)):
            raise InputError(
                f"{self.path}: {len(problems)} damaged shards hold {lost / (lost + len(self)):.0%} of the structures:"
                + "".join(f"\n  {problem}" for problem in self.damaged.values())
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Structure:
        """The structure with every field it was stored with; its arrays are copies."""
        index = range(len(self))[index]  # negative indices, and an IndexError that says so
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].structure(index - int(self._starts[shard]))

    def __iter__(self) -> Iterator[Structure]:
        return (self[index] for index in range(len(self)))

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        """Structures with geometry, charge, spin, role, scalars, id and domain only. Arrays are read-only views.

        `whole` ones have every field, arrays are copies; it takes several times as long.
        """
        if whole:
            return [self[index] for index in np.asarray(indices, dtype=np.int64).tolist()]
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.path}: indices must be 0 to {len(self) - 1}")
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        out: list[Any] = [None] * len(indices)
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            found = self._shards[shard].geometry(indices[places] - self._starts[shard])
            for place, structure in zip(places, found, strict=True):
                out[place] = structure
        return out

    @cached_property
    def num_nodes(self) -> Counts:
        """[n] int32, nodes of each structure."""
        return Counts([shard.column("num_nodes") for shard in self._shards])

    @cached_property
    def num_edges(self) -> Counts:
        """[n] int32, directed neighbour pairs of each structure at the manifest's cutoff."""
        return Counts([shard.column("num_edges") for shard in self._shards])

    @property
    def domain(self) -> str:
        """The domain of the structures; the most frequent one in a corpus of several."""
        return next(iter(self.manifest["domains"]))

    @property
    def scalar_names(self) -> list[str]:
        """Names of the scalar labels that at least one structure has."""
        return sorted({name for shard in self._shards for name in shard.names("scalar:")})

    def ids(self) -> list[str]:
        """The id of each structure."""
        return [value for shard in self._shards for value in shard.strings("id")]

    def groups(self, key: str) -> list[str]:
        """The value of a group key (scaffold, cluster, split, ...) of each structure, "" where it has none."""
        return [value for shard in self._shards for value in shard.strings(f"group:{key}")]

    def scalar(self, name: str) -> Array:
        """[n] float64, a named label (or "energy") of each structure, nan where it is missing.

        Raises:
            InputError: no structure has a label of that name.
        """
        column = name if name in INTERNAL else f"scalar:{name}"
        if not any(shard.has(column) for shard in self._shards):
            known = ", ".join(self.scalar_names) or "none"
            raise InputError(f"{self.path}: no label {name!r}; it has {known}")
        return np.concatenate([shard.floats(column) for shard in self._shards])

    @property
    def label_names(self) -> list[str]:
        """Columns of labels that at least one structure has, as `known` takes them."""
        columns = {name for shard in self._shards for name in shard.labels}
        return sorted(columns)

    def known(self, column: str) -> Array:
        """[n] bool: which structures have an entry in a column of the shards, such as `energy` or `scalar:gap`."""
        return np.concatenate([shard.known(column) for shard in self._shards])

    @cached_property
    def fingerprint(self) -> str:
        """One hash of what is read here: every shard's sha256, and the split."""
        parts = [entry["sha256"] for entry in self.manifest["shards"]] + [self.split or ""]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Counts:
    """[n] int32, a number of each structure, read where it lies in the mapped shards: what is asked for is copied."""

    def __init__(self, of_shards: list[Array]) -> None:
        self._of_shards = of_shards
        self._starts = np.cumsum([0, *(len(numbers) for numbers in of_shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: Array) -> Array:
        """[len(indices)] the numbers of some structures, whose indices count from 0."""
        order = np.argsort(indices, kind="stable")
        stops = np.searchsorted(indices, self._starts, sorter=order)
        out = np.empty(len(indices), dtype=np.int32)
        for shard in np.flatnonzero(np.diff(stops)):
            places = order[stops[shard] : stops[shard + 1]]
            out[places] = self._of_shards[shard][indices[places] - self._starts[shard]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.concatenate(self._of_shards).astype(dtype or np.int32, copy=False)

    def sum(self) -> int:
        return sum(int(numbers.sum(dtype=np.int64)) for numbers in self._of_shards)

    def max(self) -> int:
        return max(int(numbers.max()) for numbers in self._of_shards)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a corpus directory; InputError with the command that builds it where there is none."""
    path = Path(path)
    try:
        return json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        profile = path.parent.name if path.parent.name in ("tiny", "full") else "tiny"
        command = f"moiety data build {path.name} --profile {profile}"
        if path != Path("corpora", profile, path.name):
            command += f" --out {path}"
        raise InputError(f"{path} is not a corpus (no {MANIFEST}); build it with: {command}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path / MANIFEST} is not JSON ({error}); build the corpus again") from None


def verify(path: str | Path) -> dict[str, Any]:
    """Hashes every file of a corpus against its manifest and returns the manifest; InputError names a bad one."""
    path = Path(path)
    manifest = read_manifest(path)
    rejected = manifest.get("rejected")  # corpora of earlier versions have counts only
    for entry in [*manifest["shards"], *([rejected] if rejected else [])]:
        _verify_shard(path, entry)
    return manifest


def refuse_foreign_directory(out_dir: Path) -> None:
    """InputError where out_dir holds something that is not a corpus: it would be replaced."""
    if out_dir.exists() and not (out_dir / MANIFEST).exists() and (out_dir.is_file() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists and is not a corpus; choose another --out or remove it")


@contextlib.contextmanager
def complete_or_absent(out_dir: Path) -> Iterator[Path]:
    """A directory to write into that takes out_dir's name when the block ends well, and vanishes otherwise."""
    refuse_foreign_directory(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.partial-", dir=out_dir.parent))
    try:
        partial = aside / "new"
        partial.mkdir()
        yield partial
        if out_dir.exists():
            out_dir.rename(aside / "old")
        partial.rename(out_dir)
    finally:
        shutil.rmtree(aside)


def _verify_shard(path: Path, entry: dict[str, Any]) -> None:
    shard = path / entry["file"]
    if not shard.exists():
        raise InputError(f"{shard} is missing; build the corpus again")
    if sha256(shard) != entry["sha256"]:
        raise InputError(f"{shard}: checksum mismatch, the file is damaged or was changed; build the corpus again")


def mapped(path: Path, entry: dict[str, Any], checked: bool = False) -> pa.Table:
    """The shard as memory-mapped Arrow, made from the verified Parquet when it is new or has been touched.

    With `checked` also when the Arrow is not what was written.
    """
    shard = path / entry["file"]
    mtime = shard.stat().st_mtime_ns if shard.exists() else 0
    stamp = f"{entry['sha256']} {mtime}".encode()
    cached = _cache_folder(path) / f"{shard.stem}.arrow"
    seal = cached.with_suffix(".sha256")
    if cached.exists() and (not checked or (seal.exists() and seal.read_text() == sha256(cached))):
        table = _open_arrow(cached)
        if (table.schema.metadata or {}).get(b"shard") == stamp:
            return table
    _verify_shard(path, entry)
    table = pq.read_table(shard).combine_chunks().replace_schema_metadata({b"shard": stamp})
    cached.parent.mkdir(parents=True, exist_ok=True)
    aside = cached.with_suffix(f".{os.getpid()}")  # several ranks may open a new corpus at once
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    aside_seal = aside.with_suffix(f"{aside.suffix}.sha256")
    aside_seal.write_text(sha256(aside))
    aside.replace(cached)
    aside_seal.replace(seal)
    return _open_arrow(cached)


def _table_or_problem(path: Path, entry: dict[str, Any]) -> pa.Table | str:
    try:
        return mapped(path, entry, checked=True)
    except InputError as error:
        return str(error)


def _cache_folder(path: Path) -> Path:
    """Beside the shards; in the user's cache where the corpus is read-only."""
    if os.access(path, os.W_OK):
        return path / ".arrow"
    root = Path(os.environ.get("MOIETY_CACHE", Path.home() / ".cache" / "moiety"))
    return root / "arrow" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


def _open_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
