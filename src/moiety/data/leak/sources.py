"""The two sides of a comparison: a corpus, one split of it, or structure files."""

from __future__ import annotations

from pathlib import Path

from moiety.data.readers import structure_files
from moiety.data.shards import MANIFEST, Corpus
from moiety.data.structure import Structure
from moiety.data.validate import verdicts
from moiety.errors import InputError

CHUNK = 10_000  # structures read at a time


def load(place: str) -> tuple[list[Structure], int]:
    """The structures of "DIR", "DIR:SPLIT" or a structure file, and how many were rejected.

    Raises:
        InputError: no such place or split, or nothing in it that can be compared.
    """
    path, split = _parted(place)
    if (path / MANIFEST).exists():
        return _of_corpus(Corpus.open(path, split)), 0
    if split is not None:
        raise InputError(f"{path} is not a corpus, so it has no split {split!r}; give it without :{split}")
    found = [verdict for file in structure_files([path]) for verdict in verdicts(file)]
    structures = []
    for verdict in found:
        if verdict.structure is not None:
            verdict.structure.id = f"{verdict.file}#{verdict.index}"
            structures.append(verdict.structure)
    if not structures:
        raise InputError(f"{path}: no structure to compare; see what is wrong with: moiety data check {path}")
    return structures, len(found) - len(structures)


def _parted(place: str) -> tuple[Path, str | None]:
    path, colon, split = place.rpartition(":")
    return (Path(path), split) if colon and not Path(place).exists() else (Path(place), None)


def _of_corpus(corpus: Corpus) -> list[Structure]:
    """Geometry and prototype: labels and texts are not read."""
    starts = range(0, len(corpus), CHUNK)
    structures = [s for start in starts for s in corpus.read(range(start, min(start + CHUNK, len(corpus))))]
    for structure, prototype in zip(structures, corpus.groups("prototype"), strict=True):
        structure.groups = {"prototype": prototype}
    return structures
