"""Malicious archives: every one is refused by name, and nothing is written anywhere."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from moiety.data.archives import Limits, members, open_member, open_plain
from moiety.data.download import Source
from moiety.errors import InputError

SMALL = Limits(members=100, member_bytes=1 << 20, total_bytes=4 << 20)


def drain(path: Path, limits: Limits = SMALL) -> dict[str, bytes]:
    return {name: stream.read() for name, stream in members(path, ("*",), limits)}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, infos: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, content in infos:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_plain_members_come_back_byte_for_byte(tmp_path: Path):
    files = {"a/one.txt": b"1" * 1000, "a/two.bin": bytes(range(256))}
    assert drain(zipped(tmp_path / "a.zip", files)) == files
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar.bz2", "w:bz2")):
        path = tarred(tmp_path / f"a{suffix}", [(tarfile.TarInfo(n), c) for n, c in files.items()], mode)
        assert drain(path) == files
    with open_member(tmp_path / "a.tar.gz", "*.bin") as stream:
        assert stream.read() == files["a/two.bin"]


def test_a_zstandard_tar_is_read(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    path = tarred(tmp_path / "a.tar", [(tarfile.TarInfo("one"), b"1")])
    (tmp_path / "a.tar.zst").write_bytes(zstandard.compress(path.read_bytes()))
    assert drain(tmp_path / "a.tar.zst") == {"one": b"1"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "..\\evil"])
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match=r"a\.zip: unsafe member name"):
        drain(zipped(tmp_path / "a.zip", {name: b"x"}))
    with pytest.raises(InputError, match=r"a\.tar: unsafe member name"):
        drain(tarred(tmp_path / "a.tar", [(tarfile.TarInfo(name), b"x")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("data")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(InputError, match="member data is a link or a device"):
        drain(tarred(tmp_path / "a.tar", [(info, b"")]))


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    info = zipfile.ZipInfo("data")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="member data is a link"):
        drain(tmp_path / "a.zip")


def test_a_member_that_is_too_large_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"member big unpacks to more than 1,048,576 bytes"):
        drain(zipped(tmp_path / "a.zip", {"big": bytes(2 << 20)}))
    with pytest.raises(InputError, match=r"member big is of 2,097,152 bytes"):
        drain(tarred(tmp_path / "a.tar", [(tarfile.TarInfo("big"), bytes(2 << 20))]))


def test_members_that_are_too_large_together_are_refused(tmp_path: Path):
    many = {f"m{i}": bytes(900_000) for i in range(6)}
    with pytest.raises(InputError, match="unpacks to more than"):
        drain(zipped(tmp_path / "a.zip", many))
    with pytest.raises(InputError, match=r"a\.tar\.gz unpacks to more than 4,194,304"):
        drain(tarred(tmp_path / "a.tar.gz", [(tarfile.TarInfo(n), c) for n, c in many.items()], "w:gz"))


def test_bombs_are_stopped_by_their_ratio(tmp_path: Path):
    limits = Limits(ratio=200)
    bomb = bytes(200 << 20)
    with pytest.raises(InputError, match=r"member bomb grows more than 200 times"):
        drain(zipped(tmp_path / "a.zip", {"bomb": bomb}), limits)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(bomb, 9))
    (tmp_path / "a.json.bz2").write_bytes(bz2.compress(bomb))
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(bomb, preset=0))
    for suffix in ("gz", "bz2", "xz"):
        with (
            pytest.raises(InputError, match=rf"a\.json\.{suffix} grows more than 200 times"),
            open_plain(tmp_path / f"a.json.{suffix}", limits) as stream,
        ):
            while stream.read(1 << 20):
                pass


def test_a_bomb_before_the_wanted_member_is_stopped_too(tmp_path: Path):
    infos = [(tarfile.TarInfo("bomb"), bytes(200 << 20)), (tarfile.TarInfo("wanted"), b"x")]
    path = tarred(tmp_path / "a.tar.gz", infos, "w:gz")
    with pytest.raises(InputError, match="grows more than"), open_member(path, "wanted") as stream:
        stream.read()


def test_too_many_members_are_refused(tmp_path: Path):
    names = [f"m{i}" for i in range(101)]
    with pytest.raises(InputError, match="101 members, over 100"):
        drain(zipped(tmp_path / "a.zip", dict.fromkeys(names, b"")))
    with pytest.raises(InputError, match="more than 100 members"):
        drain(tarred(tmp_path / "a.tar", [(tarfile.TarInfo(name), b"") for name in names]))


def test_a_directory_of_a_million_members_is_refused_before_it_is_read(tmp_path: Path):
    entry = b"PK\x01\x02" + bytes(42)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 46 * 1_000_000, 0, 0)
    (tmp_path / "a.zip").write_bytes(entry * 1_000_000 + end)
    with pytest.raises(InputError, match="directory of 46,000,000 bytes"):
        drain(tmp_path / "a.zip")


def test_a_size_that_lies_is_found_out(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"data": b"0123456789" * 1000})
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 10)  # the directory says: 10 bytes
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip: member data cannot be unpacked"):
        drain(path)


def test_broken_archives_are_named(tmp_path: Path):
    path = tarred(tmp_path / "a.tar.gz", [(tarfile.TarInfo("data"), bytes(range(256)) * 4000)], "w:gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a\.tar\.gz"):
        drain(path)
    (tmp_path / "b.zip").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"b\.zip: no zip file"):
        drain(tmp_path / "b.zip")


def test_a_source_raises_the_limit_of_its_members(tmp_path: Path):
    path = tarred(tmp_path / "a.tar", [(tarfile.TarInfo("large"), bytes(2 << 20))])
    with pytest.raises(InputError, match=r"member large is of 2,097,152 bytes, over 1,048,576 \(member_limit\)"):
        drain(path)
    source = Source("url", "a", "1", "a.tar", member_limit=100 << 30)
    assert (source.limits.member_bytes, source.limits.total_bytes) == (100 << 30, 100 << 30)
    assert Source("url", "a", "1", "a.tar", member_limit=3 << 30).limits.total_bytes == Limits().total_bytes
    assert Source("url", "a", "1", "a.tar").limits == Limits()
    assert drain(path, replace(SMALL, member_bytes=2 << 20)) == {"large": bytes(2 << 20)}
    with pytest.raises(InputError, match="member_limit '3 GB' is no number of bytes"):
        Source("url", "a", "1", "a.tar", member_limit="3 GB")
