"""Structures as Arrow columns and back, without a copy on the way out.

Arrays are flat lists (positions of N nodes: 3 N doubles); a named label is a column of its own: `scalar:gap`,
`node_scalar:mulliken`, `group:split`. The columns of tensors, `tensor:polarizability` and `node_tensor:velocity`, say
their shape in the metadata of the field.
"""
# Shapes: n structures in the shard, N nodes of one structure.

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from moiety.data.structure import Array, Structure
from moiety.errors import InputError

GEOMETRY: dict[str, tuple[pa.DataType, tuple[int, ...]]] = {  # field -> stored type, shape in memory
    "node_type": (pa.int16(), (-1,)),
    "positions": (pa.float64(), (-1, 3)),
    "node_vectors": (pa.float64(), (-1, 4, 3)),
    "cell": (pa.float64(), (3, 3)),
    "pbc": (pa.bool_(), (3,)),
    "role": (pa.int8(), (-1,)),
}
LABELS: dict[str, tuple[pa.DataType, tuple[int, ...]]] = {
    "residue_index": (pa.int32(), (-1,)),
    "forces": (pa.float64(), (-1, 3)),
    "stress": (pa.float64(), (3, 3)),
    "dipole": (pa.float64(), (3,)),
}
ARRAYS = GEOMETRY | LABELS
INTERNAL = {"energy", "charge", "spin", "num_nodes", "num_edges"}  # numbers that are not named labels
TENSORS = {"tensor:": "tensors", "node_tensor:": "node_tensors"}  # prefix of the column -> field
SHAPE = b"shape"  # key in the metadata of a tensor's column: JSON, -1 for the nodes
STRINGS = ("id", "source", "domain", "theory")
WIDE = {pa.int16(): np.int64, pa.int8(): np.int64, pa.int32(): np.int64}  # stored narrow, used as int64


def table_from(structures: Sequence[Structure], num_edges: Array) -> pa.Table:
    """One row a structure. Columns that nobody fills are left out.

    Args:
        structures: n of them.
        num_edges: [n] directed neighbour pairs.
    """
    columns: dict[str, pa.Array] = {name: pa.array([getattr(s, name) for s in structures]) for name in STRINGS}
    columns["charge"] = pa.array([s.charge for s in structures], pa.int32())
    columns["spin"] = pa.array([s.spin for s in structures], pa.int32())
    columns["num_nodes"] = pa.array([s.num_nodes for s in structures], pa.int32())
    columns["num_edges"] = pa.array(num_edges, pa.int32())
    columns["energy"] = pa.array([s.energy for s in structures], pa.float64())
    for name, (kind, _) in ARRAYS.items():
        columns[name] = _list_column([getattr(s, name) for s in structures], kind)
    columns["chain"] = pa.array([s.chain for s in structures], pa.list_(pa.string()))
    columns["text"] = pa.array([s.text or None for s in structures], pa.list_(pa.string()))
    for name in _names(s.scalars for s in structures):
        columns[f"scalar:{name}"] = pa.array([s.scalars.get(name) for s in structures], pa.float64())
    for name in _names(s.node_scalars for s in structures):
        columns[f"node_scalar:{name}"] = _list_column([s.node_scalars.get(name) for s in structures], pa.float64())
    for name in _names(s.groups for s in structures):
        columns[f"group:{name}"] = pa.array([s.groups.get(name) for s in structures], pa.string())
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, field in TENSORS.items():
        for name in _names(getattr(s, field) for s in structures):
            values = [getattr(s, field).get(name) for s in structures]
            shapes[prefix + name] = _common_shape(prefix + name, structures, values)
            columns[prefix + name] = _list_column(values, pa.float64())
    kept = {name: column for name, column in columns.items() if column.null_count < len(column)}
    metadata = {name: {SHAPE: json.dumps(shape)} for name, shape in shapes.items()}
    fields = [pa.field(name, column.type, metadata=metadata.get(name)) for name, column in kept.items()]
    return pa.table(list(kept.values()), schema=pa.schema(fields))


def _common_shape(column: str, structures: Sequence[Structure], values: Sequence[Array | None]) -> tuple[int, ...]:
    """The shape that all values of a tensor label have; the nodes of a node tensor, its first axis, are -1.

    Raises:
        InputError: one structure has another shape than those before it.
    """
    first: tuple[int, ...] | None = None
    for structure, value in zip(structures, values, strict=True):
        if value is None:
            continue
        shape = np.shape(value)
        if column.startswith("node_"):
            shape = (-1, *shape[1:])
        first = first or shape
        if shape != first:
            raise InputError(f"{structure.source} {structure.id}: {column} is {shape}, others {first}: make them equal")
    return first or ()


def _names(dictionaries: Iterable[dict]) -> list[str]:
    return sorted({name for dictionary in dictionaries for name in dictionary})


def _list_column(arrays: Sequence[Array | None], kind: pa.DataType) -> pa.Array:
    """A list column of flat arrays; None is null."""
    flat = [np.zeros(0) if array is None else np.asarray(array).reshape(-1) for array in arrays]
    offsets = np.cumsum([0, *(len(array) for array in flat)]).astype(np.int32)
    values = pa.array(np.concatenate(flat).astype(kind.to_pandas_dtype()))
    missing = pa.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=missing)


class _Bits:
    """An Arrow bitmap, read bit by bit where it lies: a mapped file stays unread but for the pages asked for."""

    def __init__(self, buffer: pa.Buffer | None, offset: int) -> None:
        self.bytes = None if buffer is None else np.frombuffer(buffer, dtype=np.uint8)
        self.offset = offset

    def __getitem__(self, where: Array | slice) -> Array:
        """[n] bool at the given places; all True where there is no bitmap (no nulls)."""
        places = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        if self.bytes is None:
            return np.ones(len(places), dtype=bool)
        places = places + self.offset
        return (self.bytes[places >> 3] >> (places & 7) & 1).astype(bool)


def _valid(column: pa.Array) -> _Bits:
    return _Bits(column.buffers()[0] if column.null_count else None, column.offset)


class _Floats:
    """A float64 column as numpy, nan where it is null; a view of the mapped file."""

    def __init__(self, column: pa.Array) -> None:
        stop = column.offset + len(column)
        self.values = np.frombuffer(column.buffers()[1], dtype=np.float64)[column.offset : stop]
        self.valid = _valid(column)

    def __getitem__(self, indices: Array) -> Array:
        return np.where(self.valid[indices], self.values[indices], np.nan)


class _Lists:
    """A list column as numpy: offsets and values are views of the mapped file."""

    def __init__(self, column: pa.ListArray, shape: tuple[int, ...]) -> None:
        self.offsets = column.offsets.to_numpy()
        values = column.values
        is_bits = pa.types.is_boolean(values.type)
        self.values = _Bits(values.buffers()[1], values.offset) if is_bits else values.to_numpy()
        self.valid = _valid(column)
        self.shape = shape

    def rows(self, indices: Array) -> list[Array | None]:
        starts, stops = self.offsets[indices].tolist(), self.offsets[indices + 1].tolist()
        values, shape = self.values, self.shape
        return [
            values[start:stop].reshape(shape) if valid else None
            for start, stop, valid in zip(starts, stops, self.valid[indices].tolist(), strict=True)
        ]


class Shard:
    """A shard's table, read by row. Columns are opened at first use."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._lists: dict[str, _Lists] = {}

    def __len__(self) -> int:
        return self.table.num_rows

    def has(self, column: str) -> bool:
        return column in self._columns

    def names(self, prefix: str) -> list[str]:
        """Names of the labels stored under a prefix such as "scalar:"."""
        return [name.removeprefix(prefix) for name in self.table.column_names if name.startswith(prefix)]

    @property
    def labels(self) -> list[str]:
        """Columns that hold labels: energy, forces, scalar:gap."""
        prefixes = ("scalar:", "node_scalar:", *TENSORS)
        plain = ("energy", *(name for name in LABELS if name != "residue_index"))
        return [name for name in self.table.column_names if name in plain or name.startswith(prefixes)]

    def column(self, name: str) -> Array:
        """[n] numbers of a column without nulls."""
        return self.table[name].chunk(0).to_numpy()

    def floats(self, name: str) -> Array:
        """[n] float64 of a column, nan where it is null or absent."""
        if not self.has(name):
            return np.full(len(self), np.nan)
        return self.table[name].chunk(0).to_numpy(zero_copy_only=False).astype(np.float64)

    def known(self, name: str) -> Array:
        """[n] bool, False where a column is null or absent."""
        return self.table[name].is_valid().to_numpy() if self.has(name) else np.zeros(len(self), dtype=bool)

    def strings(self, name: str) -> list[str]:
        """[n] strings of a column, "" where it is null or absent."""
        return [value or "" for value in self.table[name].to_pylist()] if self.has(name) else [""] * len(self)

    def geometry(self, indices: Array) -> list[Structure]:
        """Rows as structures with geometry, scalars, id and domain; arrays are views."""
        columns: dict[str, list[Any]] = {name: self._rows(name, indices) for name in GEOMETRY}
        ids = self.table["id"].chunk(0).take(pa.array(indices)).to_pylist()
        charges, spins = self.column("charge")[indices].tolist(), self.column("spin")[indices].tolist()
        domains = self.table["domain"].chunk(0).take(pa.array(indices)).to_pylist()
        names, rows = self._scalar_rows(indices)
        return [
            Structure(
                domain=domain,
                id=ids[k],
                charge=charges[k],
                spin=spins[k],
                scalars={name: value for name, value in zip(names, rows[k], strict=True) if value == value},
                **{name: column[k] for name, column in columns.items()},
            )
            for k, domain in enumerate(domains)
        ]

    def structure(self, index: int) -> Structure:
        """One row with every field; arrays are copies."""
        row = self.table.slice(index, 1)
        plain = (*STRINGS, "charge", "spin", "energy", "chain")
        fields: dict[str, Any] = {name: row[name][0].as_py() for name in plain if self.has(name)}
        for name in ARRAYS:
            array = self._rows(name, np.array([index]))[0]
            fields[name] = None if array is None else np.array(array)
        names, scalar_rows = self._scalar_rows(np.array([index]))
        return Structure(
            **fields,
            text=(row["text"][0].as_py() or []) if self.has("text") else [],
            scalars={name: value for name, value in zip(names, scalar_rows[0], strict=True) if value == value},
            node_scalars={
                name: np.array(array)
                for name in self.names("node_scalar:")
                if (array := self._rows(f"node_scalar:{name}", np.array([index]))[0]) is not None
            },
            tensors=self._tensors("tensor:", index),
            node_tensors=self._tensors("node_tensor:", index),
            groups={
                name: value for name in self.names("group:") if (value := row[f"group:{name}"][0].as_py()) is not None
            },
        )

    def _rows(self, name: str, indices: Array) -> list[Array | None]:
        if not self.has(name):
            return [None] * len(indices)
        kind, shape = ARRAYS.get(name, (pa.float64(), (-1,)))
        metadata = self.table.schema.field(name).metadata or {}
        if SHAPE in metadata:
            shape = tuple(json.loads(metadata[SHAPE]))
        if name not in self._lists:
            self._lists[name] = _Lists(self.table[name].chunk(0), shape)
        rows = self._lists[name].rows(indices)
        wide = WIDE.get(kind)
        return [None if row is None else row.astype(wide) for row in rows] if wide else rows

    def _tensors(self, prefix: str, index: int) -> dict[str, Array]:
        found = {name: self._rows(prefix + name, np.array([index]))[0] for name in self.names(prefix)}
        return {name: np.array(array) for name, array in found.items() if array is not None}

    @cached_property
    def _columns(self) -> set[str]:
        return set(self.table.column_names)

    def _scalar_rows(self, indices: Array) -> tuple[list[str], list[list[float]]]:
        """Names of the scalar labels, and their values [indices, names], nan where missing."""
        names = list(self._scalars)
        if not names:
            return names, [[]] * len(indices)
        return names, np.stack([column[indices] for column in self._scalars.values()], axis=1).tolist()

    @cached_property
    def _scalars(self) -> dict[str, _Floats]:
        return {name: _Floats(self.table[f"scalar:{name}"].chunk(0)) for name in self.names("scalar:")}
