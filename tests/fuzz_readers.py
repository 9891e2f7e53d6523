"""Mutated files against every reader: python tests/fuzz_readers.py [--count 10000] [--only structures]

A reader may answer with verdicts (structure files) or an InputError (containers), within 2 s of one core and 1 GiB.
Anything else fails: an exception, a signal, a structure that passed and cannot be stored. An input is made from the
seed and its number alone; those that fail are written to --keep. Exit 1 if any does.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import multiprocessing
import random
import resource
import sqlite3
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
SECONDS = 2.0  # of one core, for one input
PATIENCE = 20.0  # seconds on the clock before a worker is stopped; the machine may be busy
MEMORY = 2**30  # bytes of address space beyond what the imported libraries take
MAX_RECORDS = 1_000  # of one container
NUMBERS = (
    b"1e308",
    b"-1e308",
    b"1e-320",
    b"nan",
    b"-inf",
    b"-0",
    b"0",
    b"-1",
    b"119",
    b"4294967297",
    b"9" * 400,
    b"1e",
)
KINDS = {  # suffix of a seed -> container and options
    ".h5": ("hdf5", {"layout": "conformers", "conformers": "positions", "fields": ["numbers"]}),
    ".npz": ("npz", {"layout": "frames", "per_frame": ["R", "E"], "shared": ["z"]}),
    ".aselmdb": ("aselmdb", {}),
    ".db": ("sqlite", {"table": "t", "key": "id", "columns": ["id", "r"], "blobs": {"r": "float64"}}),
    ".json": ("json", {}),
    ".jsonl": ("jsonl", {}),
    ".parquet": ("parquet", {"columns": ["name", "r"]}),
    ".csv": ("csv", {}),
    ".fasta": ("fasta", {}),
    ".msgpack": ("msgpack", {"conformers": "conformers"}),
    ".qm9": ("qm9_xyz", {}),
}


@dataclass(frozen=True)
class Result:
    number: int
    failure: str  # empty where the reader answered
    seconds: float
    peak: int  # bytes, of the worker so far


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("structures", "containers"), help="default: both")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"))
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moiety-fuzz-") as folder:
        seeds = structure_seeds() if args.only != "containers" else []
        seeds += container_seeds(Path(folder)) if args.only != "structures" else []
        results = list(run(seeds, args.seed, args.count, args.workers, Path(folder)))
    failures = [result for result in results if result.failure]
    for result in failures:
        name, data = mutated(seeds, args.seed, result.number)
        args.keep.mkdir(exist_ok=True)
        (args.keep / f"{result.number:06d}-{name}").write_bytes(data)
        print(f"{result.number} {name}: {result.failure}")
    kinds = Counter(result.failure.split(":")[0] for result in failures)
    slowest = max(results, key=lambda result: result.seconds)
    print(
        f"{len(results)} inputs from {len(seeds)} files, seed {args.seed}: {dict(kinds) or 'no failure'}; "
        f"slowest {slowest.seconds:.2f} s (input {slowest.number}, {mutated(seeds, args.seed, slowest.number)[0]}), "
        f"peak {max(result.peak for result in results) / 2**20:.0f} MiB, {time.perf_counter() - started:.0f} s in all"
    )
    return bool(failures)


def run(seeds: list[tuple[str, bytes]], seed: int, count: int, workers: int, folder: Path) -> Iterator[Result]:
    """The result of every input, as the workers finish. One that dies or hangs is replaced."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    warm_up()
    numbers = iter(range(count))
    at_work: dict[Connection, tuple[Any, int, float]] = {}

    def start() -> None:
        number = next(numbers, None)
        if number is not None:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, seeds, seed, folder), daemon=True)
            process.start()
            theirs.close()
            ours.send(number)
            at_work[ours] = process, number, time.monotonic()

    for _ in range(workers):
        start()
    while at_work:
        for ours in [*wait(list(at_work), timeout=0.5)]:
            assert isinstance(ours, Connection)
            process, number, _ = at_work[ours]
            try:
                yield ours.recv()
            except EOFError:
                process.join()
                del at_work[ours]
                yield Result(number, f"crash: exit {process.exitcode}", 0.0, 0)
                start()
                continue
            number = next(numbers, None)
            ours.send(number)
            if number is None:
                process.join()
                del at_work[ours]
            else:
                at_work[ours] = process, number, time.monotonic()
        for ours, (process, number, since) in list(at_work.items()):
            if time.monotonic() - since > PATIENCE:
                process.kill()
                del at_work[ours]
                yield Result(number, f"hang: no answer in {PATIENCE} s", PATIENCE, 0)
                start()


def work(pipe: Connection, seeds: list[tuple[str, bytes]], seed: int, folder: Path) -> None:
    """Answers numbers of inputs with results until there are no more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    while (number := pipe.recv()) is not None:
        name, data = mutated(seeds, seed, number)
        path = folder / f"{number}-{name}"
        path.write_bytes(data)
        started = time.process_time()
        try:
            failure = read(path)
        except MemoryError:
            failure = "memory: MemoryError"
        except Exception:
            failure = f"exception: {traceback.format_exc(limit=-4)}"
        seconds = time.process_time() - started
        path.unlink()
        if not failure and seconds > SECONDS:
            failure = f"hang: {seconds:.1f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(Result(number, failure, seconds, peak))


def read(path: Path) -> str:
    """Reads a file as its suffix says; what is wrong with the answer, or nothing."""
    from moiety.data import containers
    from moiety.data.columns import table_from
    from moiety.data.validate import verdicts
    from moiety.errors import InputError

    if path.suffix in KINDS:
        try:
            for _, (_, record) in zip(range(MAX_RECORDS), containers.records(path, *KINDS[path.suffix]), strict=False):
                assert record is not None
        except InputError as error:
            assert str(error)
        return ""
    for verdict in verdicts(path):
        if "MemoryError" in verdict.reason or "bad_alloc" in verdict.reason:
            return f"memory: {verdict.reason}"
        if verdict.structure is not None:
            table_from([verdict.structure], np.zeros(1, dtype=np.int32))
    return ""


def warm_up() -> None:
    """Imports what readers import at first use."""
    for name in ("water.xyz", "two.sdf", "peptide.pdb", "peptide.cif", "halite.cif", "good.extxyz"):
        assert not read(DATA / "files" / name)


def mutated(seeds: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """Name and content of an input: a seed after 1 to 4 mutations, of the text inside where it is compressed."""
    rng = random.Random(f"{seed}/{number}")
    name, data = rng.choice(seeds)
    pack, unpack = {".gz": (gzip.compress, gzip.decompress), ".xz": (lzma.compress, lzma.decompress)}.get(
        Path(name).suffix, (bytes, bytes)
    )
    if rng.random() < 0.5:
        try:
            data = unpack(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error):  # some seeds are damaged on purpose
            pack = bytes
    else:
        pack = bytes
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(MUTATIONS)(data, rng, rng.choice(seeds)[1])
    return name, pack(data)


def flip(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """Some bytes become others."""
    out = bytearray(data)
    for _change in range(rng.randint(1, 8) if out else 0):
        out[rng.randrange(len(out))] = rng.choice((rng.randrange(256), rng.randrange(32, 127)))
    return bytes(out)


def truncate(data: bytes, rng: random.Random, _: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def shuffle(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """Lines in another order, all or a few."""
    lines = data.split(b"\n")
    start, stop = sorted((rng.randint(0, len(lines)), rng.randint(0, len(lines))))
    middle = lines[start:stop]
    rng.shuffle(middle)
    return b"\n".join(lines[:start] + middle + lines[stop:])


def renumber(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """A few words that hold digits become numbers that nobody expects."""
    words = data.split(b" ")
    places = [place for place, word in enumerate(words) if any(48 <= byte < 58 for byte in word)]
    for place in rng.sample(places, min(len(places), rng.randint(1, 4))):
        words[place] = rng.choice(NUMBERS)
    return b" ".join(words)


def repeat(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """A part of the file, many times."""
    start, stop = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 10, 100)) + data[stop:]


def drop(data: bytes, rng: random.Random, _: bytes) -> bytes:
    """A part of the file is gone."""
    start, stop = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data[:start] + data[stop:]


MUTATIONS = (flip, flip, truncate, splice, shuffle, renumber, renumber, repeat, drop)


def structure_seeds() -> list[tuple[str, bytes]]:
    """Names and contents of the structure files of the tests."""
    paths = sorted([*(DATA / "files").iterdir(), *(DATA / "verdicts").iterdir()])
    return [(path.name, path.read_bytes()) for path in paths if path.suffix not in (".yaml", ".foo", ".dat")]


def container_seeds(folder: Path) -> list[tuple[str, bytes]]:
    """A small good file of every container, by the real libraries; each five times, so that they are met often."""
    import h5py
    import lmdb
    import msgpack
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    positions = rng.normal(size=(4, 3, 3))
    with h5py.File(folder / "seed.h5", "w") as file:
        file.create_dataset("a/positions", data=positions, compression="gzip")
        file.create_dataset("a/numbers", data=[8, 1, 1])
    np.savez(folder / "seed.npz", R=positions, E=rng.normal(size=4), z=np.array([8, 1, 1]))
    row = {"numbers": {"__ndarray__": [[3], "int64", [8, 1, 1]]}, "positions": positions[0].tolist(), "energy": -1.5}
    with lmdb.open(str(folder / "seed.aselmdb"), subdir=False, map_size=2**20) as env, env.begin(write=True) as put:
        for key in range(1, 4):
            put.put(str(key).encode(), zlib.compress(json.dumps(row).encode()))
    with sqlite3.connect(folder / "seed.db") as base:
        base.execute("create table t (id integer primary key, r blob)")
        base.executemany("insert into t values (?, ?)", [(k, positions[k].tobytes()) for k in range(4)])
    base.close()
    rows = [{"name": f"m{k}", "r": positions[k].ravel().tolist()} for k in range(4)]
    (folder / "seed.json").write_text(json.dumps(rows))
    (folder / "seed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "seed.parquet")
    (folder / "seed.csv").write_text("name,x,y\n" + "".join(f'm{k},{k},"a ""b"""\n' for k in range(4)))
    (folder / "seed.fasta").write_text(">a one\nMKVL\nAAG\n>b two\nGGSW\n")
    facts = {"charge": 0, "conformers": [{"xyz": positions[0].tolist()}, {"xyz": positions[1].tolist()}]}
    (folder / "seed.msgpack").write_bytes(b"".join(msgpack.packb({f"m{k}": facts}) for k in range(3)))
    qm9 = "1\ngdb 1\t1.0\t2.0\nH 0.1 2.*^-5 0.3 -0.5\n3000.0\n[H]\t[H]\nInChI=1S/H\tInChI=1S/H\n"
    (folder / "seed.qm9").write_text(qm9)
    return [(f"seed{suffix}", (folder / f"seed{suffix}").read_bytes()) for suffix in KINDS] * 5


if __name__ == "__main__":
    sys.exit(main())
