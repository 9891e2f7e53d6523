"""What the bridge reads in training, each with a corpus' own interface: partners together, and prose.

Structures of one composition stand in one micro-batch. Without that a bridge learns of what composition says first, and
for long: beside each other, partners leave it nothing but their geometry to tell them apart by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moiety.bridge.rows import DESCRIBED, NAMED, PROSE
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.subset import Subset
from moiety.data.texts import TextCorpus
from moiety.errors import InputError
from moiety.training.config import DataConfig
from moiety.training.mixture import Mixture, Source

Array = np.ndarray
PAIR = "pair"  # the entry of `Structure.groups` that partners share
COMPANY = 4  # structures of one composition that are read together
TEXT_NODES = 24  # that the text about a structure counts as: small structures would fill a micro-batch by the hundred
LETTERS_PER_NODE = 8.0  # a text counts as so many nodes against the budget
LETTERS = 240  # of a piece of prose: about as long as the captions and questions that it is padded beside


class Joined(Mixture):
    """A mixture whose micro-batches join several packs, each of one source and of one size.

    Where every step is about one kind of structure, and so asks a few questions alone, a language model learns each for
    as long as it lasts, and little of what all have in common.
    """

    def __init__(self, sources: list[Source], config: DataConfig, packs: int) -> None:
        super().__init__(sources, config)
        self._packs = packs

    def structures(self, number: int, whole: bool = False) -> list[Structure]:
        packs = range(self._packs * number, self._packs * (number + 1))
        return [structure for pack in packs for structure in super(Joined, self).structures(pack, whole)]

    def digest(self, previous: str, first: int, last: int) -> str:
        return super().digest(previous, self._packs * first, self._packs * last)

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"packs": self._packs}


class Together:
    """Structures of a corpus that are read together; the n-th item is the n-th company, whole."""

    def __init__(self, corpus: Corpus, companies: Sequence[Array], how: str) -> None:
        self.corpus, self._companies, self._how = corpus, list(companies), how
        self.manifest, self.domain, self.damaged = corpus.manifest, corpus.domain, corpus.damaged
        nodes, edges = np.asarray(corpus.num_nodes), np.asarray(corpus.num_edges)
        self.num_nodes = np.array([(nodes[members] + TEXT_NODES).sum() for members in self._companies])
        self.num_edges = np.array([edges[members].sum() for members in self._companies])

    @classmethod
    def partners(cls, corpus: Corpus) -> Together:
        """Those that share an entry PAIR of their groups.

        Raises:
            InputError: structures without one.
        """
        owners = np.array(corpus.groups(PAIR))
        if not len(owners) or (owners == "").any():
            raise InputError(f"{corpus.path}: structures without partners; take another kind of source for it")
        return cls(corpus, companies_of(owners), PAIR)

    @classmethod
    def of_one_composition(cls, corpus: Corpus, most: int) -> Together:
        """The first `most` structures, in companies of up to COMPANY of the same atoms."""
        indices = np.arange(min(most, len(corpus)) if most else len(corpus))
        keys = [np.sort(structure.node_type).tobytes() for structure in corpus.read(indices)]
        _, owners = np.unique(np.array(keys, dtype=object), return_inverse=True)
        companies = [
            members[start : start + COMPANY]
            for members in companies_of(owners) for start in range(0, len(members), COMPANY)
        ]  # fmt: skip
        return cls(corpus, companies, f"composition:{most}")

    def __len__(self) -> int:
        return len(self._companies)

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        """The structures of those companies, one after the other, with an entry PAIR."""
        found = []
        for index in np.asarray(indices).tolist():
            members = self.corpus.read(self._companies[index], whole=True)
            for structure in members if len(members) > 1 else ():
                structure.groups.setdefault(PAIR, f"{self.manifest['name']}:{index}")
            found += members
        return found

    def ids(self) -> list[str]:
        """Of the first structure of each company."""
        all_ids = self.corpus.ids()
        return [all_ids[members[0]] for members in self._companies]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._how}:{self.corpus.fingerprint}".encode()).hexdigest()


class Single(Subset):
    """Structures one by one."""

    def __init__(self, corpus: Corpus, most: int) -> None:
        """`most`: that are read; 0 for all."""
        super().__init__(corpus, np.arange(min(most or len(corpus), len(corpus))))
        self.num_nodes = self.num_nodes + TEXT_NODES


class Named:
    """Structures of a corpus that have texts of their own (names, headers, descriptions): these are their `text`."""

    def __init__(self, corpus: Corpus, texts: TextCorpus) -> None:
        """
        Args:
            corpus: structures of a split.
            texts: of the same split.

        Raises:
            InputError: no text belongs to one of the structures.
        """
        rows = texts.rows_of(corpus.manifest["name"])
        kinds, words = texts.table["kind"].to_pylist(), texts.table["text"].to_pylist()
        self._texts = [
            (index, [(kinds[row], words[row]) for row in rows[name]])
            for index, name in enumerate(corpus.ids()) if name in rows
        ]  # fmt: skip
        if not self._texts:
            raise InputError(f"{texts.path}: no text belongs to a structure of {corpus.path}; build both in full")
        self.corpus, self.manifest, self.domain, self.damaged = corpus, corpus.manifest, corpus.domain, corpus.damaged
        places = np.array([index for index, _ in self._texts])
        self.num_nodes, self.num_edges = corpus.num_nodes[places] + TEXT_NODES, corpus.num_edges[places]
        self.fingerprint = hashlib.sha256(
            f"named:{corpus.fingerprint}:{[entry['sha256'] for entry in texts.manifest['shards']]}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        found = []
        for number in np.asarray(indices).tolist():
            index, texts = self._texts[number]
            (structure,) = self.corpus.read([index], whole=True)
            structure.groups[NAMED] = DESCRIBED if texts[0][0] == DESCRIBED else "name"
            structure.text = [text for _, text in texts]
            found.append(structure)
        return found

    def ids(self) -> list[str]:
        all_ids = self.corpus.ids()
        return [all_ids[index] for index, _ in self._texts]


class Prose:
    """Texts without a structure, in pieces; a hydrogen atom stands for each, unread."""

    def __init__(self, corpus: TextCorpus, letters: int = LETTERS) -> None:
        """`letters`: texts are joined, in a fixed order, until they are so long."""
        texts = corpus.table["text"].to_pylist()
        self.manifest, self.domain, self.damaged = corpus.manifest, "molecule", {}
        self._letters, self._split = letters, corpus.table["id"][0].as_py()
        self._pieces = joined(texts, letters)
        self.num_nodes = np.array([max(1, round(len(piece) / LETTERS_PER_NODE)) for piece in self._pieces])
        self.num_edges = np.zeros(len(self._pieces), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._pieces)

    def read(self, indices: Sequence[int] | Array, whole: bool = False) -> list[Structure]:
        return [
            Structure(np.ones(1, dtype=np.int64), np.zeros((1, 3)), id=f"{PROSE}:{index}", source=PROSE,
                      text=[self._pieces[index]])
            for index in np.asarray(indices).tolist()
        ]  # fmt: skip

    def ids(self) -> list[str]:
        return [f"{PROSE}:{index}" for index in range(len(self))]

    @property
    def fingerprint(self) -> str:
        parts: list[Any] = [entry["sha256"] for entry in self.manifest["shards"]] + [self._letters, self._split]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def joined(texts: Sequence[str], letters: int) -> list[str]:
    """Texts one after the other on lines of their own, in pieces of at most so many letters; longer ones are cut."""
    pieces, piece = [], ""
    for text in texts:
        for start in range(0, len(text), letters):
            part = text[start : start + letters]
            if piece and len(piece) + len(part) > letters:
                pieces.append(piece)
                piece = ""
            piece = f"{piece}\n{part}" if piece else part
    return [*pieces, piece] if piece else pieces


def companies_of(owners: Array) -> list[Array]:
    """The places of each owner, in the order of their first ones."""
    order = np.argsort(owners, kind="stable")
    ends = np.flatnonzero(owners[order][1:] != owners[order][:-1]) + 1
    return sorted(np.split(order, ends), key=lambda members: members[0])
