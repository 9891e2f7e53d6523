"""NumPy's npz, without pickles: `frames` of one molecule (rMD17), or `ragged` flat arrays with pointers.

Options: `layout`; for `frames`, `per_frame` names [S, ...] and `shared` names that belong to every frame; for `ragged`
as in HDF5. Arrays of objects are pickles and refused. A header's size is believed only up to a limit.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from moiety.data import archives
from moiety.data.containers.arrays import MAX_BYTES, plain, ragged
from moiety.errors import InputError

LENGTHS = {(1, 0): "<H", (2, 0): "<I"}  # format -> how the length of a header is written
NUMBERS = "biufcSU"  # kinds of numpy.dtype
HEADER = re.compile(  # NumPy's own parser evaluates it as Python's literals
    rb"\{'descr': '([^'\\]{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,20}L?, ?){0,32}(?:[0-9]{1,20}L?)?)\), \}\s*"
)


def records(stream: IO[bytes], options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the structures of an npz."""
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        path = Path(folder) / "arrays.zip"
        with path.open("wb") as file:
            shutil.copyfileobj(stream, file, archives.STREAM_BLOCK)
        arrays = {
            name.removesuffix(".npy"): _array(name, member) for name, member in archives.members(path, ("*.npy",))
        }
    if options["layout"] == "ragged":
        yield from ragged(arrays, options, "npz")
        return
    if options["layout"] != "frames":
        raise InputError(f"npz: layout {options['layout']!r}; use frames or ragged")
    names = [*options.get("per_frame", ()), *options.get("shared", ())]
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"npz: holds no array {missing[0]}; it has {', '.join(sorted(arrays))}")
    if flat := [name for name in options["per_frame"] if arrays[name].ndim == 0]:
        raise InputError(f"npz: {flat[0]} is one number, not one a frame; copy the file again")
    counts = {name: len(arrays[name]) for name in options["per_frame"]}
    if len(set(counts.values())) != 1:
        raise InputError(f"npz: arrays of different numbers of frames: {counts}")
    for frame in range(next(iter(counts.values()))):
        record = {name: plain(arrays[name][frame]) for name in options["per_frame"]}
        yield str(frame), record | {name: plain(arrays[name]) for name in options.get("shared", ())}


def _array(name: str, stream: IO[bytes]) -> np.ndarray:
    """One array, after a look at its header."""
    head = io.BytesIO(stream.read(1 << 16))
    dtype, order, shape = _header(name, head)
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_BYTES:
        raise InputError(f"npz: {name} declares {size:,} bytes, over {MAX_BYTES:,}")
    content = head.read() + stream.read(max(size - len(head.getvalue()) + (1 << 16), 0))
    if len(content) < size:
        raise InputError(f"npz: {name} declares {size:,} bytes and holds {len(content):,}; copy the file again")
    return np.frombuffer(content, dtype=dtype, count=math.prod(shape)).reshape(shape, order=order)


def _header(name: str, head: IO[bytes]) -> tuple[np.dtype, Literal["C", "F"], tuple[int, ...]]:
    """What a header declares: type, order and shape."""
    try:
        version = np.lib.format.read_magic(head)
        form = LENGTHS.get(version, "")
        header = HEADER.fullmatch(head.read(*struct.unpack(form, head.read(struct.calcsize(form)))))
        dtype = np.dtype(header[1].decode("latin-1")) if header else None
    except (ValueError, TypeError, SyntaxError, struct.error) as error:
        raise InputError(f"npz: {name} is no array ({error}); copy the file again") from None
    if header is None or dtype is None:
        raise InputError(f"npz: {name} is no plain array of the formats 1.0 or 2.0; copy the file again")
    if dtype.hasobject:
        raise InputError(f"npz: {name} holds Python objects, which are pickles; they are never loaded")
    if dtype.kind not in NUMBERS or not dtype.itemsize:
        raise InputError(f"npz: {name} is an array of {dtype}; numbers and texts are read")
    shape = tuple(int(number) for number in header[3].replace(b"L", b"").split(b",") if number.strip())
    return dtype, "F" if header[2] == b"True" else "C", shape
