"""The text of a file that may be compressed, in another encoding, cut short, or no text at all."""

from __future__ import annotations

import gzip
import lzma
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moiety.data.validate import Rejected

MAX_BYTES = 2**31  # of a file once decompressed
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
T = TypeVar("T")


def read_text(path: Path) -> str:
    """The file as text with \\n line ends.

    Raises:
        Rejected: there is no such file, it is empty, cut short, too large, or binary.
    """
    data = _read_bytes(path)
    if not data.strip():
        raise Rejected("empty-file", "the file is empty")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif CONTROL.search(data):
        raise Rejected("binary-garbage", "the file holds control characters: it is not text")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # names of authors and units in old files; the numbers are ASCII
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise Rejected("no-file", "the file does not exist") from None
    except EOFError:
        raise Rejected("truncated", "the compressed file ends too early") from None
    except (gzip.BadGzipFile, lzma.LZMAError) as error:
        raise Rejected("binary-garbage", f"the file cannot be decompressed ({error})") from None
    except OSError as error:
        raise Rejected("unreadable", f"the file cannot be opened ({error.strerror or error})") from None
    if len(data) > MAX_BYTES:
        raise Rejected("unreadable", f"the file is larger than {MAX_BYTES // 2**20} MiB; split it")
    return data


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
