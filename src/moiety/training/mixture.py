"""Which structures the m-th micro-batch of a run holds: a pure function of the configuration and m.

Nothing is kept between micro-batches, so a run resumes at step s by asking for what step s holds, and the order does
not depend on how many processes share the work. Every source shows each of its structures exactly once per epoch.

Within a source and epoch: a seeded permutation is cut into windows; a window is roughly sorted by size and dealt to
micro-batches from the largest on, as many neighbours as the node and the edge budget hold and then whatever still fits,
so that structures of similar size stand together and little work is padding or skew; the micro-batches of the window
are then shuffled. Neither the permutation nor the sizes are held in memory: one is computed, the others are mapped.

Between sources: the j-th micro-batch of source i falls due at (j + phase_i) / weight_i, and the schedule is the merge
of these progressions. After m micro-batches each source had weight_i * m of them, to within one, so neighbouring
micro-batches, which go to different ranks, come from different domains.

What a weight is a share of: without `data.temperature`, of the micro-batches, so of the work, since the budgets make
them alike. With a temperature T, of the structures: source i, of n_i structures, has the share weight_i n_i^(1/T). At
T = 1 all sources end their epochs together, at T = .inf the weights alone are the shares.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.subset import Subset, Unlabelled
from moiety.errors import InputError
from moiety.training.config import DataConfig
from moiety.training.permutation import permuted

ORDER_VERSION = 2  # part of the fingerprint: raise it when the order of the same configuration changes
WINDOW = 4096  # structures sorted by size together
SIZE_JITTER = 0.15  # sorted by size to within this share, so that a small corpus is in other company each epoch


@dataclass(frozen=True)
class MicroBatch:
    """Some structures of one source; `indices` count within the source's split."""

    source: int
    epoch: int
    indices: np.ndarray  # [B] int64


class Source:
    """A corpus and its order, epoch by epoch."""

    def __init__(self, corpus: Corpus | Subset | Unlabelled, name: str, config: DataConfig, number: int) -> None:
        self.corpus = corpus
        self.name = name
        self._config = config
        self._number = number
        self._num_windows = -(-len(corpus) // WINDOW)  # of an epoch
        self._starts = [0]  # number of micro-batches before each window seen so far, counted over all epochs
        self._window = lru_cache(maxsize=2)(self._cut)  # the ranks' own micro-batches, and the step's
        self._refuse_oversized()

    def batch(self, position: int) -> tuple[int, np.ndarray]:
        """The epoch and the structures of this source's micro-batch number `position`, counted over all epochs."""
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._window(len(self._starts) - 1)))
        window = bisect_right(self._starts, position) - 1
        return window // self._num_windows, self._window(window)[position - self._starts[window]]

    @property
    def num_batches(self) -> int:
        """Micro-batches in the first epoch (later ones differ by a few)."""
        self.batch(0)
        while len(self._starts) <= self._num_windows:
            self.batch(self._starts[-1])
        return self._starts[self._num_windows]

    @property
    def budget_used(self) -> float:
        """Mean over the first epoch's micro-batches of the fuller budget: what is missing to 1 is waste."""
        full = 0.0
        for position in range(self.num_batches):
            nodes_n, edges_n = self._sizes(self.batch(position)[1])
            full += float(max(nodes_n.sum() / self._config.node_budget, edges_n.sum() / self._config.edge_budget))
        return full / self.num_batches

    def _cut(self, number: int) -> list[np.ndarray]:
        """The micro-batches of a window, counted over all epochs."""
        epoch, window = divmod(number, self._num_windows)
        size = len(self.corpus)
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, size))
        key = (self._config.seed, self._number, epoch)
        index_n = permuted(places, size, key)
        rng = np.random.default_rng([*key, window])
        nodes_n, edges_n = self._sizes(index_n)
        order = np.argsort(-nodes_n * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER, len(index_n)))
        packs = pack(nodes_n[order], edges_n[order], self._config.node_budget, self._config.edge_budget)
        return [index_n[order[packs[i]]] for i in rng.permutation(len(packs))]

    def _sizes(self, index_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] int64 nodes and edges of some structures."""
        corpus = self.corpus
        return corpus.num_nodes[index_n].astype(np.int64), corpus.num_edges[index_n].astype(np.int64)

    def _refuse_oversized(self) -> None:
        """A structure that alone breaks a budget would break the memory that the budget protects."""
        for sizes, what in ((self.corpus.num_nodes, "node"), (self.corpus.num_edges, "edge")):
            budget = getattr(self._config, f"{what}_budget")
            if sizes.max() > budget:
                sizes = np.asarray(sizes)
                worst = int(np.argmax(sizes))
                raise InputError(
                    f"{self.name}: structure {self.corpus.ids()[worst]!r} has {sizes[worst]} {what}s, more than "
                    f"data.{what}_budget={budget} ({int((sizes > budget).sum())} structures are too large); "
                    f"set data.{what}_budget={sizes[worst]} or build the corpus without them"
                )


def pack(nodes_n: np.ndarray, edges_n: np.ndarray, node_budget: int, edge_budget: int) -> list[np.ndarray]:
    """Deals structures to micro-batches: each takes the next in order while they fit, then later ones that still do.

    Args:
        nodes_n: [n] nodes of the structures, roughly descending.
        edges_n: [n] edges of the structures.
        node_budget: nodes a micro-batch may hold; no structure has more.
        edge_budget: edges it may hold, likewise.

    Returns:
        The places of the structures of each micro-batch; every place stands in one of them.
    """
    left = np.arange(len(nodes_n))
    packs = []
    while len(left):
        nodes, edges = nodes_n[left], edges_n[left]
        nodes_so_far, edges_so_far = np.cumsum(nodes), np.cumsum(edges)
        taken = (nodes_so_far <= node_budget) & (edges_so_far <= edge_budget)
        last = int(taken.sum()) - 1
        node_room, edge_room = node_budget - nodes_so_far[last], edge_budget - edges_so_far[last]
        while (fits := ~taken & (nodes <= node_room) & (edges <= edge_room)).any():
            next_one = int(fits.argmax())
            taken[next_one] = True
            node_room, edge_room = node_room - nodes[next_one], edge_room - edges[next_one]
        packs.append(left[taken])
        left = left[~taken]
    return packs


class Mixture:
    """Several sources, mixed by weight."""

    def __init__(self, sources: list[Source], config: DataConfig) -> None:
        self.sources = sources
        self.config = config
        weights = np.array([source.weight for source in config.sources], dtype=np.float64)
        if not (np.isfinite(weights) & (weights > 0)).all():
            raise InputError(f"data.sources: weights are {weights.tolist()}; each must be above 0")
        if config.temperature is not None:
            weights = weights * self._structures_to_batches(config.temperature)
        self._weights = weights / weights.sum()
        self._phases = np.random.default_rng([config.seed, len(sources)]).random(len(sources))

    @classmethod
    def open(cls, config: DataConfig) -> Mixture:
        """Opens every corpus; what is damaged in one is left out and stands in its `damaged`.

        Raises:
            InputError: no source, a missing corpus (with the command that builds it), an empty split, a structure
                above a budget.
        """
        if not config.sources:
            raise InputError("data.sources is empty; name at least one corpus")
        sources = []
        has_labels = any(source.supervised for source in config.sources)  # and no others are to be learned from
        for number, source in enumerate(config.sources):
            corpus = Corpus.open(source.path, split=config.split, checked=True)
            if len(corpus) == 0:
                raise InputError(f"{source.path}: no structure in split {config.split!r}")
            shown = corpus if source.supervised or not has_labels else Unlabelled(corpus)
            sources.append(Source(shown, Path(source.path).name, config, number))
        return cls(sources, config)

    @property
    def supervised(self) -> list[Source]:
        """Those whose labels are learned from."""
        pairs = zip(self.sources, self.config.sources, strict=True)
        return [source for source, config in pairs if config.supervised]

    def _structures_to_batches(self, temperature: float) -> np.ndarray:
        """[sources] n^(1/T) structures of each source, counted in its micro-batches."""
        if not temperature > 0:
            raise InputError(f"data.temperature is {temperature}; it must be above 0 (.inf: weights alone)")
        sizes = np.array([len(source.corpus) for source in self.sources], dtype=np.float64)
        batches = np.array([source.num_batches for source in self.sources], dtype=np.float64)
        return (sizes / sizes.max()) ** (1 / temperature) * batches / sizes

    @property
    def shares(self) -> np.ndarray:
        """[sources] share of each in the micro-batches."""
        return self._weights

    @property
    def structure_shares(self) -> np.ndarray:
        """[sources] share of each in the structures that are drawn."""
        drawn = self._weights * [len(source.corpus) / source.num_batches for source in self.sources]
        return drawn / drawn.sum()

    @property
    def facts(self) -> dict[str, Any]:
        """Equal for two mixtures that yield the same structures in the same order, wherever the corpora lie."""
        sources = [
            {"fingerprint": s.corpus.fingerprint[:16], "share": float(weight)}
            for s, weight in zip(self.sources, self._weights, strict=True)
        ]
        facts = asdict(self.config) | {"sources": sources, "order": [ORDER_VERSION, WINDOW, SIZE_JITTER]}
        del facts["temperature"]  # what it does stands in the shares
        return facts | {"damaged": self.damaged}

    @property
    def damaged(self) -> dict[str, str]:
        """Shards that were left out, and why."""
        return {
            f"{source.name}/{file}": problem
            for source in self.sources
            for file, problem in getattr(source.corpus, "damaged", {}).items()
        }

    def describe(self) -> dict[str, Any]:
        """Corpus name -> domain, structures, nodes, shares of the micro-batches and of the structures."""
        return {
            source.name: {
                "domain": source.corpus.domain,
                "structures": len(source.corpus),
                "nodes": int(source.corpus.num_nodes.sum()),
                "share": round(float(share), 4),
                "structure_share": round(float(drawn), 4),
            }
            for source, share, drawn in zip(self.sources, self.shares, self.structure_shares, strict=True)
        }

    def micro_batch(self, number: int) -> MicroBatch:
        """The micro-batch of that number, counted over the whole run and all ranks."""
        source, position = self._due(number)
        epoch, indices = self.sources[source].batch(position)
        return MicroBatch(source, epoch, indices)

    def read(self, batch: MicroBatch, whole: bool = False) -> list[Structure]:
        """Its structures; `whole` ones with all labels."""
        return self.sources[batch.source].corpus.read(batch.indices, whole)

    def structures(self, number: int, whole: bool = False) -> list[Structure]:
        """Those of the micro-batch of that number."""
        return self.read(self.micro_batch(number), whole)

    def digest(self, previous: str, first: int, last: int) -> str:
        """A running hash over which structures the micro-batches first..last-1 hold, after `previous`."""
        total = hashlib.sha256(previous.encode())
        for number in range(first, last):
            batch = self.micro_batch(number)
            total.update(f"{batch.source}:{batch.epoch}:".encode())
            total.update(np.asarray(batch.indices, dtype="<i8").tobytes())
        return total.hexdigest()[:16]

    def _due(self, number: int) -> tuple[int, int]:
        """Source, and position within it, of the `number`-th entry of the merged schedule.

        By the time t the sources have had t entries together, to within one each; so entries that fall due more than
        that before `number` are skipped in closed form, and the few around it are merged explicitly.
        """
        margin = len(self._weights) + 1
        first = np.maximum(0, np.ceil((number - margin) * self._weights - self._phases)).astype(np.int64)
        candidates = [
            ((position + phase) / weight, source, position)
            for source, (weight, phase) in enumerate(zip(self._weights, self._phases, strict=True))
            for position in range(int(first[source]), int(first[source] + 2 * margin * weight) + 2)
        ]
        _, source, position = sorted(candidates)[number - int(first.sum())]
        return source, position
