"""The process that reads what may not be trusted: a task as msgpack on stdin, its records as msgpack on stdout.

Run by moiety.data.guarded as a script under `python -I`. Before the first byte of a file is looked at, limits are set
and an audit hook refuses files, sockets, processes, imports and code for good. The C libraries open their one file
themselves; no file can be written, and no process started.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, ROOT)
from moiety.errors import InputError  # noqa: E402

TASKS = {  # name -> module, generator function, files it may open
    "pickles": ("moiety.data.unpickle_child", "objects", 0),
    "lmdb": ("moiety.data.containers.lmdb_pairs", "pairs", 1),
    "sqlite": ("moiety.data.containers.sqlite", "rows", 1),
    "hdf5": ("moiety.data.containers.hdf5", "structures", 1),
}
MEMORY = 2 << 30  # bytes of address space, beyond the file, which LMDB maps
CPU_SECONDS = 60
BUFFER = 1 << 18  # bytes
MAX_DEPTH = 100
RECORDS = 64  # that may take CPU_SECONDS together
SCALARS = (bool, int, float, str, bytes, type(None))
NUMBERS = "biufcSU"  # kinds of numpy.dtype that leave this process
REFUSED = (
    "open", "socket.", "subprocess.", "os.", "exec", "compile", "import", "ctypes.", "shutil.", "tempfile.", "mmap.",
    "fcntl.", "signal.", "sys.addaudithook", "sys._current", "pty.", "syslog.", "urllib.", "ftplib.", "http.", "glob.",
    "sqlite3.enable_load_extension", "sqlite3.load_extension",
)  # fmt: skip


class Refused(InputError):
    """Content that asks for more than to be read."""


def plain(value: Any, depth: int = 0) -> Any:
    """A value that msgpack can carry; None for what is no number, text, bytes, array, list or mapping of them."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, np.generic):
        value = np.asarray(value) if value.dtype.itemsize > 8 and value.dtype.kind in "fc" else value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "O":
            return plain(value.tolist(), depth + 1)
        if value.dtype.kind not in NUMBERS:
            raise Refused(f"an array of {value.dtype}")
        return {"__array__": [value.dtype.str, list(value.shape), value.tobytes()]}
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and depth < MAX_DEPTH:
        return {key: plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    return value if isinstance(value, SCALARS) else None


def harden(memory: int, files: int) -> None:
    """From here on: no Python files, no sockets, no processes, no imports, nothing written, bounded memory."""
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3 + files),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    sys.addaudithook(guard)


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED):
        raise Refused(f"it tries to {event} {str(arguments)[:80]}")


def allow_time() -> None:
    """Lets this process use CPU_SECONDS more; the kernel ends it after that."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, hard))


def size_of(path: str) -> int:
    """Bytes of a file, or of the files of a folder; 0 where there is neither."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path) if os.path.exists(path) else 0


def answer(output: Any, task: str, arguments: list[Any]) -> None:
    """Writes every record of a task."""
    module, function, files = TASKS[task]
    records = getattr(importlib.import_module(module), function)
    harden(MEMORY + (size_of(arguments[0]) if files else 0), files)
    allow_time()
    pack: Any = msgpack.Packer().pack
    for number, record in enumerate(records(*arguments)):
        if number % RECORDS == 0:
            allow_time()
        value = plain(record)
        try:
            output.write(pack(value))
        except (OverflowError, ValueError) as error:
            raise Refused(f"a value that no record can hold ({error})") from None


def ending(output: Any, task: str, arguments: list[Any]) -> dict[str, str]:
    """Answers, and says how that ended. Arguments begin with the file, or its name."""
    where = arguments[0]
    try:
        answer(output, task, arguments)
    except Refused as error:
        return {"refused": f"{where}: {error}; do not use this file"}
    except InputError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"{where}: needs more memory than it may have; copy the file again"}
    except Exception as error:  # a fault of ours: raised again in the process that asked
        return {"fault": f"{error!r}, {_place(error)}"}
    return {"done": ""}


def main() -> None:
    task, arguments = msgpack.unpackb(sys.stdin.buffer.read())
    pack: Any = msgpack.packb
    with os.fdopen(1, "wb", BUFFER, closefd=False) as output:
        output.write(pack(ending(output, task, arguments)))


def _place(error: BaseException) -> str:
    """File and line; `traceback` would open the source."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""


if __name__ == "__main__":
    main()
