"""Searches of corpora by words or by structures: what `moiety search` does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from moiety.bridge.export import load_bridge
from moiety.bridge.retrieval import (
    Condition,
    Found,
    Index,
    composition,
    formula_in,
    index_structures,
    index_texts,
    structure_vectors,
    text_vectors,
)
from moiety.bridge.use import first_structure
from moiety.data.shards import Corpus, read_manifest
from moiety.data.texts import TextCorpus
from moiety.errors import InputError

INDICES = ".searched"  # in a corpus, the indices that were made of it
LINES = (".txt",)


def search(query: str, where_in: Path, model_dir: Path, where: str = "", most: int = 10) -> list[Found]:
    """What matches a query best: words, or the first structure of a file.

    Args:
        query: words, or the path of a structure file; a formula among the words is a condition.
        where_in: a corpus of structures or of texts, or a .txt with a text a line. A corpus is indexed at the first
            search with a model, and the index stays in its folder.
        model_dir: the bridge.
        where: conditions on predicted properties, "gap > 5 and dipole < 2".
        most: entries that are returned.

    Raises:
        InputError: no bridge or corpus, a condition that cannot be read.
    """
    conditions = Condition.read(where)
    model, processor = load_bridge(model_dir)
    model.eval()
    index = opened_index(where_in, model_dir, model, processor)
    if Path(query).suffix and Path(query).is_file():
        structure = first_structure(Path(query))
        return index.search(structure_vectors(model, [structure])[0], most, conditions, composition(structure))
    return index.search(text_vectors(model, processor.tokenizer, [query])[0], most, conditions, formula_in(query))


def opened_index(where_in: Path, model_dir: Path, model: Any, processor: Any) -> Index:
    """The index of a corpus for a bridge, made where it is not there yet."""
    if where_in.suffix in LINES:
        if not where_in.is_file():
            raise InputError(f"{where_in}: no such file")
        return index_texts(model, processor.tokenizer, where_in.read_text(encoding="utf-8").splitlines(), {})
    manifest = read_manifest(where_in)
    own = hashlib.sha256((Path(model_dir) / "model.safetensors").read_bytes()).hexdigest()[:16]
    shards = hashlib.sha256(str([entry["sha256"] for entry in manifest["shards"]]).encode()).hexdigest()[:16]
    folder, facts = where_in / INDICES / own, {"model": own, "corpus": shards}
    if (folder / "facts.json").is_file():
        index = Index.open(folder)
        if index.facts == facts:
            return index
    if "text" in manifest["domains"]:
        index = index_texts(model, processor.tokenizer, TextCorpus.open(where_in).table["text"].to_pylist(), facts)
    else:
        index = index_structures(model, list(Corpus.open(where_in)), facts)
    index.save(folder)
    return index
