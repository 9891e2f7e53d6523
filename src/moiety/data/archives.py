"""Members of .zip, .whl, .tar(.gz, .bz2, .xz, .zst) and .deb files, and single compressed files, read in place.

An archive is data from strangers. Nothing is unpacked to disk; a member is refused by name when it is a link or a
device, when its name is absolute or climbs out, when there are too many of them, when one or all of them are too large,
or when they grow too much: counted on the bytes that really come out, whatever the headers say.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moiety.errors import InputError

STREAM_BLOCK = 1 << 20
GRACE = 64 << 20  # bytes that may come out before the ratio counts: small files of zeros are honest
DIRECTORY_ENTRY = 256  # bytes of a zip's directory that a member may take on average
END_OF_DIRECTORY = b"PK\x05\x06"
ZIP, DEB = (".zip", ".whl"), (".deb",)
TAR = (".tar", ".tgz", ".tbz2", ".txz")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BROKEN_FORMAT = (
    EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, NotImplementedError,
)  # fmt: skip
BROKEN = (OSError, *BROKEN_FORMAT)


@dataclass(frozen=True)
class Limits:
    """What an archive may hold. A recipe raises them by its source's `member_limit`."""

    members: int = 1_000_000
    member_bytes: int = 2 << 30  # of one member, unpacked
    total_bytes: int = 64 << 30  # of all that is unpacked
    ratio: float = 200.0  # unpacked over packed bytes; text of numbers reaches about 20


DEFAULT = Limits()


def is_archive(path: Path) -> bool:
    """Whether the name is that of a file of members, by its suffixes."""
    suffixes = path.suffixes[-2:]
    return path.suffix in ZIP + DEB + TAR or (
        len(suffixes) == 2 and suffixes[0] == ".tar" and path.suffix in COMPRESSED
    )


def members(
    path: Path, patterns: Sequence[str] = ("*",), limits: Limits = DEFAULT
) -> Generator[tuple[str, IO[bytes]], None, None]:
    """Yields (name, open stream) of every plain member whose name matches one of the patterns, in archive order.

    A stream is valid until the next one is asked for.

    Raises:
        InputError: an unsafe member, a limit that is passed, or a broken archive; archive and member are named.
    """
    with _named(path):
        if path.suffix in ZIP:
            yield from _zip_members(path, patterns, limits)
        elif path.suffix in DEB:
            yield from _deb_members(path, patterns, limits)
        else:
            with _decompressed(path, limits) as stream:
                yield from _tar_members(path, stream, patterns, limits)


@contextmanager
def open_member(path: Path, name: str, limits: Limits = DEFAULT) -> Iterator[IO[bytes]]:
    """Streams the first member called `name` (a name or a pattern)."""
    with closing(members(path, (name,), limits)) as found:
        for _, stream in found:
            yield stream
            return
    raise InputError(f"{path}: holds no member {name}; check that it is the file the recipe names")


@contextmanager
def open_plain(path: Path, limits: Limits = DEFAULT) -> Iterator[IO[bytes]]:
    """Streams a file that is no archive, decompressing .gz, .bz2, .xz and .zst under the limits."""
    with _named(path), _decompressed(path, limits) as stream:
        yield stream


class Guarded(io.RawIOBase):
    """A stream that counts what comes out of it, and stops when that is more than the limits allow."""

    def __init__(self, stream: Any, what: str, max_bytes: int, ratio: float, packed: Any = None) -> None:
        self.stream, self.what, self.max_bytes, self.ratio = stream, what, max_bytes, ratio
        self.packed = packed  # () -> compressed bytes read so far; None where there is no ratio to watch
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self.stream.read(min(len(buffer), STREAM_BLOCK))
        except BROKEN as error:
            raise InputError(f"{self.what} cannot be unpacked ({_reason(error)}); copy it again") from None
        self.count += len(block)
        if self.count > self.max_bytes:
            size = f"{self.max_bytes:,} bytes"
            raise InputError(f"{self.what} unpacks to more than {size}; raise the source's member_limit if it is right")
        if self.packed is not None and self.count > GRACE and self.count > self.ratio * max(self.packed(), 1):
            raise InputError(
                f"{self.what} grows more than {self.ratio:.0f} times when unpacked: not opened any further"
            )
        buffer[: len(block)] = block
        return len(block)


def _zip_members(path: Path, patterns: Sequence[str], limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    _refuse_long_directory(path, limits)
    total = 0
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > limits.members:
            raise InputError(f"{path}: {len(entries):,} members, over {limits.members:,}")
        for info in entries:
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir() or not _wanted(path, info.filename, patterns, kind in (0, stat.S_IFREG)):
                continue
            what = f"{path}: member {info.filename}"
            if info.flag_bits & 1:
                raise InputError(f"{what} is encrypted")
            allowed = min(limits.member_bytes, limits.total_bytes - total)
            try:
                opened = archive.open(info)
            except BROKEN as error:
                raise InputError(f"{what} cannot be unpacked ({_reason(error)}); copy it again") from None
            with opened as stream:
                guarded = Guarded(stream, what, allowed, limits.ratio, lambda info=info: info.compress_size)
                yield info.filename, io.BufferedReader(guarded, STREAM_BLOCK)
            total += guarded.count


def _refuse_long_directory(path: Path, limits: Limits) -> None:
    """Reads the size of a zip's directory from its end: zipfile would hold all of it before one can count."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - (1 << 16) - 22, 0))
        tail = file.read()
    end = tail.rfind(END_OF_DIRECTORY)
    if end < 0 or len(tail) < end + 22:
        raise InputError(f"{path}: no zip file, or cut short; copy it again")
    (directory,) = struct.unpack_from("<I", tail, end + 12)
    directory = size if directory == 0xFFFFFFFF else directory  # zip64: no more than there is
    if directory > limits.members * DIRECTORY_ENTRY:
        raise InputError(f"{path}: a directory of {directory:,} bytes, more than {limits.members:,} members need")


def _tar_members(path: Path, file: Any, patterns: Sequence[str], limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=file, mode="r|", bufsize=STREAM_BLOCK) as tar:
        for number, info in enumerate(tar):
            if number >= limits.members:
                raise InputError(f"{path}: more than {limits.members:,} members")
            vars(tar)["members"] = []  # tarfile remembers all of them: a corpus has millions
            name = info.name.removeprefix("./")
            if info.isdir() or not _wanted(path, name, patterns, info.isfile()):
                continue
            if info.size > limits.member_bytes:
                what = f"{path}: member {name}"
                raise InputError(f"{what} is of {info.size:,} bytes, over {limits.member_bytes:,} (member_limit)")
            stream = tar.extractfile(info)
            assert stream is not None  # isfile() holds
            with stream:
                guarded = Guarded(stream, f"{path}: member {name}", limits.member_bytes, limits.ratio)
                yield name, io.BufferedReader(guarded, STREAM_BLOCK)


def _deb_members(path: Path, patterns: Sequence[str], limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        size = path.stat().st_size
        try:
            guarded = Guarded(process.stdout, str(path), limits.total_bytes, limits.ratio, lambda: size)
            yield from _tar_members(path, io.BufferedReader(guarded, STREAM_BLOCK), patterns, limits)
        finally:
            process.kill()  # the rest of a package is not worth decompressing


def decompressed_member(stream: Any, name: str, limits: Limits = DEFAULT) -> IO[bytes]:
    """A member that is itself compressed (.gz, .bz2, .xz, .zst), decompressed under the limits; another as it is."""
    if not name.endswith(COMPRESSED):
        return stream
    packed: Guarded = stream.raw  # counts what the archive gave
    inside = _opened(stream, Path(name))
    return io.BufferedReader(
        Guarded(inside, f"member {name}", limits.member_bytes, limits.ratio, lambda: packed.count), STREAM_BLOCK
    )


@contextmanager
def _decompressed(path: Path, limits: Limits) -> Iterator[IO[bytes]]:
    with path.open("rb") as packed:
        stream = _opened(packed, path)
        tell = None if stream is packed else packed.tell
        yield io.BufferedReader(Guarded(stream, str(path), limits.total_bytes, limits.ratio, tell), STREAM_BLOCK)


def _opened(packed: Any, path: Path) -> Any:
    """The stream behind one that is compressed as the name says."""
    if path.suffix in (".gz", ".tgz"):
        return gzip.GzipFile(fileobj=packed)
    if path.suffix in (".bz2", ".tbz2"):
        return bz2.BZ2File(packed)
    if path.suffix in (".xz", ".txz"):
        return lzma.LZMAFile(packed)
    if path.suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
    return packed


def _wanted(path: Path, name: str, patterns: Sequence[str], plain: bool) -> bool:
    if not any(fnmatch(name, pattern) for pattern in patterns):
        return False
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise InputError(f"{path}: unsafe member name {name!r}; do not use this archive")
    if not plain:
        raise InputError(f"{path}: member {name} is a link or a device, no file; do not use this archive")
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Faults of the archive as InputError with its name."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except BROKEN_FORMAT as error:
        raise InputError(f"{path}: cannot be unpacked ({_reason(error)}); copy it again") from None


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
