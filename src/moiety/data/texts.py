"""Corpora of texts: a name, a header, a description or an answer, what it is about, and the structure it belongs to.

Texts lie on disk as structures do: zstd Parquet shards by split beside a manifest, opened as memory-mapped Arrow. A
text that belongs to a structure names the structure's corpus and id; its geometry stays there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moiety.data.parts import PartResult, hash_file, id_hash, rejected_file, rejected_line, write_table
from moiety.data.shards import mapped, read_manifest
from moiety.data.validate import Verdict
from moiety.errors import InputError

DOMAIN = "text"
LETTERS_PER_SHARD = 50_000_000  # of texts, prompts and keys: far below the 2 GiB that an Arrow column of strings holds
REPORT_EVERY = 4096  # texts


@dataclass(frozen=True)
class Text:
    """One text and what it is about; a row of the table."""

    id: str  # unique in its corpus
    kind: str  # name | iupac | header | description | caption | instruction | mutant
    text: str
    key: str  # what it is about: SMILES, sequence, formula and prototype; "" where it stands for itself
    split: str
    prompt: str = ""  # the question that the text answers
    value: float | None = None  # a measured number that belongs to it; the unit stands in the manifest
    corpus: str | None = None  # of the structure it belongs to
    structure: str | None = None  # id of that structure


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "kind", "text", "key", "split", "prompt")]
    + [("value", pa.float64()), ("corpus", pa.string()), ("structure", pa.string())]
)


@dataclass
class TextPart(PartResult):
    """What one part of a corpus of texts contributes to the manifest."""

    kinds: Counter[str] = field(default_factory=Counter)


def write_text_part(
    items: Iterable[Text | Verdict], folder: Path, number: int = 0, report: Callable[[int], None] | None = None
) -> TextPart:
    """Writes texts to shards, one set of shards a split.

    Args:
        items: what to store; a Verdict is rejected under its code, an empty text as missing-field, an id that was there
            before as duplicate-id.
        folder: where the shards go.
        number: of the part.
        report: called with the number of items seen so far.
    """
    result = TextPart(number)
    buffers: dict[str, list[Text]] = {}
    letters: Counter[str] = Counter()  # in each buffer
    hashes: list[np.ndarray] = []
    with rejected_file(folder, number).open("w", encoding="utf-8") as rejected:
        for text in _accepted(items, result, rejected, report or (lambda seen: None)):
            buffers.setdefault(text.split, []).append(text)
            letters[text.split] += len(text.text) + len(text.key) + len(text.prompt)
            if letters[text.split] >= LETTERS_PER_SHARD:
                hashes.append(_flush(buffers.pop(text.split), folder, result))
                letters[text.split] = 0
        hashes += [_flush(buffer, folder, result) for buffer in buffers.values()]
    np.save(hash_file(folder, number), np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]))
    return result


def _accepted(
    items: Iterable[Text | Verdict], result: TextPart, rejected: Any, report: Callable[[int], None]
) -> Iterator[Text]:
    seen: set[str] = set()
    for item in items:
        result.num_in += 1
        if result.num_in % REPORT_EVERY == 0:
            report(result.num_in)
        if isinstance(item, Verdict):
            identity, code, reason = f"{item.file}#{item.index}", item.code, item.reason
        elif item.id in seen:
            identity, code, reason = item.id, "duplicate-id", "the id was there before"
        elif not item.text.strip():
            identity, code, reason = item.id, "missing-field", "the text is empty"
        else:
            seen.add(item.id)
            result.kinds[item.kind] += 1
            result.domains[DOMAIN] += 1
            yield item
            continue
        result.rejected[code] += 1
        rejected.write(rejected_line(identity, code, reason))


def _flush(texts: Sequence[Text], folder: Path, result: TextPart) -> np.ndarray:
    """Writes one shard; the hash of every id in it."""
    split = texts[0].split
    index = sum(shard["split"] == split for shard in result.shards)
    path = folder / f"{split}-{result.number:05d}-{index:05d}.parquet"
    table = pa.Table.from_pylist([asdict(text) for text in texts], schema=SCHEMA)
    result.shards.append({"file": path.name, "split": split, **write_table(table, path)})
    return np.array([id_hash(text.id) for text in texts], dtype=np.uint64)


def kinds(results: Iterable[PartResult]) -> dict[str, int]:
    """How many texts of each kind all parts hold, for the manifest."""
    total: Counter[str] = Counter()
    for result in results:
        assert isinstance(result, TextPart)
        total.update(result.kinds)
    return dict(total.most_common())


class TextCorpus:
    """A corpus of texts on disk, or one split of it: one memory-mapped table."""

    def __init__(self, path: Path, manifest: dict[str, Any], table: pa.Table) -> None:
        self.path = path
        self.manifest = manifest
        self.table = table  # columns as in SCHEMA; reading a column copies nothing

    @classmethod
    def open(cls, path: str | Path, split: str | None = None) -> TextCorpus:
        """Opens the directory of a corpus of texts.

        Args:
            path: the directory that `moiety data build` made.
            split: "train", "val" or "test"; None opens everything.

        Raises:
            InputError: no such corpus or split, a corpus of structures, or a shard that is not the manifest's.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if set(manifest["domains"]) != {DOMAIN}:
            raise InputError(f"{path}: holds structures, no texts; open it with moiety.data.shards.Corpus")
        if split is not None and split not in manifest["splits"]:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(sorted(manifest['splits']))}")
        shards = [mapped(path, entry) for entry in manifest["shards"] if split in (None, entry["split"])]
        return cls(path, manifest, pa.concat_tables(shards))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Text:
        index = range(len(self))[index]  # negative indices, and an IndexError that says so
        return Text(**self.table.slice(index, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Text]:
        return (self[index] for index in range(len(self)))

    def rows_of(self, corpus: str) -> dict[str, list[int]]:
        """Structure id -> the rows of its texts, for the structures of one corpus."""
        rows: dict[str, list[int]] = {}
        for row, (owner, structure) in enumerate(
            zip(self.table["corpus"].to_pylist(), self.table["structure"].to_pylist(), strict=True)
        ):
            if owner == corpus:
                rows.setdefault(structure, []).append(row)
        return rows
