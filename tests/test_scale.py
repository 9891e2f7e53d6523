"""Parts and engines: what is written depends on the recipe alone, and nothing that is read is proportional to it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from moiety.data.parts import write_part
from moiety.data.shards import Corpus, verify, write_corpus, write_manifest
from moiety.data.structure import Structure
from moiety.data.validate import verdicts
from moiety.errors import InputError

FILES = Path(__file__).parent / "data" / "files"


def chain(identity: str, size: int = 3, split: str = "train") -> Structure:
    positions = np.arange(size)[:, None] * [1.5, 0, 0]
    return Structure([6] * size, positions, id=identity, groups={"split": split})


def rejected(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus / "rejected.jsonl").read_text().splitlines()]


def test_what_was_rejected_is_listed_with_its_reason_and_hashed(tmp_path: Path):
    overlap = Structure([1, 1], np.zeros((2, 3)), id="bad")
    manifest = write_corpus([chain("a"), overlap, chain("a"), *verdicts(FILES / "nan.xyz")], tmp_path / "corpus")
    found = rejected(tmp_path / "corpus")
    assert [(line["id"], line["code"]) for line in found] == [
        ("bad", "overlap"),
        ("a", "duplicate-id"),
        (f"{FILES / 'nan.xyz'}#0", "not-finite"),
    ]
    assert all(line["reason"] for line in found)
    content = (tmp_path / "corpus" / "rejected.jsonl").read_bytes()
    assert manifest["rejected"] == {
        "file": "rejected.jsonl",
        "structures": 3,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert manifest["counts"]["in"] == 4 == manifest["counts"]["ok"] + len(found)
    (tmp_path / "corpus" / "rejected.jsonl").write_text("")
    with pytest.raises(InputError, match=r"rejected\.jsonl: checksum mismatch"):
        verify(tmp_path / "corpus")


def test_an_id_of_an_earlier_part_is_rejected_in_the_later_one(tmp_path: Path):
    parts = [
        [chain("a"), chain("b", split="val")],
        [chain("c", 4), chain("a", 5), chain("d", split="val"), chain("b", 7, "val")],
        [chain("a", 6)],  # nothing is left of it
        [chain("e", split="val"), chain("d")],
    ]
    results = [write_part(part, tmp_path, number) for number, part in enumerate(parts)]
    manifest = write_manifest(results, tmp_path, name="parts", units={})
    corpus = Corpus.open(tmp_path)
    assert [(s.id, s.num_nodes) for s in corpus] == [("a", 3), ("c", 4), ("b", 3), ("d", 3), ("e", 3)]
    assert manifest["counts"] == {"in": 9, "ok": 5, "rejected": {"duplicate-id": 4}}
    assert [line["id"] for line in rejected(tmp_path)] == ["a", "b", "a", "d"]
    assert manifest["num_nodes"] == corpus.num_nodes.sum() == 16
    assert manifest["num_edges"] == corpus.num_edges.sum()
    assert manifest["domains"] == {"molecule": 5}
    names = {shard["file"] for shard in manifest["shards"]}
    assert {path.name for path in tmp_path.iterdir()} - {".arrow", "manifest.json", "rejected.jsonl"} == names
