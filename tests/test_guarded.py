"""What ends, hangs or fills a process that reads a file does so to a child: here it is an error with a name."""

from __future__ import annotations

import itertools
import os
import struct
import time
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest

from moiety.data import guarded
from moiety.data.containers import records
from moiety.errors import InputError

CONFORMERS = {"layout": "conformers", "conformers": "r", "fields": ["z"]}
LAST_PAGE = 16 + 24 + 2 * 48  # bytes into a meta page of LMDB: behind its header, four numbers and two roots


def lmdb_of(path: Path, pairs: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment, environment.begin(write=True) as put:
        for key, value in pairs.items():
            put.put(key, value)
    return path


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_page_that_ends_the_process_is_an_error_that_names_file_and_signal(tmp_path: Path):
    path = lmdb_of(tmp_path / "a.aselmdb", {b"the-key": bytes(10_000)})
    content = bytearray(path.read_bytes())
    struct.pack_into("<HH", content, content.index(b"the-key") - 8, 0, 0x50)  # the value says it has 5 MiB
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.aselmdb: its reader was ended by SIG(BUS|SEGV)"):
        list(records(path, "aselmdb"))


def test_pages_in_a_circle_are_not_read_for_ever(tmp_path: Path):
    path = lmdb_of(tmp_path / "a.lmdb", {f"{key:04d}".encode(): bytes(500) for key in range(100)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0050", b"0001"))
    with pytest.raises(InputError, match="keys out of order"):
        list(guarded.stream("lmdb", str(path)))


def test_large_values_and_types_come_back_as_they_were(tmp_path: Path):
    values = {b"%d" % key: np.random.default_rng(key).bytes(3 << 20) for key in range(4)}
    assert {key: value for key, value in guarded.stream("lmdb", str(lmdb_of(tmp_path / "a", values)))} == values
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("m")
        group["r"], group["z"] = np.arange(6, dtype=">f4").reshape(2, 1, 3), np.array(["a", "bc"], dtype=object)
        group["charge"], group["name"], group["flag"] = np.int64(-1), "water", np.True_
    options = CONFORMERS | {"fields": ["z", "charge", "name", "flag", "absent"]}
    (_, first), (_, second) = records(tmp_path / "a.h5", "hdf5", options)
    np.testing.assert_array_equal(second["r"], [[3, 4, 5]])
    assert first["r"].dtype == ">f4"
    del first["r"]
    assert first == {"z": ["a", "bc"], "charge": -1, "name": "water", "flag": True}


def test_an_lmdb_may_be_larger_than_the_memory_of_its_reader_and_a_folder(tmp_path: Path):
    with (
        lmdb.open(str(tmp_path / "folder"), map_size=4 << 30) as environment,
        environment.begin(write=True) as put,
    ):
        put.put(b"key", b"value")
    data = tmp_path / "folder" / "data.mdb"
    content = bytearray(data.read_bytes())
    for page in (0, 4096):
        struct.pack_into("<Q", content, page + LAST_PAGE, (3 << 30) // 4096)
    data.write_bytes(content)
    os.truncate(data, (3 << 30) + 4096)  # a hole: nothing is stored
    assert list(guarded.stream("lmdb", str(tmp_path / "folder"))) == [[b"key", b"value"]]


def test_a_reader_that_is_left_early_ends_its_process(tmp_path: Path):
    before = children()
    found = guarded.stream("lmdb", str(lmdb_of(tmp_path / "a", {b"%d" % key: bytes(1 << 20) for key in range(9)})))
    assert len(list(itertools.islice(found, 2))) == 2
    assert len(children()) == len(before) + 1
    found.close()
    assert children() == before


def test_a_reader_that_says_nothing_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = children()
    (tmp_path / "silent.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(guarded, "CHILD", tmp_path / "silent.py")
    monkeypatch.setattr(guarded, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"a\.lmdb: took more than 0\.5 s"):
        list(guarded.stream("lmdb", "a.lmdb"))
    assert time.monotonic() - start < 30
    assert children() == before


def test_a_fault_of_ours_is_no_fault_of_the_file(tmp_path: Path):
    with pytest.raises(RuntimeError, match="missing 2 required positional arguments"):
        list(guarded.stream("sqlite", str(tmp_path / "a.db"), "table"))


def test_hdf5_that_declares_what_it_does_not_store_is_refused(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("r", (1 << 40, 1, 3), "f8", chunks=(1 << 16, 1, 3))
    with pytest.raises(InputError, match=r"declares 26,388,279,066,624 bytes and stores 0"):
        list(records(tmp_path / "a.h5", "hdf5", CONFORMERS))
