"""Some structures of a corpus, in a given order, with a corpus' own interface."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moiety.data.shards import Corpus
from moiety.data.structure import Structure

Array = np.ndarray


class Subset:
    """The structures `indices` [n] of a corpus."""

    def __init__(self, corpus: Corpus, indices: Array) -> None:
        self.corpus = corpus
        self.indices = np.asarray(indices, dtype=np.int64)
        self.manifest: dict[str, Any] = corpus.manifest
        self.domain = corpus.domain
        self.num_nodes = corpus.num_nodes[self.indices]
        self.num_edges = corpus.num_edges[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        return self.corpus.read(self.indices[np.asarray(indices, dtype=np.int64)], whole)

    def ids(self) -> list[str]:
        all_ids = self.corpus.ids()
        return [all_ids[index] for index in self.indices]

    def scalar(self, name: str) -> Array:
        return self.corpus.scalar(name)[self.indices]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.corpus.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()
