"""NumPy's npz, without pickles: `frames` of one molecule (rMD17), or `ragged` flat arrays with pointers.

Options: `layout`; for `frames`, `per_frame` names [S, ...] and `shared` names that belong to every frame; for `ragged`
as in HDF5. Arrays of objects are pickles and refused. A header's size is believed only up to a limit.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moiety.data import archives
from moiety.data.containers.arrays import MAX_BYTES, plain, ragged
from moiety.errors import InputError

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
    counts = {name: len(arrays[name]) for name in options["per_frame"]}
    if len(set(counts.values())) != 1:
        raise InputError(f"npz: arrays of different numbers of frames: {counts}")
    for frame in range(next(iter(counts.values()))):
        record = {name: plain(arrays[name][frame]) for name in options["per_frame"]}
        yield str(frame), record | {name: plain(arrays[name]) for name in options.get("shared", ())}


def _array(name: str, stream: IO[bytes]) -> np.ndarray:
    """One array, after a look at its header."""
    head = io.BytesIO(stream.read(1 << 16))
    try:
        version = np.lib.format.read_magic(head)
        if version not in HEADERS:
            raise InputError(f"npz: {name} is of the format {version}; 1.0 and 2.0 are read")
        shape, fortran, dtype = HEADERS[version](head)
    except ValueError as error:
        raise InputError(f"npz: {name} is no array ({error})") from None
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise InputError(f"npz: {name} holds Python objects, which are pickles; they are never loaded")
    if size > MAX_BYTES:
        raise InputError(f"npz: {name} declares {size:,} bytes, over {MAX_BYTES:,}")
    content = head.read() + stream.read(max(size - len(head.getvalue()) + (1 << 16), 0))
    if len(content) < size:
        raise InputError(f"npz: {name} declares {size:,} bytes and holds {len(content):,}; copy the file again")
    flat = np.frombuffer(content, dtype=dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")
