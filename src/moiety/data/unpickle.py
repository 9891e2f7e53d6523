"""Corpora that were published as pickles, converted in a process that can do nothing else.

A pickle is a program. Here it is run by an unpickler that knows a dozen names (arrays, tensors, PyTorch Geometric's
containers) and replaces each with an inert stand-in, in a process of its own: without network, without files, with
limits on memory and time (`unpickle_child.py`). Plain arrays come back as msgpack; this process never unpickles.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data.containers.aselmdb import pairs
from moiety.errors import InputError

BATCH = 500  # objects a process converts
MAX_OBJECT = 64 << 20  # bytes of one pickle
SECONDS = 120  # of wall time for a batch
CHILD = Path(__file__).with_name("unpickle_child.py")


def converted(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the attributes of the objects of an LMDB: arrays, numbers and texts by name.

    Raises:
        InputError: a pickle names something that is not on the list, takes too much memory or time, or is no pickle;
            nothing that it says was run.
    """
    objects = ((key, value) for key, value in pairs(path) if key != b"length")
    while batch := list(islice(objects, BATCH)):
        yield from convert(batch, str(path))


def convert(batch: list[tuple[bytes, bytes]], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The attributes of a batch of pickled objects, by key, from one restricted process."""
    import msgpack

    for key, value in batch:
        if len(value) > MAX_OBJECT:
            raise InputError(f"{where}: object {key!r} is of {len(value):,} bytes, over {MAX_OBJECT:,}")
    command = [*_without_network(), sys.executable, "-I", str(CHILD)]
    try:
        result = subprocess.run(command, input=msgpack.packb(batch), capture_output=True, timeout=SECONDS, env={})
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: a pickle took more than {SECONDS} s; do not use this file") from None
    if result.returncode != 0:
        raise InputError(f"{where}: {_explained(result)}; do not use this file")
    found = msgpack.unpackb(result.stdout, object_hook=_array)
    if refused := found.get("refused"):
        raise InputError(f"{where}: object {refused[0]} is refused: {refused[1]}; do not use this file")
    return [(key.decode("ascii", "replace"), fields) for key, fields in found["objects"]]


@functools.cache
def _without_network() -> tuple[str, ...]:
    """The command that starts a process without a network, where the system lets us; the child refuses sockets too."""
    command = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return ()
    return (shutil.which("unshare") or "", *command[1:])


def _explained(result: subprocess.CompletedProcess[bytes]) -> str:
    last = (result.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
    if result.returncode < 0:
        return f"a pickle was stopped by its limit of memory or time (signal {-result.returncode})"
    return f"a pickle could not be converted ({last[:200]})"


def _array(item: dict[str, Any]) -> Any:
    if "__array__" not in item:
        return item
    dtype, shape, content = item["__array__"]
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape)
