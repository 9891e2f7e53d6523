"""Parts and engines: what is written depends on the recipe alone, and nothing that is read is proportional to it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moiety.cli import main
from moiety.data.build import build, list_recipes
from moiety.data.engines import WorkerDied
from moiety.data.parts import write_part
from moiety.data.shards import Corpus, Counts, verify, write_corpus, write_manifest
from moiety.data.structure import Structure
from moiety.data.validate import verdicts
from moiety.errors import InputError

FILES = Path(__file__).parent / "data" / "files"


RECIPE = """
name: made-up
title: Chains of carbon
domain: molecule
licence: CC0-1.0
citation: nobody
sources: []
splits: by number
profiles: {full: {size: 40}, deadly: {size: 40, die: 2}, faulty: {size: 40, fault: 1}}
"""
MODULE = """
import os, signal
import numpy as np
from moiety.data.structure import Structure
from moiety.errors import InputError

def parts(archives, options):
    return [[0, 10], [10, 25], [20, 30], [30, 40]]

def structures(archives, options, part):
    for number in range(*part):
        if part[0] == 10 * options.get("die", -1) and number == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        if part[0] == 10 * options.get("fault", -1):
            raise InputError(f"part {part} is broken")
        size = 3 + number % 5
        positions = np.arange(size)[:, None] * [1.5 if number != 7 else 0.1, 0, 0]
        split = "val" if number % 4 == 0 else "train"
        yield Structure([6] * size, positions, id=f"c{number}", scalars={"n": number}, groups={"split": split})
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Four parts of which the third repeats five ids of the second; one structure is no structure."""
    (tmp_path / "made-up.py").write_text(MODULE)
    path = tmp_path / "made-up.yaml"
    path.write_text(RECIPE)
    return path


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256 of everything but the manifest."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"  # the dead wait for their parent


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


def test_shards_are_the_same_bytes_for_any_number_of_workers(recipe: Path, tmp_path: Path):
    one = build(recipe, "full", tmp_path / "one", workers=1)
    two = build(recipe, "full", tmp_path / "two", workers=2)
    assert one == two
    assert one["counts"] == {"in": 45, "ok": 39, "rejected": {"duplicate-id": 5, "overlap": 1}}
    assert one["shards"][0]["file"] == "train-00000-00000.parquet"
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") != {}
    assert sorted(Corpus.open(tmp_path / "two").ids()) == sorted(f"c{number}" for number in range(40) if number != 7)


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes(recipe: Path, tmp_path: Path):
    ray = pytest.importorskip("ray")
    local = build(recipe, "full", tmp_path / "local", workers=2)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        distributed = build(recipe, "full", tmp_path / "ray", workers=2, engine="ray")
        with pytest.raises(InputError, match="is broken"):
            build(recipe, "faulty", tmp_path / "faulty", engine="ray")
        with pytest.raises(WorkerDied, match=r"part 2 \(\[20, 30\]\)"):
            build(recipe, "deadly", tmp_path / "deadly", engine="ray")
    finally:
        ray.shutdown()
    assert distributed == local
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "local") != {}
    assert not (tmp_path / "faulty").exists() and not (tmp_path / "deadly").exists()


@pytest.mark.parametrize(
    ("profile", "error", "told"),
    [
        ("deadly", WorkerDied, r"the worker of part 2 \(\[20, 30\]\) was killed by SIGKILL \(out of memory"),
        ("faulty", InputError, r"part \[10, 25\] is broken"),
    ],
)
def test_a_worker_that_dies_or_fails_leaves_nothing_and_is_named(
    recipe: Path, tmp_path: Path, profile: str, error: type[Exception], told: str
):
    with pytest.raises(error, match=told):
        build(recipe, profile, tmp_path / "out" / "corpus", workers=2)
    assert list((tmp_path / "out").iterdir()) == []
    assert multiprocessing.active_children() == []


def test_ctrl_c_ends_all_workers(recipe: Path, tmp_path: Path):
    text = (tmp_path / "made-up.py").read_text()
    (tmp_path / "made-up.py").write_text(
        text.replace("    for number", "    import time; time.sleep(600)\n    for number")
    )
    code = (
        f"from moiety.data.build import build\nbuild({str(recipe)!r}, 'full', {str(tmp_path / 'out/x')!r}, workers=2)"
    )
    script = tmp_path / "go.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    # a shell hands down to what it runs in the background that interrupts are ignored
    process = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, str(script)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 3 and time.monotonic() < deadline:  # two and their tracker
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not left
    assert list((tmp_path / "out").iterdir()) == []


def test_counts_of_several_shards_are_read_where_they_lie():
    of_shards = [np.arange(start, stop, dtype=np.int32) for start, stop in ((0, 10), (10, 11), (11, 11), (11, 40))]
    counts = Counts(of_shards)
    indices = np.random.default_rng(0).integers(0, 40, 100)
    assert counts[indices].tolist() == indices.tolist()
    assert np.asarray(counts).tolist() == list(range(40))
    assert (len(counts), counts.sum(), counts[np.zeros(0, int)].tolist()) == (40, 780, [])


def test_an_unknown_engine_is_refused(recipe: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--engine spark: use one of processes, ray"):
        build(recipe, "full", tmp_path / "out", engine="spark")


@pytest.mark.slow
def test_reading_holds_nothing_that_grows_with_the_corpus():
    benchmark = Path(__file__).parents[1] / "benchmarks/corpus_scale.py"
    command = [sys.executable, str(benchmark), "--structures", "200000"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opened = [json.loads(line.removeprefix("open ")) for line in printed.splitlines() if line.startswith("open ")]
    small, large = opened
    assert (small["structures"], large["structures"]) == (10_000, 200_000)
    assert large["read_mb"] - small["read_mb"] < 10  # a byte a structure and column would be more
    assert large["open_mb"] < 10
    mixtures = [
        json.loads(line.removeprefix("mixture ")) for line in printed.splitlines() if line.startswith("mixture")
    ]
    assert [mixture["rank"] for mixture in mixtures] == [0, 1, 0, 1]
    assert mixtures[3]["steps_mb"] - mixtures[1]["steps_mb"] < 3  # two counts and a place of each would be 4


def test_a_collection_builds_what_changed_and_show_prints_one_table(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moiety.data.build.recipes_dir", lambda: tmp_path)
    (tmp_path / "both.yaml").write_text("name: both\ntitle: Two corpora\ncorpora: [made-up, other]\n")
    (tmp_path / "other.yaml").write_text(recipe.read_text().replace("name: made-up", "name: other"))
    (tmp_path / "other.py").write_text(MODULE)
    command = ["data", "build", "both", "--profile", "full", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["corpora"]) == ["made-up", "other"]
    assert [recipe.name for recipe in list_recipes()] == ["made-up", "other"]
    (tmp_path / "other.py").write_text(MODULE.replace("number % 4", "number % 5"))
    assert run(command) == 0
    told = capsys.readouterr().err
    assert "made-up: " in told and "kept" in told and "other: building" in told
    assert run(["data", "show", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "train 31, val 8" in table and "CC0-1.0" in table and "molecule" in table
