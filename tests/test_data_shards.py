"""A corpus on disk gives back what was written, is complete or absent, and notices damage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from moiety.data.parts import count_edges
from moiety.data.shards import Corpus, verify, write_corpus
from moiety.data.structure import Structure
from moiety.data.validate import Verdict, verdicts
from moiety.errors import InputError

FILES = Path(__file__).parent / "data" / "files"


def molecules(count: int, seed: int = 0) -> list[Structure]:
    """Random molecules of QM9's size, on a jittered grid, a tenth of them for validation."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.unravel_index(np.arange(27), (3, 3, 3)), axis=1) * 1.5
    found = []
    for index in range(count):
        size = int(rng.integers(3, 28))
        found.append(
            Structure(
                rng.choice([1, 6, 7, 8, 9], size),
                grid[:size] + rng.uniform(-0.2, 0.2, (size, 3)),
                id=f"mol-{index}",
                source="test",
                charge=int(rng.integers(-1, 2)),
                scalars={"gap": float(rng.normal())} if index % 3 else {},
                node_scalars={"mulliken": rng.normal(size=size)},
                groups={"split": "val" if index % 10 == 0 else "train", "scaffold": f"s{index % 4}"},
            )
        )
    return found


def everything() -> Structure:
    """A structure that uses every field."""
    rng = np.random.default_rng(1)
    return Structure(
        node_type=[120, 125, 6],
        positions=[[0, 0, 0], [3.8, 0, 0], [3.8, 5.0, 0.5]],
        domain="complex",
        id="full",
        source="nowhere",
        node_vectors=rng.normal(size=(3, 4, 3)),
        cell=np.array([[20.0, 0, 0], [1, 20, 0], [0, 2, 20]]),
        pbc=np.array([True, True, False]),
        charge=-2,
        spin=3,
        role=np.array([1, 1, 2]),
        chain=["A", "A", "L"],
        residue_index=np.array([-4, 7, 1]),
        energy=-12.25,
        forces=rng.normal(size=(3, 3)),
        stress=np.eye(3) / 3,
        dipole=rng.normal(size=3),
        scalars={"gap": 1.0 / 3.0, "zero": 0.0},
        node_scalars={"mulliken": rng.normal(size=3)},
        text=["a name", "Å and 水"],
        theory="B3LYP/6-31G(2df,p)",
        groups={"split": "test", "date": "2024-01-01"},
    )


def assert_same(a: Structure, b: Structure) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, other), name
            assert value.shape == other.shape, name
        elif name == "node_scalars":
            assert value.keys() == other.keys()
            assert all(np.array_equal(value[key], other[key]) for key in value)
        else:
            assert value == other, name


def test_every_field_comes_back_bit_for_bit(tmp_path):
    written = [everything(), *molecules(20)]
    write_corpus(written, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    found = {structure.id: structure for structure in corpus}
    assert len(corpus) == len(found) == 21
    for structure in written:
        assert_same(structure, found[structure.id])


def test_read_gives_geometry_and_scalars_in_the_order_asked_for(tmp_path):
    write_corpus([everything(), *molecules(40)], tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    indices = np.random.default_rng(0).integers(0, len(corpus), 100)
    for index, structure in zip(indices, corpus.read(indices), strict=True):
        whole = corpus[int(index)]
        for name in ("node_type", "positions", "node_vectors", "cell", "pbc", "role"):
            assert np.array_equal(getattr(structure, name), getattr(whole, name)), name
        for name in ("id", "domain", "charge", "spin", "scalars"):
            assert getattr(structure, name) == getattr(whole, name), name
    with pytest.raises(IndexError):
        corpus.read([len(corpus)])
    with pytest.raises(IndexError):
        corpus[len(corpus)]
    assert corpus[-1].id == corpus[len(corpus) - 1].id


def test_columns_stand_in_the_order_of_the_structures(tmp_path):
    write_corpus(molecules(50), tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    whole = list(corpus)
    assert corpus.ids() == [s.id for s in whole]
    assert corpus.groups("scaffold") == [s.groups["scaffold"] for s in whole]
    assert corpus.groups("absent") == [""] * 50
    assert np.asarray(corpus.num_nodes).tolist() == [s.num_nodes for s in whole]
    assert np.array_equal(corpus.num_edges, count_edges(whole))
    gap = corpus.scalar("gap")
    assert np.array_equal(gap, [s.scalars.get("gap", np.nan) for s in whole], equal_nan=True)
    with pytest.raises(InputError, match="no label 'gpa'; it has gap"):
        corpus.scalar("gpa")


def test_edges_are_counted_as_the_model_will_see_them():
    pair = Structure([6, 6], [[0, 0, 0], [4.9, 0, 0]])
    apart = Structure([6, 6], [[0, 0, 0], [5.1, 0, 0]])
    residues = Structure([120, 120], [[0, 0, 0], [9.9, 0, 0]])
    mixed = Structure([120, 6], [[0, 0, 0], [7.4, 0, 0]])
    cubic = Structure([29], [[0, 0, 0]], cell=4.0 * np.eye(3), pbc=np.ones(3, dtype=bool))
    assert count_edges([pair, apart, residues, mixed, cubic]).tolist() == [2, 0, 2, 2, 6]


def test_splits_are_opened_apart_and_have_their_own_fingerprint(tmp_path):
    manifest = write_corpus(molecules(50), tmp_path / "corpus")
    assert manifest["splits"] == {"val": 5, "train": 45}
    corpora = {split: Corpus.open(tmp_path / "corpus", split) for split in ("train", "val", None)}
    assert [len(c) for c in corpora.values()] == [45, 5, 50]
    assert set(corpora["val"].groups("split")) == {"val"}
    assert len({c.fingerprint for c in corpora.values()}) == 3
    with pytest.raises(InputError, match="no split 'dev'; it has train, val"):
        Corpus.open(tmp_path / "corpus", "dev")


def test_the_same_structures_make_the_same_shards(tmp_path):
    a = write_corpus(molecules(30), tmp_path / "a")
    b = write_corpus(molecules(30), tmp_path / "b")
    assert a["shards"] == b["shards"]


def test_what_goes_in_is_accepted_or_rejected_with_a_code(tmp_path):
    good = molecules(5)
    overlap, again = Structure([1, 1], np.zeros((2, 3))), molecules(1)[0]
    bad_file = list(verdicts(FILES / "nan.xyz"))
    manifest = write_corpus(
        [*good, overlap, again, *bad_file], tmp_path / "corpus", licence="CC0-1.0", units={"gap": "eV"}
    )
    assert manifest["counts"] == {"in": 8, "ok": 5, "rejected": {"duplicate-id": 1, "not-finite": 1, "overlap": 1}}
    on_disk = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert on_disk == manifest
    assert (on_disk["licence"], on_disk["units"], on_disk["domains"]) == ("CC0-1.0", {"gap": "eV"}, {"molecule": 5})
    assert on_disk["shards"][0].keys() == {"file", "split", "structures", "bytes", "sha256"}
    assert {"moiety", "pyarrow"} <= on_disk["versions"].keys()


def test_many_shards_read_as_one_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("moiety.data.parts.NODES_PER_SHARD", 2000)
    written = molecules(1500)
    del written[-1].scalars["gap"]  # labels may differ between shards
    written[0].scalars["rare"] = 2.0
    manifest = write_corpus(written, tmp_path / "corpus")
    assert len(manifest["shards"]) > 3
    corpus = Corpus.open(tmp_path / "corpus")
    by_id = {s.id: s for s in written}
    for structure in corpus.read(np.random.default_rng(0).permutation(len(corpus))):
        assert np.array_equal(structure.positions, by_id[structure.id].positions)
        assert structure.scalars == by_id[structure.id].scalars
    assert np.nansum(corpus.scalar("rare")) == 2.0


def test_an_interrupted_build_leaves_the_earlier_corpus_and_nothing_else(tmp_path):
    def dies():
        yield from molecules(300)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(dies(), tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
    write_corpus(molecules(10), tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt):
        write_corpus(dies(), tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert len(Corpus.open(tmp_path / "corpus")) == 10
    write_corpus(molecules(12), tmp_path / "corpus")
    assert len(Corpus.open(tmp_path / "corpus")) == 12


def test_nothing_that_is_not_a_corpus_is_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a corpus"):
        write_corpus(molecules(3), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_corpus_without_a_single_structure_is_refused(tmp_path):
    with pytest.raises(InputError, match="overlap"):
        write_corpus([Structure([1, 1], np.zeros((2, 3)))], tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_flipped_byte_in_a_shard_is_refused_by_name(tmp_path, opened_before):
    write_corpus(molecules(50), tmp_path / "corpus")
    if opened_before:
        Corpus.open(tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train-00000-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"train-00000-00000\.parquet: checksum mismatch"):
        Corpus.open(tmp_path / "corpus")
    with pytest.raises(InputError, match=r"train-00000-00000\.parquet: checksum mismatch"):
        verify(tmp_path / "corpus")
    assert len(Corpus.open(tmp_path / "corpus", "val")) == 5  # the other shards are none the worse
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000-00000\.parquet is missing"):
        Corpus.open(tmp_path / "corpus")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def in_many_shards(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("moiety.data.parts.NODES_PER_SHARD", 100)
    monkeypatch.setattr("moiety.data.parts.CHUNK", 8)
    write_corpus(molecules(500), tmp_path / "corpus")
    return tmp_path / "corpus"


def test_a_checked_corpus_mends_a_damaged_cache(in_many_shards):
    before = [s.positions for s in Corpus.open(in_many_shards, "train")]
    cached = sorted((in_many_shards / ".arrow").glob("train-*.arrow"))[3]
    flip(cached, cached.stat().st_size // 2)
    after = Corpus.open(in_many_shards, "train", checked=True)
    assert not after.damaged
    assert all(np.array_equal(a, s.positions) for a, s in zip(before, after, strict=True))


def test_a_checked_corpus_does_without_a_damaged_shard_and_names_it(in_many_shards):
    whole = Corpus.open(in_many_shards, "train")
    file = sorted(in_many_shards.glob("train-*.parquet"))[3]
    flip(file, 50)
    (in_many_shards / ".arrow" / f"{file.stem}.arrow").unlink()
    corpus = Corpus.open(in_many_shards, "train", checked=True)
    assert list(corpus.damaged) == [file.name] and "checksum mismatch" in corpus.damaged[file.name]
    assert 0.95 * len(whole) <= len(corpus) < len(whole)
    assert set(corpus.ids()) < set(whole.ids())


def test_a_corpus_with_too_much_damage_is_refused(in_many_shards):
    for file in sorted(in_many_shards.glob("train-*.parquet"))[:5]:
        file.unlink()
    with pytest.raises(InputError, match=r"5 damaged shards hold \d+% of [\s\S]*train-00000-00000.parquet"):
        Corpus.open(in_many_shards, "train", checked=True)


def test_a_missing_corpus_names_the_command_that_builds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"moiety data build qm9 --profile tiny$"):
        Corpus.open("corpora/tiny/qm9")
    with pytest.raises(InputError, match=f"moiety data build ccd --profile full --out {tmp_path}/full/ccd"):
        Corpus.open(tmp_path / "full" / "ccd")


def test_a_verdict_that_is_ok_is_written_like_its_structure(tmp_path):
    structure = molecules(1)[0]
    write_corpus([Verdict("a.xyz", 0, True, structure=structure)], tmp_path / "corpus")
    assert_same(structure, Corpus.open(tmp_path / "corpus")[0])


def test_a_thousand_small_molecules_are_read_in_fifty_milliseconds(tmp_path):
    write_corpus(molecules(3000), tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus", "train")
    indices = np.random.default_rng(0).integers(0, len(corpus), 1000)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        corpus.read(indices)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
