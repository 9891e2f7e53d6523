"""HDF5 through h5py: a group a molecule, flat arrays with pointers, or fields on a mesh.

Options: `layout` is one of
- `conformers`: every group under `root` that holds the dataset `conformers` [K, N, 3] is a molecule; of `fields`, those
  named in `per_conformer` have a row a conformer, the others belong to all; every `every`-th conformer is read.
- `ragged`: `pointer` [S + 1] or `counts` [S], `per_atom` and `per_structure` names.
- `grid`: `fields` [B, T, X, Y] on the mesh of the `axes` [X], [Y]: every `every`-th time, every `stride`-th point. The
  record has `xyz`, the points in space, `zero`, a component that is not there, and `sample`, the number of the sample.

A file can name other files (external links, external storage, virtual data sets) and filters that are loaded as
plug-ins: all of these are refused. Soft links are aliases and passed over.
"""
# Shapes: K conformers, N nodes, S structures, B samples, T times, P points.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moiety.data import guarded
from moiety.data.containers.arrays import MAX_BYTES, plain, ragged
from moiety.errors import InputError

LAYOUTS = ("conformers", "ragged", "grid")
MAX_RATIO = 2_000  # declared over stored bytes: deflate reaches 1,030; chunks never written cost nothing
GRACE = 64 << 20  # declared bytes before the ratio counts
BUILT_IN_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # deflate, shuffle, checksum, szip, nbit, scale-offset; h5py's lzf
MAX_DEPTH = 8
DAMAGED = (KeyError, OSError, RuntimeError, TypeError, ValueError)  # what h5py raises for objects it cannot read


def records(path: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the structures of an HDF5 file."""
    yield from guarded.stream("hdf5", str(path), dict(options))


def structures(path: str, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The structures; run in a process of its own, because HDF5 believes what a file says about itself."""
    if options["layout"] not in LAYOUTS:
        raise InputError(f"{path}: layout {options['layout']!r}; use one of {', '.join(LAYOUTS)}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: no HDF5 file ({error}); copy it again") from None
    with file:
        try:
            root = file[options["root"]] if options.get("root") else file
            if options["layout"] == "conformers":
                yield from _molecules(path, root, options, "", 0)
            elif options["layout"] == "ragged":
                yield from ragged(_datasets(path, root), options, str(path))
            else:
                yield from _mesh(path, root, options)
        except InputError:
            raise
        except DAMAGED as error:
            raise InputError(f"{path}: cannot be read on ({error}); copy the file again") from error


def _molecules(
    path: str, group: Any, options: Mapping[str, Any], name: str, depth: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    if depth > MAX_DEPTH:
        raise InputError(f"{path}: groups within groups, deeper than {MAX_DEPTH}")
    if _hard_link(path, group, options["conformers"]):
        yield from _conformers(path, group, options, name)
    for key in group:
        if _hard_link(path, group, key) and group.get(key, getclass=True).__name__ == "Group":
            yield from _molecules(path, group[key], options, f"{name}/{key}".lstrip("/"), depth + 1)


def _conformers(path: str, group: Any, options: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    per_conformer = [options["conformers"], *options.get("per_conformer", ())]
    wanted = dict.fromkeys([*per_conformer, *options.get("fields", ())])
    found = {key: _dataset(path, group, key) for key in wanted if _hard_link(path, group, key)}
    shared = {key: plain(_read(path, data, ())) for key, data in found.items() if key not in per_conformer}
    for index in range(0, len(found[options["conformers"]]), options.get("every", 1)):
        record = dict(shared)
        for key in per_conformer:
            if key in found and index < len(found[key]):
                record[key] = plain(_read(path, found[key], index))
        yield f"{name}/{index}", record


def _mesh(path: str, root: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    stride = options.get("stride", 1)
    arrays = _datasets(path, root)
    for name in (*options["axes"], *options["fields"]):
        if name not in arrays:
            raise InputError(f"{path}: holds no data set {name}; it has {', '.join(sorted(arrays)[:12])}")
    axes = [np.asarray(_read(path, arrays[name], ()))[::stride] for name in options["axes"]]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    xyz = np.hstack([points, np.zeros((len(points), 3 - len(axes)))])  # a mesh of two axes lies in the plane z = 0
    first = arrays[options["fields"][0]]
    for sample in range(first.shape[0]):
        for time in range(0, first.shape[1], options.get("every", 1)):
            record: dict[str, Any] = {"points": points, "xyz": xyz, "zero": xyz[:, 2], "sample": sample}
            for name in options["fields"]:
                values = np.asarray(_read(path, arrays[name], (sample, time)))
                values = values[tuple(slice(None, None, stride) for _ in axes)]
                record[name] = values.reshape(len(points), *values.shape[len(axes) :])
            yield f"{sample}/{time}", record


def _datasets(path: str, group: Any) -> dict[str, Any]:
    """The data sets right in a group, and in the groups of it as GROUP/NAME."""
    found = {}
    for key in group:
        if not _hard_link(path, group, key):
            continue
        if group.get(key, getclass=True).__name__ == "Dataset":
            found[key] = _dataset(path, group, key)
        else:
            inner = group[key]
            for name in inner:
                if _hard_link(path, inner, name) and inner.get(name, getclass=True).__name__ == "Dataset":
                    found[f"{key}/{name}"] = _dataset(path, inner, name)
    return found


def _hard_link(path: str, group: Any, key: str) -> bool:
    link = group.get(key, getlink=True) if key in group or key in list(group.keys()) else None
    if isinstance(link, h5py.ExternalLink):
        raise InputError(f"{path}: {group.name}/{key} links to another file, {link.filename}; do not use this file")
    return isinstance(link, h5py.HardLink)


def _dataset(path: str, group: Any, key: str) -> Any:
    data = group[key]
    if not isinstance(data, h5py.Dataset):
        raise InputError(f"{path}: {group.name}/{key} is a {type(data).__name__}, not a data set; copy the file again")
    where = f"{path}: {data.name}"
    if data.external:
        raise InputError(f"{where} keeps its values in another file, {data.external[0][0]}; do not use this file")
    if data.is_virtual:
        raise InputError(f"{where} is put together from other files; do not use this file")
    properties = data.id.get_create_plist()
    filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
    if filters - BUILT_IN_FILTERS:
        raise InputError(f"{where} needs a filter plug-in (number {min(filters - BUILT_IN_FILTERS)}); none is loaded")
    declared, stored = math.prod(data.shape or ()) * data.dtype.itemsize, data.id.get_storage_size()
    if declared > GRACE + MAX_RATIO * stored:
        raise InputError(f"{where} declares {declared:,} bytes and stores {stored:,}; do not use this file")
    return data


def _read(path: str, data: Any, index: Any) -> Any:
    """A part of a data set; its declared size is believed only up to a limit."""
    depth = 1 if isinstance(index, int) else len(index)
    size = math.prod(data.shape[depth:]) * data.dtype.itemsize
    if size > MAX_BYTES:
        raise InputError(f"{path}: {data.name} declares {size:,} bytes at once, over {MAX_BYTES:,}")
    try:
        return data[index]
    except OSError as error:
        raise InputError(f"{path}: {data.name} cannot be read ({error}); copy the file again") from None
