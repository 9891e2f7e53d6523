"""The text of a file that may be compressed, in another encoding, cut short, no text at all, or a trap."""

from __future__ import annotations

import lzma
import re
import stat
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moiety.data.validate import Rejected

MAX_BYTES = 2**31  # of a file once decompressed
MAX_RATIO = 100  # decompressed to compressed; coordinates reach 10
FREE_BYTES = 2**24  # a file this small may have any ratio
XZ_MEMORY = 2**27  # bytes that xz may ask for: its header can claim a dictionary of 4 GiB (xz -9 takes 65 MiB)
CHUNK = 2**20
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip", b"(\xb5/\xfd": "zstd"}
T = TypeVar("T")


def read_text(path: Path) -> str:
    """The file as text with \\n line ends.

    Raises:
        Rejected: there is no such file, it is no regular file, empty, cut short, too large, or binary.
    """
    data = _read_bytes(path)
    if not data.strip():
        raise Rejected("empty-file", "the file is empty")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif CONTROL.search(data):
        packed = next((name for magic, name in COMPRESSED.items() if data.startswith(magic)), None)
        reason = f"what should be text is compressed by {packed}" if packed else "it holds control characters"
        raise Rejected("binary-garbage", f"the file is not text: {reason}")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # names of authors and units in old files; the numbers are ASCII
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait, reading a device would not end
            raise Rejected("not-a-file", "the path is a folder, pipe, socket or device")
        data = path.read_bytes() if status.st_size <= MAX_BYTES else b""
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("no-file", "the file does not exist") from None
    except OSError as error:
        raise Rejected("unreadable", f"the file cannot be opened ({error.strerror or error})") from None
    except ValueError as error:  # a null byte in the name
        raise Rejected("no-file", f"no file can have this name ({error})") from None
    if status.st_size > MAX_BYTES:
        raise Rejected("too-large", f"the file is larger than {MAX_BYTES // 2**20} MiB")
    suffix = path.suffix.lower()
    return _decompressed(data, suffix) if suffix in (".gz", ".xz") else data


def _decompressed(data: bytes, suffix: str) -> bytes:
    """All members of a gzip or xz file, bounded in size, ratio and memory."""
    limit = max(FREE_BYTES, min(MAX_BYTES, MAX_RATIO * len(data)))
    found, size = [], 0
    try:
        while data.strip(b"\x00"):  # padding between and after members
            member: Any = zlib.decompressobj(wbits=31) if suffix == ".gz" else lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            while not member.eof:
                piece = member.decompress(data, CHUNK)
                data = member.unconsumed_tail if suffix == ".gz" else b""
                size += len(piece)
                found.append(piece)
                if size > limit:
                    raise Rejected("too-large", f"{size // 2**20} MiB came out of it, and more would follow")
                if not piece and not data and (suffix == ".gz" or member.needs_input):
                    raise Rejected("truncated", "the compressed file ends too early")
            data = member.unused_data
    except (zlib.error, lzma.LZMAError) as error:
        if "memory" in str(error).lower():
            raise Rejected("too-large", f"it asks for more than {XZ_MEMORY // 2**20} MiB of memory") from None
        raise Rejected("binary-garbage", f"the file cannot be decompressed ({error})") from None
    return b"".join(found)


def count_of(number: int, noun: str) -> str:
    """A number with its noun: 1 atom, 2 atoms."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quietly(parse: Callable[[], T]) -> T:
    """The result of a foreign parser. What it raises becomes a Rejected with its first line; warnings are dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return parse()
        except Rejected:
            raise
        except Exception as error:  # the parsers raise whatever their inside meets
            lines = str(error).strip().splitlines()
            detail = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
            raise Rejected("unreadable", f"the parser stopped ({detail})") from error
