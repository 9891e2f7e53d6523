"""The order of the data: a pure function of seed and number, fair to every source, whole every epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moiety.data.shards import Corpus
from moiety.errors import InputError
from moiety.training import mixture as mixture_module
from moiety.training.config import DataConfig, SourceConfig
from moiety.training.mixture import Mixture, pack

CORPORA = Path(__file__).parent / "data/corpora"
SIZES = {"small": 5000, "middle": 700, "one": 1}


@pytest.fixture(autouse=True)
def made_up_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora that have sizes and nothing else, opened by name."""

    def open_made_up(path: str, split: str) -> SimpleNamespace:
        num = SIZES[path]
        nodes = np.random.default_rng(num).integers(5, 30, num).astype(np.int32)
        return SimpleNamespace(
            num_nodes=nodes,
            num_edges=nodes * 12,
            fingerprint=path,
            ids=lambda: [f"{path}{i}" for i in range(num)],
            __len__=lambda: num,
        )

    class Opener:
        open = staticmethod(lambda path, split, checked: Sized(**vars(open_made_up(path, split))))

    monkeypatch.setattr(mixture_module, "Corpus", Opener)


class Sized(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.num_nodes)


def make(weights: dict[str, float] | None = None, **changes: object) -> Mixture:
    weights = weights or {"small": 3, "middle": 1, "one": 0.25}
    sources = tuple(SourceConfig(name, weight) for name, weight in weights.items())
    return Mixture.open(DataConfig(sources, **{"node_budget": 200, "edge_budget": 2000, "seed": 1} | changes))  # type: ignore[arg-type]


def test_the_order_is_a_pure_function_of_seed_and_number():
    forward, backward = make(), make()
    numbers = range(0, 900, 7)
    ahead = [forward.micro_batch(n) for n in numbers]
    behind = [backward.micro_batch(n) for n in reversed(numbers)][::-1]
    for a, b in zip(ahead, behind, strict=True):
        assert (a.source, a.epoch) == (b.source, b.epoch)
        np.testing.assert_array_equal(a.indices, b.indices)
    assert forward.digest("", 0, 50) == backward.digest("", 0, 50) != make(seed=2).digest("", 0, 50)


def test_every_structure_comes_exactly_once_per_epoch_of_its_source():
    mixture = make()
    seen: dict[tuple[int, int], list[int]] = {}
    for number in range(4000):
        batch = mixture.micro_batch(number)
        seen.setdefault((batch.source, batch.epoch), []).extend(batch.indices.tolist())
    for source in range(3):
        num_epochs = max(epoch for s, epoch in seen if s == source)
        assert num_epochs >= 2
        for epoch in range(num_epochs):  # the last one is under way
            assert sorted(seen[source, epoch]) == list(range(len(mixture.sources[source].corpus)))


def test_two_epochs_differ_in_order_and_in_company():
    source = make().sources[1]
    first = [source.batch(i)[1].tolist() for i in range(source.num_batches)]
    second = [source.batch(source.num_batches + i)[1].tolist() for i in range(source.num_batches)]
    assert not {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in second}


def test_budgets_hold_and_micro_batches_are_nearly_full():
    mixture = make()
    corpus = mixture.sources[0].corpus
    nodes = [int(corpus.num_nodes[mixture.sources[0].batch(i)[1]].sum()) for i in range(mixture.sources[0].num_batches)]
    edges = [int(corpus.num_edges[mixture.sources[0].batch(i)[1]].sum()) for i in range(mixture.sources[0].num_batches)]
    assert max(nodes) <= 200 and max(edges) <= 2000
    assert np.mean(edges) > 0.9 * 2000


def test_structures_of_a_micro_batch_are_of_like_size():
    mixture = make()
    corpus, source = mixture.sources[0].corpus, mixture.sources[0]
    sizes = [corpus.num_nodes[source.batch(i)[1]] for i in range(source.num_batches)]
    padded = sum(len(size) * size.max() for size in sizes) / sum(size.sum() for size in sizes)
    assert padded < 1.3 < corpus.num_nodes.max() / corpus.num_nodes.mean()  # what a random order comes to


@pytest.mark.parametrize("weights", [{"small": 3, "middle": 1}, {"small": 0.61, "middle": 0.27, "one": 0.12}])
def test_shares_follow_the_weights_to_within_one_at_any_moment(weights: dict[str, float]):
    mixture = make(weights)
    share = np.array(list(weights.values())) / sum(weights.values())
    counts = Counter[int]()
    for number in range(600):
        source, position = mixture._due(number)
        assert position == counts[source]  # nothing is left out, nothing comes twice
        counts[source] += 1
        assert all(abs(counts[i] - share[i] * (number + 1)) <= len(share) / 2 + 1e-9 for i in range(len(share)))


def test_far_ahead_costs_nothing_and_agrees():
    mixture = make()
    source, position = mixture._due(10**9)
    assert abs(position - [3, 1, 0.25][source] / 4.25 * 10**9) < 2


def test_neighbouring_micro_batches_come_from_different_sources():
    mixture = make({"small": 1, "middle": 1})
    assert all(mixture.micro_batch(n).source != mixture.micro_batch(n + 1).source for n in range(0, 100, 2))


def test_the_fingerprint_changes_with_whatever_changes_the_order():
    base = make().facts
    assert base == make().facts
    for other in (make(seed=2), make(node_budget=201), make(micro_batches=8), make({"small": 3, "middle": 1})):
        assert other.facts != base


def test_a_structure_above_the_budget_is_refused_by_name():
    with pytest.raises(InputError, match=r"small: structure 'small\d+' has 29 nodes, more than data.node_budget=20"):
        make(node_budget=20)
    with pytest.raises(InputError, match=r"set data.edge_budget=348"):
        make(edge_budget=100)


def test_weights_must_be_positive_and_sources_must_exist():
    with pytest.raises(InputError, match="must be above 0"):
        make({"small": 0, "middle": 1})
    with pytest.raises(InputError, match=r"data.sources is empty"):
        Mixture.open(DataConfig((), node_budget=10, edge_budget=10))


def test_real_corpora_are_read_as_the_schedule_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixture_module, "Corpus", Corpus)
    mixture = make({str(CORPORA / "qm9"): 1, str(CORPORA / "crystals"): 1}, node_budget=300, edge_budget=8000)
    for number in range(4):
        batch = mixture.micro_batch(number)
        structures = mixture.read(batch)
        corpus = mixture.sources[batch.source].corpus
        assert [s.num_nodes for s in structures] == corpus.num_nodes[batch.indices].tolist()
    assert {name: facts["domain"] for name, facts in mixture.describe().items()} == {
        "qm9": "molecule",
        "crystals": "crystal",
    }


def test_a_missing_corpus_names_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixture_module, "Corpus", Corpus)
    with pytest.raises(InputError, match="moiety data build qm9 --profile full"):
        make({"corpora/full/qm9": 1}) if not Path("corpora/full/qm9").exists() else make({"/nowhere/full/qm9": 1})


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, float("inf")])
def test_with_a_temperature_the_shares_are_of_structures(temperature: float):
    weights = {"small": 1.0, "middle": 2.0, "one": 0.01}
    mixture = make(weights, temperature=temperature)
    wanted = np.array([weight * SIZES[name] ** (1 / temperature) for name, weight in weights.items()])
    drawn, number = np.zeros(3), 0
    while drawn.sum() < 100_000:
        batch = mixture.micro_batch(number)
        drawn[batch.source] += len(batch.indices)
        number += 1
    assert drawn / drawn.sum() == pytest.approx(wanted / wanted.sum(), abs=0.01)
    assert mixture.structure_shares == pytest.approx(wanted / wanted.sum(), abs=1e-9)


def test_without_a_temperature_the_shares_are_of_micro_batches():
    weights = np.array([0.61, 0.27, 0.12])
    mixture = make(dict(zip(SIZES, weights.tolist(), strict=True)))
    drawn = Counter(mixture._due(number)[0] for number in range(100_000))
    assert [drawn[i] / 100_000 for i in range(3)] == pytest.approx(weights, abs=1e-4)


def test_a_temperature_of_one_ends_all_epochs_together():
    mixture = make({"small": 1, "middle": 1}, temperature=1.0)
    num_batches = sum(source.num_batches for source in mixture.sources)
    assert {mixture.micro_batch(n).epoch for n in range(num_batches - 3)} == {0}
    with pytest.raises(InputError, match=r"data.temperature is -1"):
        make(temperature=-1.0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_real_corpora_show_each_structure_once_an_epoch_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int
):
    monkeypatch.setattr(mixture_module, "Corpus", Corpus)
    weights = {str(CORPORA / name): 1.0 for name in ("qm9", "crystals", "proteins")}
    ranks = [make(weights, node_budget=600, edge_budget=30_000, temperature=1.0) for _ in range(world_size)]
    seen: dict[tuple[int, int], list[str]] = {}
    num_batches = sum(source.num_batches for source in ranks[0].sources)
    for number in range(4 * num_batches):
        rank = ranks[number % world_size]  # as the loop deals them
        batch = rank.micro_batch(number)
        ids = rank.sources[batch.source].corpus.ids()
        seen.setdefault((batch.source, batch.epoch), []).extend(ids[index] for index in batch.indices)
    for (source, epoch), ids in seen.items():
        if epoch < 3:
            assert sorted(ids) == sorted(ranks[0].sources[source].corpus.ids())
    assert ranks[0].digest("", 0, 4 * num_batches) == ranks[-1].digest("", 0, 4 * num_batches)


def test_less_than_a_tenth_of_the_budget_is_wasted():
    mixture = make({"small": 1, "middle": 1}, node_budget=640, edge_budget=20_000)
    assert all(source.budget_used > 0.9 for source in mixture.sources)


def test_structures_that_are_large_for_the_budget_fill_it_too():
    nodes = np.sort(np.random.default_rng(0).integers(40, 257, 2000))[::-1]
    packs = pack(nodes, nodes * 25, 640, 16_000)
    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(2000))
    filled = np.array([nodes[places].sum() for places in packs]) / 640
    assert filled.max() <= 1 and filled.mean() > 0.95


def test_a_run_that_resumes_late_finds_the_micro_batches_of_one_that_went_all_the_way():
    through, late = make().sources[0], make().sources[0]
    position = 3 * through.num_batches + 5
    all_the_way = [through.batch(number) for number in range(position + 1)]
    assert late.batch(position)[0] == all_the_way[-1][0]
    np.testing.assert_array_equal(late.batch(position)[1], all_the_way[-1][1])
