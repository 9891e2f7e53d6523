"""Files that are read in a process of their own, which can do nothing else (`guarded_child.py`).

Pickles are programs. LMDB, HDF5 and SQLite are libraries of C that believe what a file says about itself: a damaged
file can end the process that reads it. There it ends the child, and here it is an InputError that names the file.
Records come back over a pipe as msgpack: plain numbers, texts, bytes and arrays. Nothing is unpickled on this side.
"""

from __future__ import annotations

import functools
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moiety.errors import InputError

SECONDS = 120  # of wall time without a word from the child
BLOCK = 1 << 18  # bytes read at a time
MAX_RECORD = (1 << 32) - 1  # bytes of one record; the child's memory is less
CHILD = Path(__file__).with_name("guarded_child.py")


def stream(task: str, where: str, *arguments: Any) -> Iterator[Any]:
    """What a task of `guarded_child.TASKS` yields for the arguments; arrays are read-only.

    Args:
        task: its name.
        where: the file, or its name: the first argument.
        arguments: the others, such as msgpack can carry.

    Raises:
        InputError: the task refused the file, or it crashed, hung, or asked for more memory or time than it may.
    """
    import msgpack

    command = [*_without_network(), sys.executable, "-I", str(CHILD)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env={}) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(msgpack.packb([task, [where, *arguments]]))
            child.stdin.close()
            unpacker = msgpack.Unpacker(object_hook=_array, strict_map_key=False, max_buffer_size=MAX_RECORD)
            while block := _block(child.stdout.fileno(), where):
                unpacker.feed(block)
                for message in unpacker:
                    if isinstance(message, dict):
                        return _ended(message, where)
                    yield message
        finally:
            child.kill()
    raise InputError(f"{where}: {_died(child.returncode)}: damaged, or made to do harm; copy the file again")


def _block(pipe: int, where: str) -> bytes:
    if not select.select([pipe], [], [], SECONDS)[0]:
        raise InputError(f"{where}: took more than {SECONDS} s to read on; do not use this file")
    return os.read(pipe, BLOCK)


def _ended(message: dict[str, str], where: str) -> None:
    """How the child says it ended: `done`, `refused` the file, or met a `fault` of our own."""
    if "refused" in message:
        raise InputError(message["refused"])
    if "fault" in message:
        raise RuntimeError(f"{where}: {message['fault']}")


def _died(code: int) -> str:
    """Why a child stopped in the middle."""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit {code}"
    return "its reader passed its limit of time (SIGXCPU)" if name == "SIGXCPU" else f"its reader was ended by {name}"


@functools.cache
def _without_network() -> tuple[str, ...]:
    """The command that starts a process without a network, where the system lets us; the child refuses sockets too."""
    command = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        return ()
    return (shutil.which("unshare") or "", *command[1:])


def _array(item: dict[str, Any]) -> Any:
    if "__array__" not in item:
        return item
    dtype, shape, content = item["__array__"]
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape)
