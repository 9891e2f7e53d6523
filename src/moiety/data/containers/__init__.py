"""Containers: how corpora are stored, one small module a container, `records(source, options)` in each.

A record is a key, unique in its file, and a mapping of field names to arrays, numbers and texts as they are stored;
what they mean stands in the recipe (`moiety.data.declared`). Records are streamed. Nothing that a file says is run: no
pickle, no plug-in, no view, no extension type, no link out of the file. A record that cannot be read is a `Rejected`,
a file that cannot be read an InputError.

| container | library | layouts |
|---|---|---|
| hdf5 | h5py | `conformers` (a group a molecule), `ragged` (flat arrays and pointers), `grid` (fields on a mesh) |
| npz | NumPy | `frames` (one molecule, many frames), `ragged` |
| aselmdb | lmdb | ASE's rows, zlib-compressed JSON |
| ase_sqlite, sqlite | sqlite3 | ASE's rows; any table, blobs as arrays of a named dtype |
| json, jsonl | ijson, json | streams of items, also compressed |
| parquet, csv, fasta, msgpack | pyarrow, csv, biotite, msgpack | rows; GEOM's molecules and conformers |
| lines, sdf | -, RDKit | tables and lists without a header; one SDF of any length |
| qm9_xyz | - | QM9's own .xyz |
| files | moiety.data.readers | structure files |
| pickled | a restricted process | LMDBs of pickled PyTorch Geometric objects |
"""

from __future__ import annotations

import difflib
import importlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moiety.data import archives
from moiety.errors import InputError

Found = tuple[str, Any]  # the key, and a record (a dict), the Structure of a file, or a Rejected


@dataclass(frozen=True)
class Kind:
    """What the module of a container has to offer."""

    module: str
    options: tuple[str, ...]  # names it takes
    needed: tuple[str, ...] = ()  # of these, the ones without which it cannot work
    from_disk: bool = False  # wants a path; the others read a stream


KINDS = {
    "hdf5": Kind(
        "hdf5",
        ("layout", "root", "conformers", "per_conformer", "pointer", "counts", "per_atom", "per_structure", "fields",
         "axes", "every", "stride"),
        ("layout",), True,
    ),
    "npz": Kind(
        "npz", ("layout", "per_frame", "shared", "pointer", "counts", "per_atom", "per_structure"), ("layout",)
    ),
    "aselmdb": Kind("aselmdb", (), (), True),
    "ase_sqlite": Kind("ase_sqlite", (), (), True),
    "sqlite": Kind("sqlite", ("table", "key", "columns", "blobs"), ("table", "key", "columns"), True),
    "json": Kind("json_stream", ("prefix", "levels")),
    "jsonl": Kind("jsonl", ()),
    "parquet": Kind("parquet", ("columns",), ("columns",), True),
    "csv": Kind("csv_rows", ("delimiter",)),
    "lines": Kind("lines", ("columns", "delimiter", "comment"), ("columns",)),
    "fasta": Kind("fasta", ()),
    "msgpack": Kind("msgpack_stream", ("conformers", "most")),
    "qm9_xyz": Kind("qm9_xyz", ()),
    "files": Kind("files", ("all_atom", "ligand"), (), True),
    "sdf": Kind("sdf_stream", ()),
    "pickled": Kind("pickled", (), (), True),
}  # fmt: skip


def check_keys(given: Collection[Any], known: Sequence[str], where: str) -> None:
    """Refuses a key that nobody reads, and names the nearest one.

    Raises:
        InputError: with the place, the key and the nearest known one.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")


def kind_of(container: str, options: Mapping[str, Any], where: str) -> Kind:
    """The container of that name, its options checked."""
    check_keys([container], list(KINDS), f"{where}: container")
    kind = KINDS[container]
    check_keys(options, kind.options, f"{where}: {container}")
    if missing := [name for name in kind.needed if name not in options]:
        raise InputError(f"{where}: {container} needs {missing[0]!r}")
    return kind


def records(
    path: Path,
    container: str,
    options: Mapping[str, Any] | None = None,
    member: Sequence[str] = ("*",),
    limits: archives.Limits = archives.DEFAULT,
) -> Iterator[Found]:
    """Streams the records of a file, or of the members of an archive.

    Args:
        path: the file, plain, compressed, or an archive.
        container: one of KINDS.
        options: what the container has to be told, see its module.
        member: patterns of the archive's members that are read.
        limits: what an archive or a compressed file may unpack to.

    Raises:
        InputError: unknown container or option, a file that is unsafe or no such container.
    """
    kind = kind_of(container, options or {}, str(path))
    read = importlib.import_module(f"{__name__}.{kind.module}").records
    if archives.is_archive(path):
        for name, stream in archives.members(path, member, limits):
            if container != "files":  # whose readers decompress, and find the format in the whole name
                stream = archives.decompressed_member(stream, name, limits)
            for key, record in _from_stream(read, kind, stream, name, options or {}):
                yield f"{name}/{key}", record
    elif kind.from_disk and (container == "files" or path.suffix not in archives.COMPRESSED):
        if not path.exists():
            raise InputError(f"{path}: no such file; check the path")
        yield from read(path, options or {})
    else:
        with archives.open_plain(path, limits) as stream:
            yield from _from_stream(read, kind, stream, path.name, options or {})


def _from_stream(read: Any, kind: Kind, stream: Any, name: str, options: Mapping[str, Any]) -> Iterator[Found]:
    if not kind.from_disk:
        try:
            yield from read(stream, {**options})
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not text in UTF-8 ({error.reason}); check what the file is") from None
        return
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:  # libraries that seek need a file
        pure = PurePosixPath(name)
        path = Path(folder) / (
            pure.stem if pure.suffix in archives.COMPRESSED and kind.module != "files" else pure.name
        )
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, archives.STREAM_BLOCK)
        yield from read(path, {**options})
