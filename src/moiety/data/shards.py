"""Corpora on disk: zstd Parquet shards beside a manifest, opened as memory-mapped Arrow.

A shard is written once, hashed, and never touched again; a corpus appears under its name only when it is complete.
Opening caches each shard as uncompressed Arrow (`.arrow/`), so that reading a structure is a slice of a mapped file.
"""
# Shapes: n structures in the corpus, N nodes of one structure.

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moiety.data.columns import INTERNAL, Shard, table_from
from moiety.data.structure import Array, Structure
from moiety.data.validate import Verdict, check
from moiety.errors import InputError

CUTOFF = 5.0  # Å, of the neighbour counts that are stored with every structure
NODES_PER_SHARD = 500_000
CHUNK = 256  # structures validated and counted at a time
MANIFEST = "manifest.json"


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
    refuse_foreign_directory(out_dir)
    writer = _ShardWriter()
    with _complete_or_absent(out_dir) as partial:
        writer.write(structures, partial)
        if not writer.shards:
            raise InputError(f"{out_dir}: no structure passed validation (rejected: {dict(writer.rejected)})")
        manifest = {
            "name": name or out_dir.name,
            "source": source,
            "licence": licence,
            "citation": citation,
            "units": units or {},
            **manifest_fields,
            **writer.summary(),
            "versions": {package: version(package) for package in ("moiety", "numpy", "pyarrow", "vesin")},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


class _ShardWriter:
    """Collects structures by split, flushes full buffers to Parquet, and keeps the counts of the manifest."""

    def __init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.rejected: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.buffers: dict[str, list[Structure]] = {}
        self.edges: dict[str, list[int]] = {}
        self.waiting: Counter[str] = Counter()  # nodes in each buffer

    def write(self, items: Iterable[Structure | Verdict], folder: Path) -> None:
        for chunk in _chunks(self._accepted(items), CHUNK):
            for structure, num_edges in zip(chunk, count_edges(chunk), strict=True):
                split = structure.groups.get("split", "data")
                self.buffers.setdefault(split, []).append(structure)
                self.edges.setdefault(split, []).append(int(num_edges))
                self.waiting[split] += structure.num_nodes
            for split, num_nodes in self.waiting.items():
                if num_nodes >= NODES_PER_SHARD:
                    self._flush(split, folder)
        for split in self.buffers:
            self._flush(split, folder)

    def _accepted(self, items: Iterable[Structure | Verdict]) -> Iterator[Structure]:
        for item in items:
            self.totals["in"] += 1
            if isinstance(item, Verdict) and not item.ok:
                self.rejected[item.code] += 1
                continue
            structure = item.structure if isinstance(item, Verdict) else item
            assert structure is not None  # a verdict that is ok carries its structure
            structure.id = structure.id or str(self.totals["in"] - 1)
            problem = check(structure)
            code = "duplicate-id" if structure.id in self.seen else problem and problem[0]
            if code:
                self.rejected[code] += 1
                continue
            self.seen.add(structure.id)
            self.domains[structure.domain] += 1
            yield structure

    def _flush(self, split: str, folder: Path) -> None:
        structures, self.buffers[split] = self.buffers[split], []
        num_edges, self.edges[split] = self.edges[split], []
        num_nodes, self.waiting[split] = self.waiting[split], 0
        if not structures:
            return
        index = sum(shard["split"] == split for shard in self.shards)
        path = folder / f"{split}-{index:05d}.parquet"
        table = table_from(structures, np.array(num_edges, dtype=np.int32))
        pq.write_table(table, path, compression="zstd")
        self.totals.update(structures=len(structures), nodes=num_nodes, edges=sum(num_edges))
        self.shards.append(
            {
                "file": path.name,
                "split": split,
                "structures": len(structures),
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        )

    def summary(self) -> dict[str, Any]:
        splits: Counter[str] = Counter()
        for shard in self.shards:
            splits[shard["split"]] += shard["structures"]
        counts = {
            "in": self.totals["in"],
            "ok": self.totals["structures"],
            "rejected": dict(sorted(self.rejected.items())),
        }
        assert counts["in"] == counts["ok"] + self.rejected.total()
        return {
            "counts": counts,
            "splits": dict(splits),
            "domains": dict(self.domains.most_common()),
            "num_nodes": self.totals["nodes"],
            "num_edges": self.totals["edges"],
            "cutoff": CUTOFF,
            "shards": sorted(self.shards, key=lambda shard: shard["file"]),
        }


class Corpus:
    """A corpus on disk, or one split of it. Cheap to open and to index, safe to share between processes."""

    def __init__(self, path: Path, manifest: dict[str, Any], split: str | None, shards: list[Shard]) -> None:
        self.path = path
        self.manifest = manifest
        self.split = split
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    @classmethod
    def open(cls, path: str | Path, split: str | None = None) -> Corpus:
        """Opens a corpus directory.

        Args:
            path: the directory that `write_corpus` made.
            split: "train", "val", "test" or whatever the corpus was built with; None opens everything.

        Raises:
            InputError: no such corpus or split, or a shard whose checksum is not the manifest's (it is named).
        """
        path = Path(path)
        manifest = read_manifest(path)
        if split is not None and split not in manifest["splits"]:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(sorted(manifest['splits']))}")
        entries = [entry for entry in manifest["shards"] if split in (None, entry["split"])]
        return cls(path, manifest, split, [Shard(_mapped(path, entry)) for entry in entries])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Structure:
        """The structure with every field it was stored with; its arrays are copies."""
        index = range(len(self))[index]  # negative indices, and an IndexError that says so
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].structure(index - int(self._starts[shard]))

    def __iter__(self) -> Iterator[Structure]:
        return (self[index] for index in range(len(self)))

    def read(self, indices: Sequence[int] | Array) -> list[Structure]:
        """Structures with geometry, charge, spin, role, scalars, id and domain only. Arrays are read-only views."""
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
    def num_nodes(self) -> Array:
        """[n] int32, nodes of each structure."""
        return np.concatenate([shard.column("num_nodes") for shard in self._shards])

    @cached_property
    def num_edges(self) -> Array:
        """[n] int32, directed neighbour pairs of each structure at the manifest's cutoff."""
        return np.concatenate([shard.column("num_edges") for shard in self._shards])

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

    @cached_property
    def fingerprint(self) -> str:
        """One hash of what is read here: every shard's sha256, and the split."""
        parts = [entry["sha256"] for entry in self.manifest["shards"]] + [self.split or ""]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
    """Hashes every shard of a corpus against its manifest and returns the manifest; InputError names a bad shard."""
    path = Path(path)
    manifest = read_manifest(path)
    for entry in manifest["shards"]:
        _verify_shard(path, entry)
    return manifest


def count_edges(structures: Sequence[Structure], cutoff: float = CUTOFF) -> Array:
    """[len(structures)] int32, directed neighbour pairs of each structure: what a batch of it will cost."""
    from moiety.models.feature_extraction_moiety import neighbor_list, pack  # torch: building needs it, reading not

    arrays = pack([vars(structure) for structure in structures])
    edge_index, _ = neighbor_list(
        arrays["positions"], arrays["node_type"], arrays["graph_index"], arrays["cell"], arrays["pbc"], cutoff
    )
    return np.bincount(arrays["graph_index"][edge_index[1]], minlength=len(structures)).astype(np.int32)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign_directory(out_dir: Path) -> None:
    """InputError where out_dir holds something that is not a corpus: it would be replaced."""
    if out_dir.exists() and not (out_dir / MANIFEST).exists() and (out_dir.is_file() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists and is not a corpus; choose another --out or remove it")


@contextlib.contextmanager
def _complete_or_absent(out_dir: Path) -> Iterator[Path]:
    """A directory to write into that takes out_dir's name when the block ends well, and vanishes otherwise."""
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


def _mapped(path: Path, entry: dict[str, Any]) -> pa.Table:
    """The shard as memory-mapped Arrow, made from the verified Parquet when it is new or has been touched."""
    shard = path / entry["file"]
    mtime = shard.stat().st_mtime_ns if shard.exists() else 0
    stamp = f"{entry['sha256']} {mtime}".encode()
    cached = _cache_folder(path) / f"{shard.stem}.arrow"
    if cached.exists():
        table = _open_arrow(cached)
        if (table.schema.metadata or {}).get(b"shard") == stamp:
            return table
    _verify_shard(path, entry)
    table = pq.read_table(shard).combine_chunks().replace_schema_metadata({b"shard": stamp})
    cached.parent.mkdir(parents=True, exist_ok=True)
    aside = cached.with_suffix(f".{os.getpid()}")  # several ranks may open a new corpus at once
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    aside.replace(cached)
    return _open_arrow(cached)


def _cache_folder(path: Path) -> Path:
    """Beside the shards; in the user's cache where the corpus is read-only."""
    if os.access(path, os.W_OK):
        return path / ".arrow"
    root = Path(os.environ.get("MOIETY_CACHE", Path.home() / ".cache" / "moiety"))
    return root / "arrow" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


def _open_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _chunks(items: Iterator[Structure], size: int) -> Iterator[list[Structure]]:
    chunk: list[Structure] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
