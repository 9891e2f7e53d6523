"""Pickles of PyTorch Geometric become plain arrays; anything else in a pickle is refused, and nothing of it runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

import moiety.data.unpickle as unpickle
from moiety.data import declared, guarded
from moiety.data.build import load_recipe
from moiety.data.containers import records
from moiety.data.download import Archive
from moiety.data.structure import Structure
from moiety.errors import InputError


def lmdb_of(path: Path, objects: list[bytes]) -> Path:
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for index, content in enumerate(objects):
            transaction.put(f"{index}".encode(), content)
        transaction.put(b"length", pickle.dumps(len(objects)))
    environment.close()
    return path


def slab(index: int) -> Data:
    rng = np.random.default_rng(index)
    return Data(
        pos=torch.tensor(rng.normal(size=(12, 3)), dtype=torch.float32),
        atomic_numbers=torch.tensor(rng.integers(1, 80, 12), dtype=torch.float32),
        cell=torch.eye(3)[None] * 10,
        tags=torch.zeros(12, dtype=torch.long),
        natoms=12,
        sid=1000 + index,
        y_relaxed=-1.5 * index,
    )


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def by_name(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls module.name with texts, whatever that is here."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(b"V" + a + b"\n" for a in arguments) + b"tR."


def test_slabs_come_back_as_they_were_pickled(tmp_path: Path):
    slabs = [slab(index) for index in range(20)]
    path = lmdb_of(tmp_path / "data.lmdb", [pickle.dumps(item, protocol=2 + i % 3) for i, item in enumerate(slabs)])
    found = dict(records(path, "pickled"))
    assert len(found) == 20
    for index, item in enumerate(slabs):
        got = found[str(index)]
        np.testing.assert_array_equal(got["pos"], item.pos.numpy())
        np.testing.assert_array_equal(got["atomic_numbers"], item.atomic_numbers.numpy())
        assert got["cell"].shape == (1, 3, 3) and got["tags"].dtype == np.int64
        assert got["sid"] == 1000 + index and got["y_relaxed"] == pytest.approx(-1.5 * index)


def test_the_recipe_of_oc20_keeps_adsorption_energies_apart_from_energies(tmp_path: Path):
    lmdb_of(tmp_path / "data.lmdb", [pickle.dumps(slab(index)) for index in range(20)])
    with tarfile.open(tmp_path / "is2re.tar.gz", "w:gz") as tar:
        for split in ("train", "val_id", "test_id"):
            tar.add(tmp_path / "data.lmdb", f"is2res/data/is2re/all/{split}/data.lmdb")
    recipe = load_recipe("oc20_is2re")
    path = tmp_path / "is2re.tar.gz"
    archives = {path.name: Archive(path, recipe.sources[0], "1", "")}
    found = [item for item in declared.structures(recipe, archives, {}, path.name) if isinstance(item, Structure)]
    assert [item.groups["split"] for item in found] == ["train"] * 20 + ["val"] * 20
    assert found[0].energy is None and found[0].cell.shape == (3, 3) and found[0].pbc.all()
    assert {item.scalars["y_relaxed"] for item in found} == {-1.5 * index for index in range(20)}


def test_arrays_and_views_come_back(tmp_path: Path):
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    item = Data(view=base.T[1:3], array=np.arange(6.0).reshape(2, 3), empty=torch.zeros(0, 3), scalar=np.float64(2.5))
    ((_, got),) = unpickle.convert([(b"0", pickle.dumps(item))], "x")
    np.testing.assert_array_equal(got["view"], base.T[1:3].numpy())
    np.testing.assert_array_equal(got["array"], np.arange(6.0).reshape(2, 3))
    assert got["empty"].shape == (0, 3) and got["scalar"] == 2.5


@pytest.mark.parametrize("name", ["system", "eval", "exec", "getattr", "nested", "inside-a-tensor", "popen"])
def test_pickles_that_run_something_are_refused_and_run_nothing(tmp_path: Path, name: str):
    canary = tmp_path / "canary"
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w')"
    content = {
        "system": lambda: pickle.dumps(Runs(os.system, touch)),
        "eval": lambda: pickle.dumps(Runs(eval, write)),
        "exec": lambda: pickle.dumps(Runs(exec, write)),
        "getattr": lambda: by_name("builtins", "getattr", b"a"),
        "nested": lambda: pickle.dumps(Data(pos=torch.zeros(1, 3), extra=[Runs(os.system, touch)])),
        "inside-a-tensor": lambda: pickle.dumps(Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(eval, write)))),
        "popen": lambda: pickle.dumps(Runs(subprocess.Popen, ["touch", str(canary)])),
    }[name]()
    path = lmdb_of(tmp_path / "data.lmdb", [pickle.dumps(slab(0)), content])
    with pytest.raises(InputError, match=r"data\.lmdb: object b'1' is refused"):
        list(records(path, "pickled"))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "fromfile"),
        ("numpy.core.multiarray", "fromfile"),
        ("torch", "load"),
        ("torch.storage", "_share_fd_cpu"),
        ("torch_geometric.data.data", "Data.from_dict"),
        ("torch_geometric.data.data", "copy"),
        ("collections", "namedtuple"),
        ("builtins", "__import__"),
        ("codecs", "open"),
    ],
)
def test_other_names_of_known_modules_are_refused(module: str, name: str):
    with pytest.raises(InputError, match="which is not on the list"):
        unpickle.convert([(b"0", by_name(module, name, b"/etc/passwd"))], "x")


def test_a_memory_bomb_is_refused():
    bomb = b"cnumpy\ndtype\n(VS4000000000\ntR."  # one scalar of 4 GB once it is made
    grows = b"]" + b"(" + b"U\xff" + bytes(255) + b"2" * 22 + b"tR."
    for content in (bomb, grows, b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little")):
        with pytest.raises(InputError, match=r"refused|limit"):
            unpickle.convert([(b"0", content)], "x")
    tensor = by_name("torch._utils", "_rebuild_tensor_v2", b"a", b"b", b"c", b"d")
    with pytest.raises(InputError, match="a tensor without a storage"):
        unpickle.convert([(b"0", tensor)], "x")


def test_an_endless_one_is_stopped(monkeypatch: pytest.MonkeyPatch):
    deep = b"(" * 30_000_000  # marks alone: tens of millions of steps
    monkeypatch.setattr(guarded, "SECONDS", 5)
    start = time.monotonic()
    with pytest.raises(InputError):
        unpickle.convert([(b"0", deep)], "x")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "open('/etc/hostname')",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import json.tool",
        "eval('1 + 1')",
    ],
)
def test_the_process_can_do_nothing_once_it_is_hardened(attempt: str):
    script = (
        "import importlib.util, sys, os, socket\n"
        f"spec = importlib.util.spec_from_file_location('child', {str(guarded.CHILD)!r})\n"
        "child = importlib.util.module_from_spec(spec); spec.loader.exec_module(child)\n"
        f"child.harden(child.MEMORY, 0)\n{attempt}\nos.write(1, b'done')\n"
    )
    result = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert "done" not in result.stdout
    assert "Refused: it tries to" in result.stderr


def test_memory_is_limited():
    script = (
        "import importlib.util, os\nimport numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('child', {str(guarded.CHILD)!r})\n"
        "child = importlib.util.module_from_spec(spec); spec.loader.exec_module(child)\n"
        "child.harden(child.MEMORY, 0)\nnp.ones(1 << 29)\n"
    )
    result = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert "MemoryError" in result.stderr
