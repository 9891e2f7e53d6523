"""A part of a corpus: read, validated and written by itself, so that shards do not depend on who wrote them.

A part's shards are named {split}-{part}-{index}.parquet and depend on the part's structures alone. When all parts are
written they are merged in their order: ids that an earlier part has are taken out, and the lists of rejected structures
become one file. A part leaves two notes for the merge, both hidden: its rejected list and a hash of every id.
"""
# Shapes: n structures of a part.

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moiety.data.columns import table_from
from moiety.data.structure import Array, Structure
from moiety.data.validate import Verdict, check

CUTOFF = 5.0  # Å, of the neighbour counts that are stored with every structure
NODES_PER_SHARD = 500_000
CHUNK = 256  # structures validated and counted at a time
REJECTED = "rejected.jsonl"


@dataclass
class PartResult:
    """What one part contributes to the manifest."""

    number: int
    num_in: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)  # by code
    noted: Counter[str] = field(default_factory=Counter)  # structures that are ok under another code than "ok"
    domains: Counter[str] = field(default_factory=Counter)
    num_nodes: int = 0
    num_edges: int = 0


def write_part(
    items: Iterable[Structure | Verdict],
    folder: Path,
    number: int = 0,
    report: Callable[[int], None] | None = None,
    prefix: str = "",
) -> PartResult:
    """Validates structures and writes them to shards, one set of shards a split.

    Args:
        items: what to store; a Verdict that is not ok is rejected under its code.
        folder: where the shards go.
        number: of the part.
        report: called with the number of items seen so far, every CHUNK or so.
        prefix: of the ids of structures that have none, before their place in the part.
    """
    return _PartWriter(folder, number, report or (lambda seen: None), prefix).write(items)


class _PartWriter:
    """Collects structures by split, flushes full buffers to Parquet, and keeps the counts."""

    def __init__(self, folder: Path, number: int, report: Callable[[int], None], prefix: str) -> None:
        self.folder = folder
        self.result = PartResult(number)
        self.report = report
        self.prefix = prefix
        self.seen: set[str] = set()
        self.id_hashes: list[Array] = []  # of each shard's structures, in the order of the shards
        self.buffers: dict[str, list[Structure]] = {}
        self.edges: dict[str, list[int]] = {}
        self.waiting: Counter[str] = Counter()  # nodes in each buffer

    def write(self, items: Iterable[Structure | Verdict]) -> PartResult:
        for chunk in _chunks(self._accepted(items), CHUNK):
            for structure, num_edges in zip(chunk, count_edges(chunk), strict=True):
                split = structure.groups.get("split", "data")
                self.buffers.setdefault(split, []).append(structure)
                self.edges.setdefault(split, []).append(int(num_edges))
                self.waiting[split] += structure.num_nodes
            for split, num_nodes in self.waiting.items():
                if num_nodes >= NODES_PER_SHARD:
                    self._flush(split)
            self.report(self.result.num_in)
        for split in self.buffers:
            self._flush(split)
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *self.id_hashes])
        np.save(hash_file(self.folder, self.result.number), hashes)
        return self.result

    def _accepted(self, items: Iterable[Structure | Verdict]) -> Iterator[Structure]:
        with rejected_file(self.folder, self.result.number).open("w", encoding="utf-8") as rejected:
            for place, item in enumerate(items):
                self.result.num_in += 1
                if isinstance(item, Verdict) and not item.ok:
                    self._reject(rejected, f"{item.file}#{item.index}", item.code, item.reason)
                    continue
                structure = item.structure if isinstance(item, Verdict) else item
                assert structure is not None  # a verdict that is ok carries its structure
                structure.id = structure.id or f"{self.prefix}{place}"
                if structure.id in self.seen:
                    self._reject(rejected, structure.id, "duplicate-id", "the id was there before")
                elif problem := check(structure):
                    self._reject(rejected, structure.id, *problem[:2])
                else:
                    self.seen.add(structure.id)
                    self.result.domains[structure.domain] += 1
                    if isinstance(item, Verdict) and item.code != "ok":
                        self.result.noted[item.code] += 1
                    yield structure

    def _reject(self, rejected: Any, identity: str, code: str, reason: str) -> None:
        self.result.rejected[code] += 1
        rejected.write(rejected_line(identity, code, reason))

    def _flush(self, split: str) -> None:
        structures, self.buffers[split] = self.buffers[split], []
        num_edges, self.edges[split] = self.edges[split], []
        num_nodes, self.waiting[split] = self.waiting[split], 0
        if not structures:
            return
        index = sum(shard["split"] == split for shard in self.result.shards)
        path = self.folder / f"{split}-{self.result.number:05d}-{index:05d}.parquet"
        table = table_from(structures, np.array(num_edges, dtype=np.int32))
        self.result.shards.append({"file": path.name, "split": split, **write_table(table, path)})
        self.result.num_nodes += num_nodes
        self.result.num_edges += sum(num_edges)
        self.id_hashes.append(np.array([id_hash(structure.id) for structure in structures], dtype=np.uint64))


def merge(results: Sequence[PartResult], folder: Path) -> dict[str, Any]:
    """Takes out ids that an earlier part has, joins the rejected lists, and gives the counts of the manifest.

    Args:
        results: of all parts, in the order of the parts.
        folder: where they were written.
    """
    _take_out_repeated(results, folder)
    rejected: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    with (folder / REJECTED).open("wb") as joined:
        for result in results:
            path = rejected_file(folder, result.number)
            joined.write(path.read_bytes())
            path.unlink()
            rejected.update(result.rejected)
            noted.update(result.noted)
            domains.update(result.domains)
    shards = sorted(
        (
            (shard["split"], result.number, place, shard)
            for result in results
            for place, shard in enumerate(result.shards)
        ),
        key=lambda entry: entry[:3],
    )
    for split, _, _, shard in shards:
        splits[split] += shard["structures"]
    counts = {
        "in": sum(result.num_in for result in results),
        "ok": splits.total(),
        "rejected": dict(sorted(rejected.items())),
        **({"noted": dict(sorted(noted.items()))} if noted else {}),  # as read: repeated ids are not taken off
    }
    assert counts["in"] == counts["ok"] + rejected.total()
    return {
        "counts": counts,
        "rejected": {"file": REJECTED, "structures": rejected.total(), "sha256": sha256(folder / REJECTED)},
        "splits": dict(splits),
        "domains": {name: number for name, number in domains.most_common() if number},
        "num_nodes": sum(result.num_nodes for result in results),
        "num_edges": sum(result.num_edges for result in results),
        "cutoff": CUTOFF,
        "shards": [shard for *_, shard in shards],
    }


def _take_out_repeated(results: Sequence[PartResult], folder: Path) -> None:
    """Rejects ids that an earlier part has. Hashes find the suspects: 8 bytes a structure; their ids decide."""
    hashes = [np.load(hash_file(folder, result.number)) for result in results]
    every = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)
    suspects = np.unique(every[1:][every[1:] == every[:-1]])
    seen: set[str] = set()
    for result, hash_n in zip(results, hashes, strict=True):
        if (suspect_n := np.isin(hash_n, suspects)).any():
            _reject_seen(result, suspect_n, seen, folder)
        hash_file(folder, result.number).unlink()


def _reject_seen(result: PartResult, suspect_n: Array, seen: set[str], folder: Path) -> None:
    """Rewrites the shards of a part that hold an id of `seen` among the suspect rows [n], and adds the others to it."""
    start = 0
    for shard in list(result.shards):
        stop = start + shard["structures"]
        rows, start = np.flatnonzero(suspect_n[start:stop]), stop
        path = folder / shard["file"]
        ids = pq.read_table(path, columns=["id"])["id"].take(pa.array(rows)).to_pylist() if len(rows) else []
        repeated = {row: name for row, name in zip(rows.tolist(), ids, strict=True) if name in seen}
        seen.update(ids)
        if not repeated:
            continue
        table = pq.read_table(path)
        gone = table.take(pa.array(list(repeated)))
        kept = table.filter(pa.array(~np.isin(np.arange(len(table)), list(repeated))))
        result.num_nodes -= int(gone["num_nodes"].to_numpy().sum())
        result.num_edges -= int(gone["num_edges"].to_numpy().sum())
        result.domains.subtract(gone["domain"].to_pylist())
        result.rejected["duplicate-id"] += len(repeated)
        with rejected_file(folder, result.number).open("a", encoding="utf-8") as rejected:
            for name in repeated.values():
                rejected.write(rejected_line(name, "duplicate-id", "an earlier part of the corpus has the id"))
        if len(kept):
            shard.update(write_table(kept, path))
        else:
            path.unlink()
            result.shards.remove(shard)


def write_table(table: pa.Table, path: Path) -> dict[str, Any]:
    """Writes a shard and describes it. The file depends on the table and on pyarrow's version alone."""
    pq.write_table(table, path, compression="zstd")
    return {"structures": len(table), "bytes": path.stat().st_size, "sha256": sha256(path)}


def rejected_line(identity: str, code: str, reason: str) -> str:
    return json.dumps({"id": identity, "code": code, "reason": reason}, ensure_ascii=False) + "\n"


def rejected_file(folder: Path, number: int) -> Path:
    return folder / f".rejected-{number:05d}.jsonl"


def hash_file(folder: Path, number: int) -> Path:
    return folder / f".ids-{number:05d}.npy"


def id_hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


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


def _chunks(items: Iterator[Structure], size: int) -> Iterator[list[Structure]]:
    chunk: list[Structure] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
