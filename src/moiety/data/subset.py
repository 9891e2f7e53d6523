"""Parts of a corpus with a corpus' own interface: some of its structures, in a given order; geometries alone."""

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


class Unlabelled:
    """A corpus without its labels."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.manifest, self.domain, self.fingerprint = corpus.manifest, corpus.domain, corpus.fingerprint
        self.num_nodes, self.num_edges, self.damaged = corpus.num_nodes, corpus.num_edges, corpus.damaged

    def __len__(self) -> int:
        return len(self._corpus)

    def ids(self) -> list[str]:
        return self._corpus.ids()

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        """Geometries, `whole` or not."""
        structures = self._corpus.read(indices)
        for structure in structures:
            structure.scalars = {}
        return structures
