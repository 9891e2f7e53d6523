"""Mutated files against every reader: python tests/fuzz_readers.py [--count 10000] [--only structures]

A reader may answer with verdicts (structure files) or an InputError (containers), within 2 s of one core and 1 GiB.
Anything else fails: an exception, a signal, a structure that passed and cannot be stored. An input is made from the
seed and its number alone; those that fail are written to --keep. Exit 1 if any does.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import pickle
import random
import resource
import sqlite3
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data.archives import Limits

DATA = Path(__file__).parent / "data"
SECONDS = 2.0  # of one core, for one input
PATIENCE = 20.0  # seconds on the clock before a worker is stopped; the machine may be busy
MEMORY = 2**30  # bytes of address space beyond what the imported libraries take
MAX_RECORDS = 1_000  # of one container
MAX_INSIDE = 2**22  # bytes; more, and a mutation that repeats them would fill the memory itself
LIMITS = Limits(member_bytes=2**26, total_bytes=2**28)
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
CONFORMERS = {"layout": "conformers", "conformers": "r", "per_conformer": ["e"], "fields": ["z"]}
RAGGED = {"layout": "ragged", "pointer": "start", "per_atom": ["z", "r"], "per_structure": ["e"]}
GRID = {"layout": "grid", "axes": ["x", "y"], "fields": ["vx", "vy"], "every": 2}
ROW = {"node_type": {"from": "z"}, "positions": {"from": "r"}, "energy": {"from": "e", "unit": "eV", "optional": True}}
ASE = {"node_type": {"from": "numbers"}, "positions": {"from": "positions"}, "cell": {"from": "cell"}}
MESH = {"node_type": {"constant": 1, "count": "points"}, "positions": {"from": "xyz"}}
CONTAINERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # seed -> container, options, fields
    "conformers.h5": ("hdf5", CONFORMERS, ROW),
    "ragged.h5": ("hdf5", RAGGED, ROW),
    "grid.h5": ("hdf5", GRID, MESH),
    "frames.npz": ("npz", {"layout": "frames", "per_frame": ["r", "e"], "shared": ["z"]}, ROW),
    "ragged.npz": ("npz", RAGGED, ROW),
    "rows.aselmdb": ("aselmdb", {}, ASE),
    "rows.db": ("ase_sqlite", {}, ASE),
    "table.sqlite": (
        "sqlite",
        {"table": "t", "key": "id", "columns": ["e", "z", "r"], "blobs": {"z": "<i4", "r": "<f8"}},
        ROW,
    ),
    "objects.lmdb": ("pickled", {}, {"node_type": {"from": "atomic_numbers"}, "positions": {"from": "pos"}}),
    "items.json": ("json", {"prefix": "item"}, ROW),
    "levels.json.bz2": ("json", {"levels": 2}, ROW),
    "lines.jsonl": ("jsonl", {}, ROW),
    "lines.jsonl.gz": ("jsonl", {}, ROW),
    "rows.parquet": ("parquet", {"columns": ["z", "r", "e"]}, ROW),
    "rows.csv": ("csv", {}, {}),
    "rows.csv.xz": ("csv", {}, {}),
    "rows.txt": ("lines", {"columns": ["name", "x", "y"], "delimiter": ","}, {}),
    "records.sdf.gz": ("sdf", {}, {}),
    "entries.fasta": ("fasta", {}, {}),
    "molecules.msgpack": (
        "msgpack",
        {"conformers": "conformers"},
        {"node_type": {"from": "xyz.elements"}, "positions": {"from": "xyz.positions"}},
    ),
    "molecule.qm9": (
        "qm9_xyz",
        {},
        {"node_type": {"from": "symbols", "symbols": True}, "positions": {"from": "positions"}},
    ),
    "members.zip": ("files", {}, {}),
    "members.tar.gz": ("files", {"all_atom": True}, {}),
    "lines.tar.xz": ("jsonl", {}, ROW),
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
        results: list[Result] = []
        for result in run(seeds, args.seed, args.count, args.workers, Path(folder)):
            results.append(result)
            if result.failure:
                name, data = mutated(seeds, args.seed, result.number)
                args.keep.mkdir(exist_ok=True)
                (args.keep / f"{result.number:06d}-{name}").write_bytes(data)
                print(f"{result.number} {name}: {result.failure}", flush=True)
    failures = [result for result in results if result.failure]
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
    warm_up(seeds)
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
        started = seconds_used()
        try:
            failure = read(path)
        except MemoryError:
            failure = "memory: MemoryError"
        except Exception:
            failure = f"exception: {traceback.format_exc(limit=-4)}"
        seconds = seconds_used() - started
        path.unlink()
        if not failure and seconds > SECONDS:
            failure = f"hang: {seconds:.1f} s"
        peak = max(resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        pipe.send(Result(number, failure, seconds, peak))


def seconds_used() -> float:
    """CPU time of this process and of the readers it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def read(path: Path) -> str:
    """Reads a file as its name says; what is wrong with the answer, or nothing."""
    from moiety.data.validate import verdicts

    name = path.name.partition("-")[2]
    if name in CONTAINERS:
        return read_container(path, *CONTAINERS[name])
    for all_atom in (False, True) if ".pdb" in name or "cif" in name or ".ent" in name else (False,):
        for verdict in verdicts(path, all_atom):
            if "MemoryError" in verdict.reason or "bad_alloc" in verdict.reason:
                return f"memory: {verdict.reason}"
            if verdict.structure is not None:
                store(verdict.structure)
    return ""


def read_container(path: Path, container: str, options: dict[str, Any], fields: dict[str, Any]) -> str:
    """Reads records, and makes structures of them as a recipe does."""
    from moiety.data import containers
    from moiety.data.declared_fields import Absent, FieldReader
    from moiety.data.structure import Structure
    from moiety.data.validate import Rejected, check
    from moiety.errors import InputError

    reader = FieldReader({"fields": fields}, {}, "fuzz")
    found = containers.records(path, container, options, limits=LIMITS)
    try:
        for _, (_, record) in zip(range(MAX_RECORDS), found, strict=False):
            assert record is not None
            if not fields and not isinstance(record, Structure):
                continue
            try:
                structure = reader.structure(record, record)
            except (Absent, Rejected):
                continue
            if check(structure) is None:
                store(structure)
    except InputError as error:
        assert str(error)
    return ""


def store(structure: Any) -> None:
    """Makes the row of a shard of it."""
    from moiety.data.columns import table_from

    table_from([structure], np.zeros(1, dtype=np.int32))


def warm_up(seeds: list[tuple[str, bytes]]) -> None:
    """Imports what readers import at first use."""
    from moiety.data.validate import verdicts

    for name in ("water.xyz", "two.sdf", "peptide.pdb", "peptide.cif", "halite.cif", "good.extxyz"):
        for verdict in verdicts(DATA / "files" / name):
            store(verdict.structure)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in {name: data for name, data in seeds if name in CONTAINERS}.items():
            path = Path(folder) / f"0-{name}"
            path.write_bytes(data)
            assert not read(path)


def mutated(seeds: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """Name and content of an input: a seed after 1 to 4 mutations, half of the time of what is packed inside."""
    rng = random.Random(f"{seed}/{number}")
    name, data = rng.choice(seeds)
    pack: Callable[[bytes], bytes] = bytes
    if rng.random() < 0.5:
        with suppress(OSError, EOFError, lzma.LZMAError, zlib.error):  # some seeds are damaged on purpose
            inside, packed = unpacked(Path(name).suffix, data, rng)
            if len(inside) <= MAX_INSIDE:
                data, pack = inside, packed
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(MUTATIONS)(data, rng, rng.choice(seeds)[1])
    return name, pack(data)


def unpacked(suffix: str, data: bytes, rng: random.Random) -> tuple[bytes, Callable[[bytes], bytes]]:
    """What a file has inside, and how to pack it again so that no checksum gives the mutation away."""
    codecs = {".gz": gzip, ".xz": lzma, ".bz2": bz2}
    if suffix in codecs:
        return codecs[suffix].decompress(data), codecs[suffix].compress
    if suffix not in (".zip", ".npz"):
        return data, bytes
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(sorted(members))
    return members[chosen], lambda content: zipped(members | {chosen: content})


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


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
    seeds = [(path.name, path.read_bytes()) for path in paths if path.suffix not in (".yaml", ".foo", ".dat")]
    peptide, methanol = DATA / "files" / "peptide.pdb", DATA / "verdicts" / "methanol.mol"
    return [*seeds, ("peptide.ent.gz", gzip.compress(peptide.read_bytes())), ("one.sd", methanol.read_bytes())]


def container_seeds(folder: Path) -> list[tuple[str, bytes]]:
    """A small good file of every container and layout, by the real libraries; five times each: met often."""
    z, r, e = np.array([8, 1, 1]), np.random.default_rng(0).normal(scale=3, size=(4, 3, 3)), np.arange(4.0)
    rows = [{"name": f"m{k}", "z": z.tolist(), "r": r[k].tolist(), "e": e[k]} for k in range(4)]
    flat = {"z": np.tile(z, 4), "r": r.reshape(-1, 3), "e": e, "start": np.arange(0, 13, 3)}
    array_seeds(folder, z, r, e, flat)
    database_seeds(folder, z, r, e)
    text_seeds(folder, rows, r)
    names = ("water.xyz", "two.sdf", "peptide.pdb", "halite.cif", "peptide.cif")
    members = {name: (DATA / "files" / name).read_bytes() for name in names}
    inside = {"inner.zip": zipped(members), "inner.tar.gz": gzip.compress(tarred(members)), "bare.cif.gz": b""}
    inside["bare.cif.gz"] = gzip.compress(members["halite.cif"])
    (folder / "members.zip").write_bytes(zipped(members | inside))
    (folder / "members.tar.gz").write_bytes(gzip.compress(tarred(members | inside)))
    lines = (folder / "lines.jsonl").read_bytes()
    (folder / "lines.tar.xz").write_bytes(lzma.compress(tarred({"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines)})))
    return [(name, (folder / name).read_bytes()) for name in CONTAINERS] * 5


def array_seeds(folder: Path, z: Any, r: Any, e: Any, flat: dict[str, Any]) -> None:
    import h5py

    with h5py.File(folder / "conformers.h5", "w") as file:
        group = file.create_group("a")
        group.create_dataset("r", data=r, compression="gzip")
        group["z"], group["e"] = z, e
    with h5py.File(folder / "ragged.h5", "w") as file:
        for name, values in flat.items():
            file.create_dataset(name, data=values, chunks=True, shuffle=True, fletcher32=True)
    with h5py.File(folder / "grid.h5", "w") as file:
        file["x"], file["y"] = np.arange(3.0), np.arange(4.0)
        file["vx"], file["vy"] = np.ones((2, 4, 3, 4)), np.ones((2, 4, 3, 4))
    np.savez(folder / "frames.npz", r=r, e=e, z=z)
    np.savez_compressed(folder / "ragged.npz", **flat)


def database_seeds(folder: Path, z: Any, r: Any, e: Any) -> None:
    import ase
    import ase.db
    import lmdb
    import torch
    from ase.calculators.singlepoint import SinglePointCalculator
    from torch_geometric.data import Data

    for name, kind in (("rows.aselmdb", "aselmdb"), ("rows.db", "db")):
        (folder / name).unlink(missing_ok=True)
        database: Any = ase.db.connect(folder / name, type=kind)
        with database:
            for k in range(3):
                atoms = ase.Atoms(z, r[k], cell=np.eye(3) * 9, pbc=True)
                atoms.calc = SinglePointCalculator(atoms, energy=e[k], forces=r[k])
                database.write(atoms, data={"sid": k, "charges": z / 8}, extra=1)
        if hasattr(database, "close"):
            database.close()
    with sqlite3.connect(folder / "table.sqlite") as base:
        base.execute("create table t (id integer primary key, e real, z blob, r blob)")
        rows = [(k, e[k], z.astype("<i4").tobytes(), r[k].tobytes()) for k in range(4)]
        base.executemany("insert into t values (?, ?, ?, ?)", rows)
    base.close()
    with lmdb.open(str(folder / "objects.lmdb"), subdir=False, map_size=2**20) as env, env.begin(write=True) as put:
        for k in range(3):
            item = Data(pos=torch.tensor(r[k]), atomic_numbers=torch.tensor(z), tags=np.zeros(3), sid=k)
            put.put(str(k).encode(), pickle.dumps(item, protocol=2 + k))


def text_seeds(folder: Path, rows: list[dict[str, Any]], r: Any) -> None:
    import msgpack
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "items.json").write_text(json.dumps(rows))
    (folder / "levels.json.bz2").write_bytes(bz2.compress(json.dumps({"m": dict(enumerate(rows))}).encode()))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    cells = "name,x,y\n" + "".join(f'm{k},{k},"a ""b"""\n' for k in range(4))
    (folder / "rows.csv").write_text(cells)
    (folder / "rows.txt").write_text("# three\nm0,0,1\nm1,1,2\n")
    (folder / "records.sdf.gz").write_bytes(gzip.compress((DATA / "files" / "two.sdf").read_bytes()))
    (folder / "rows.csv.xz").write_bytes(lzma.compress(cells.encode()))
    (folder / "entries.fasta").write_text(">a one\nMKVL\nAAG\n>b two\nGGSW\n")
    conformers = [{"xyz": [[8.0, *row] for row in r[k].tolist()], "totalenergy": -5.0} for k in range(2)]
    facts = {"charge": 0, "conformers": conformers}
    (folder / "molecules.msgpack").write_bytes(b"".join(msgpack.packb({f"m{k}": facts}) for k in range(3)))
    qm9 = "1\ngdb 1\t" + "\t".join(["1.0"] * 15) + "\nH 0.1 2.*^-5 0.3 -0.5\n3000.0\n[H]\t[H]\nInChI=1S/H\tInChI=1S/H\n"
    (folder / "molecule.qm9").write_text(qm9)


if __name__ == "__main__":
    sys.exit(main())
