"""Files made to run something or to show another file, one or more for every container and every structure reader.

| read by | traps |
|---|---|
| hdf5 | links, storage and virtual data sets in another file; a filter plug-in; a type of Python objects |
| npz | arrays of pickled objects |
| aselmdb, ase_sqlite, sqlite | pickled rows, arrays of objects, ASE's named classes; views, computed columns |
| json, jsonl | names of classes to import (pymatgen, jsonpickle), a YAML tag |
| parquet | an extension type that is a pickle (CVE-2023-47248) |
| csv, lines, fasta, qm9_xyz | formulas, shell and Python where a cell is expected |
| msgpack | extension types, pickled arrays in the manner of msgpack-numpy |
| pickled | functions called by an object, by a nested one, by a tensor |
| files, sdf, and every suffix of the readers | pickles; Python in place of text, symbols, cells, operations |

The tests run over the registries: a new container or suffix without a trap fails.
"""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import msgpack
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from moiety.data.containers import KINDS, records
from moiety.data.declared_fields import Absent, FieldReader
from moiety.data.readers import CIF, PDB, SDF, XYZ
from moiety.data.validate import Rejected, verdicts
from moiety.errors import InputError

FILES = Path(__file__).parent / "data" / "files"
SECRET = "the secret of another file"
Trap = tuple[str, bytes | Callable[[Path], None], dict[str, Any]]  # name, content or who writes it, options


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(folder: Path) -> str:
    return f"touch {folder / 'canary'}"


def python(folder: Path) -> str:
    return f"__import__('os').system('{touch(folder)}')"


def evil_pickle(folder: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Runs(os.system, touch(folder)), protocol=protocol)


def lmdb_of(values: list[bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with lmdb.open(str(path), subdir=False, map_size=1 << 20) as environment, environment.begin(write=True) as put:
            for key, value in enumerate(values):
                put.put(str(key).encode(), value)

    return write


def database_of(*statements: str, values: tuple[Any, ...] = ()) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with sqlite3.connect(path) as database:
            for statement in statements:
                database.execute(statement, values if "?" in statement else ())
        database.close()

    return write


def hdf5_traps(folder: Path) -> list[Trap]:
    secret = str(folder / "secret")

    def storage(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("r", (1, 1, 3), "S8", external=[(secret, 0, 24)])

    def link(path: Path) -> None:
        with h5py.File(folder / "other.h5", "w") as other:
            other["r"] = np.full((1, 1, 3), SECRET, dtype=f"S{len(SECRET)}")
        with h5py.File(path, "w") as file:
            file["r"] = h5py.ExternalLink(str(folder / "other.h5"), "r")

    def virtual(path: Path) -> None:
        link(folder / "unused.h5")
        layout = h5py.VirtualLayout((1, 1, 3), f"S{len(SECRET)}")
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "r", (1, 1, 3))
        with h5py.File(path, "w") as file:
            file.create_virtual_dataset("r", layout)

    def plug_in(path: Path) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 1, 3))
        properties.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL, ())
        with h5py.File(path, "w") as file:
            space = h5py.h5s.create_simple((1, 1, 3))
            h5py.h5d.create(file.id, b"r", h5py.h5t.IEEE_F64LE, space, properties)

    def objects(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("r", data=np.void(evil_pickle(folder)))

    options = {"layout": "conformers", "conformers": "r"}
    writers = {"storage": storage, "link": link, "virtual": virtual, "plug-in": plug_in, "objects": objects}
    return [(f"{name}.h5", write, options) for name, write in writers.items()]


def npz_traps(folder: Path) -> list[Trap]:
    def write(path: Path) -> None:
        np.savez(path, r=np.array([Runs(os.system, touch(folder))], dtype=object))

    return [
        ("frames.npz", write, {"layout": "frames", "per_frame": ["r"]}),
        ("ragged.npz", write, {"layout": "ragged", "counts": "r", "per_atom": ["r"]}),
    ]


def aselmdb_traps(folder: Path) -> list[Trap]:
    item = {"__ndarray__": [[1], "object", [python(folder)]]}
    named = {"numbers": {"__ase_objtype__": "os.system", "command": touch(folder)}}
    rows = [zlib.compress(json.dumps(row).encode()) for row in ({"numbers": item}, named)]
    return [("pickles.aselmdb", lmdb_of([evil_pickle(folder)]), {}), ("rows.aselmdb", lmdb_of(rows), {})]


SYSTEMS = ("id", "numbers", "positions", "cell", "forces", "stress", "dipole", "magmoms", "charges", "tags",
           "initial_magmoms", "initial_charges", "energy", "free_energy", "magmom", "charge", "pbc",
           "key_value_pairs", "data")  # fmt: skip


def ase_sqlite_traps(folder: Path) -> list[Trap]:
    create = f"CREATE TABLE systems ({', '.join(SYSTEMS)})"
    insert = "INSERT INTO systems (id, pbc, data) VALUES (1, 0, ?)"
    objects = json.dumps({"x": {"__ndarray__": [[1], "object", 8]}}).encode()
    pointed = len(evil_pickle(folder)) + 8
    contents = (evil_pickle(folder), pointed.to_bytes(8, "little") + evil_pickle(folder) + objects)
    rows = [(f"{n}.db", database_of(create, insert, values=(data,)), {}) for n, data in enumerate(contents)]
    view = f"CREATE VIEW systems AS SELECT load_extension('{folder}/evil.so') AS id"
    return [*rows, ("view.db", database_of(view), {})]


def sqlite_traps(folder: Path) -> list[Trap]:
    options = {"table": "t", "key": "id", "columns": ["x"], "blobs": {"x": "O"}}
    plain = {"table": "t", "key": "id", "columns": ["x"]}
    evil = f"load_extension('{folder}/evil.so')"
    statements = {
        "view.db": [f"CREATE VIEW t AS SELECT 1 AS id, {evil} AS x"],
        "computed.db": [f"CREATE TABLE t (id, x GENERATED ALWAYS AS (printf('{SECRET}')) VIRTUAL)"],
        "read.db": [
            "CREATE TABLE t (id, x)",
            "INSERT INTO t VALUES (1, 'row')",
            f"CREATE VIEW v AS SELECT readfile('{folder}/secret') AS x",
        ],
    }
    made: list[Trap] = [(name, database_of(*lines), plain) for name, lines in statements.items()]
    insert = ["CREATE TABLE t (id, x)", "INSERT INTO t VALUES (1, ?)"]
    return [*made, ("objects.db", database_of(*insert, values=(evil_pickle(folder),)), options)]


def json_items(folder: Path) -> list[Any]:
    return [
        {"r": {"@module": "os", "@class": "system", "command": touch(folder), "sites": []}},
        {"r": {"py/reduce": [{"py/function": "os.system"}, {"py/tuple": [touch(folder)]}]}},
        {"r": f"!!python/object/apply:os.system [{touch(folder)}]"},
        {"r": {"__ndarray__": [[1], "object", [python(folder)]]}},
    ]


def json_traps(folder: Path) -> list[Trap]:
    return [("a.json", json.dumps(json_items(folder)).encode(), {"prefix": "item"})]


def jsonl_traps(folder: Path) -> list[Trap]:
    return [("a.jsonl", "\n".join(map(json.dumps, [*json_items(folder), python(folder)])).encode(), {})]


def parquet_traps(folder: Path) -> list[Trap]:
    def write(path: Path) -> None:
        marks = {b"ARROW:extension:name": b"arrow.py_extension_type"}
        marks |= {b"ARROW:extension:metadata": evil_pickle(folder)}
        field = pyarrow.field("r", pyarrow.binary(), metadata=marks)
        table = pyarrow.table([[evil_pickle(folder)]], schema=pyarrow.schema([field], {b"pandas": b"{}"}))
        pyarrow.parquet.write_table(table, path)

    return [("a.parquet", write, {"columns": ["r"]})]


def cells(folder: Path) -> str:
    return f'r\n"=cmd|\' /C {touch(folder)}\'!A1"\n$({touch(folder)})\n"{python(folder)}"\n'


def csv_traps(folder: Path) -> list[Trap]:
    return [("a.csv", cells(folder).encode(), {})]


def lines_traps(folder: Path) -> list[Trap]:
    return [("a.txt", cells(folder).encode(), {"columns": ["r"]})]


def fasta_traps(folder: Path) -> list[Trap]:
    return [("a.fasta", f">$({touch(folder)}) {python(folder)}\nACD\n>b\n{python(folder)}\n".encode(), {})]


def msgpack_traps(folder: Path) -> list[Trap]:
    array = {b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": evil_pickle(folder)}
    contents = ({"m": msgpack.ExtType(5, evil_pickle(folder))}, {"m": {"xyz": array}}, {"m": msgpack.Timestamp(1)})
    pack: Any = msgpack.packb
    return [(f"{number}.msgpack", pack(item), {}) for number, item in enumerate(contents)]


def qm9_traps(folder: Path) -> list[Trap]:
    lines = f"1\ngdb 1\t{python(folder)}\nH 0 0 {python(folder)} 0\n1\n$({touch(folder)})\nInChI"
    return [("a.qm9", lines.encode(), {})]


def pickled_traps(folder: Path) -> list[Trap]:
    calls = [Runs(os.system, touch(folder)), Runs(eval, python(folder)), [Runs(exec, python(folder))]]
    calls += [Runs(torch.storage._load_from_bytes, evil_pickle(folder))]
    protocols = (0, 2, 4, 5)
    return [
        (f"{protocol}.lmdb", lmdb_of([pickle.dumps(call, protocol=protocol)]), {})
        for call, protocol in zip(calls, protocols, strict=True)
    ]


def text_traps(folder: Path) -> dict[str, list[str]]:
    """Texts of the structure formats, by suffix, with Python where symbols, numbers, cells and operations stand."""
    call, water = python(folder), (FILES / "water.xyz").read_text()
    water_lines = water.split("\n")
    comments = [f'a="!!python/object/apply:os.system [{touch(folder)}]" c="_JSON {call}" d=[{call}]']
    comments += [f'Lattice="{call}"', f"Properties={call}", f"Properties=species:S:1:pos:R:3:{call}:R:1"]
    xyz = ["\n".join([water_lines[0], comment, *water_lines[2:]]) for comment in comments]
    xyz += [water.replace("O ", f"{call} ")]
    sdf = (FILES / "two.sdf").read_text()
    entity = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file://{}">]><x>&a;</x>'.format(folder / "secret")
    halite, peptide = (FILES / "halite.cif").read_text(), (FILES / "peptide.pdb").read_text()
    cif = [entity, halite.replace("'F m -3 m'", f'"{call}"'), halite.replace("5.64", call), halite + f"_a ;{call}"]
    pdb = [f"HEADER {call}\nCRYST1 {call}\n{peptide}", peptide.replace("ALA", "$(t"), f"ATOM  {call}\n"]
    texts = {XYZ: xyz, SDF: [sdf.replace("$$$$", f"> <{call}>\n{call}\n\n$$$$"), f"{call}\n" * 6], CIF: cif, PDB: pdb}
    return {suffix: found for suffixes, found in texts.items() for suffix in suffixes}


def structure_traps(folder: Path) -> list[tuple[str, bytes]]:
    header = f"{dict(descr='|O', fortran_order=False, shape=(1,))!s:<69}\n".encode()
    array = b"\x93NUMPY\x01\x00\x46\x00" + header + evil_pickle(folder)
    made = []
    for suffix, texts in text_traps(folder).items():
        contents = [*(text.encode() for text in texts), evil_pickle(folder, 0), evil_pickle(folder), array]
        made += [(f"trap{number}{suffix}", content) for number, content in enumerate(contents)]
    return made


def files_traps(folder: Path) -> list[Trap]:
    def archive(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content in structure_traps(folder):
                (folder / name).write_bytes(content)
                tar.add(folder / name, name)

    return [*((name, content, {}) for name, content in structure_traps(folder)), ("all.tar", archive, {})]


def sdf_traps(folder: Path) -> list[Trap]:
    return [(name, content, {}) for name, content in structure_traps(folder) if name.endswith(".sdf")]


TRAPS: dict[str, Callable[[Path], list[Trap]]] = {
    "hdf5": hdf5_traps,
    "npz": npz_traps,
    "aselmdb": aselmdb_traps,
    "ase_sqlite": ase_sqlite_traps,
    "sqlite": sqlite_traps,
    "json": json_traps,
    "jsonl": jsonl_traps,
    "parquet": parquet_traps,
    "csv": csv_traps,
    "lines": lines_traps,
    "fasta": fasta_traps,
    "msgpack": msgpack_traps,
    "qm9_xyz": qm9_traps,
    "files": files_traps,
    "sdf": sdf_traps,
    "pickled": pickled_traps,
}
FIELDS = {"node_type": {"from": "r"}, "positions": {"from": "r"}}
READERS = [
    FieldReader({"structure": {"from": "r"}, "fields": {}}, {}, "trap"),
    FieldReader({"residues": {"sequence": "r", "coords": "r"}, "fields": {}}, {}, "trap"),
    FieldReader({"fields": FIELDS}, {}, "trap"),
]


def read_all(path: Path, container: str, options: dict[str, Any]) -> str:
    """Everything that can be had of a file, in words."""
    words = []
    try:
        for _, record in records(path, container, options):
            words.append(repr(record))
            for reader in READERS:
                try:
                    words.append(repr(reader.structure(record, record)))
                except (Absent, Rejected) as error:
                    words.append(str(error))
    except InputError as error:
        words.append(str(error))
    return "\n".join(words)


@pytest.mark.parametrize("container", KINDS)
def test_nothing_in_a_container_runs_or_reaches_another_file(tmp_path: Path, container: str):
    (tmp_path / "secret").write_text(SECRET)
    for name, content, options in TRAPS[container](tmp_path):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        found = read_all(path, container, options)
        assert found, name
        assert SECRET not in found, name
        assert not (tmp_path / "canary").exists(), name


@pytest.mark.parametrize("suffix", XYZ + SDF + CIF + PDB)
def test_nothing_in_a_structure_file_runs(tmp_path: Path, suffix: str):
    (tmp_path / "secret").write_text(SECRET)
    traps = [(name, content) for name, content in structure_traps(tmp_path) if Path(name).suffix == suffix]
    assert len(traps) >= 5
    for name, content in traps:
        (tmp_path / name).write_bytes(content)
        found = [verdict for all_atom in (False, True) for verdict in verdicts(tmp_path / name, all_atom)]
        assert found, name
        assert SECRET not in repr(found), name
    assert not (tmp_path / "canary").exists()


def test_the_traps_would_run_if_anybody_let_them(tmp_path: Path):
    pickle.loads(evil_pickle(tmp_path))
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    eval(python(tmp_path))
    assert (tmp_path / "canary").exists()
