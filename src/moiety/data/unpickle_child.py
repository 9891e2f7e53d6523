"""The unpickler of what must be a pickle: it admits a list of names and replaces each with an inert stand-in.

Runs in the process of moiety.data.guarded alone, after its limits are set.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moiety.errors import InputError

STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip
NUMBERS = "biufcSU"  # kinds of numpy.dtype of a scalar


class Refused(Exception):
    """A pickle that asks for more than data."""


def objects(where: str, batch: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Key and plain attributes of every pickled object.

    Args:
        where: the file, for messages.
        batch: keys and pickles.

    Raises:
        InputError: an object that is refused, or that takes more memory than it may; nothing that it says was run.
    """
    np.dtype("<f4").newbyteorder("=")  # imports what it needs
    for key, content in batch:
        try:
            yield key, attributes(Unpickler(io.BytesIO(content)).load())
        except MemoryError:
            reason = "it takes more memory than it may"
        except Exception as error:  # whatever a pickle can raise is a reason to refuse it, said by name
            reason = f"{type(error).__name__}: {error}"[:300]
        else:
            continue
        raise InputError(f"{where}: object {key!r} is refused: {reason}; do not use this file")


class Inert:
    """Stands for an object of PyTorch Geometric: it keeps its attributes and does nothing."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({key: value for key, value in state.items() if isinstance(key, str)})


class Storage:
    """Stands for the memory of a tensor."""

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype, self.count, self.values = np.dtype(dtype), count, np.empty(0)


def rebuilt_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A tensor as an array, after a check that it lies inside its storage."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage.values)):
        raise Refused("a tensor that reaches out of its storage")
    if 0 in size:
        return np.empty(size, dtype=storage.dtype)
    bytes_per = storage.dtype.itemsize
    return as_strided(storage.values[offset:], size, tuple(step * bytes_per for step in stride)).copy()


def storage_from_bytes(content: bytes) -> Storage:
    """A storage as torch.save writes it into a pickle: five pickles, then the values."""
    file = io.BytesIO(content)
    for _ in range(3):  # magic number, version, description of the machine
        Unpickler(file).load()
    outer = Unpickler(file)
    storage = outer.load()
    keys = Unpickler(file).load()
    if not isinstance(storage, Storage) or len(keys) != 1 or list(outer.storages) != keys:
        raise Refused("not one storage where one is expected")
    (count,) = np.frombuffer(file.read(8), dtype="<i8")
    if count != storage.count:
        raise Refused("a storage of another size than it says")
    storage.values = np.frombuffer(file.read(int(count) * storage.dtype.itemsize), dtype=storage.dtype)
    if len(storage.values) != count:
        raise Refused("a storage that is cut short")
    return storage


def reconstructed(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """numpy's empty array, which its state fills."""
    if kind is not np.ndarray:
        raise Refused("an array of a strange class")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def scalar(dtype: np.dtype, content: bytes = b"") -> Any:
    if dtype.kind not in NUMBERS:
        raise Refused(f"a scalar of {dtype}")
    return np.frombuffer(content, dtype=dtype)[0].item()


def encoded(text: str, encoding: str = "latin1") -> bytes:
    return codecs.latin_1_encode(text)[0] if encoding in ("latin1", "latin-1") else _refuse(f"the encoding {encoding}")


def made(kind: type, base: type, state: Any) -> Inert:
    """copyreg's constructor of old protocols, for stand-ins alone."""
    return Inert() if kind is Inert else _refuse("an object of a strange class")


def ignored(*_: Any) -> None:
    """Stands for what only says how a tensor was kept: device, layout."""


def _refuse(what: str) -> NoReturn:
    raise Refused(what)


INERT = {
    "torch_geometric.data.data": ("Data", "DataEdgeAttr", "DataTensorAttr"),
    "torch_geometric.data.storage": ("GlobalStorage", "BaseStorage", "NodeStorage", "EdgeStorage"),
    "torch_geometric.data.feature_store": ("TensorAttr",),
    "torch_geometric.data.graph_store": ("EdgeAttr",),
}
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): encoded,
    ("copyreg", "_reconstructor"): made,
    ("builtins", "object"): object,
    ("torch", "Size"): tuple,
    ("torch", "device"): ignored,
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt_tensor,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstructed for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): scalar for core in ("core", "_core")},
    **{("torch", name): name for name in STORAGES},
    **{(module, name): Inert for module, names in INERT.items() for name in names},
}


class Unpickler(pickle.Unpickler):
    """Admits the names of ALLOWED, each as the stand-in it has there."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) not in ALLOWED:
            raise Refused(f"it names {module}.{name}, which is not on the list")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, name, key, _, count, *_ = pid
        if kind != "storage" or name not in STORAGES or not isinstance(count, int):
            raise Refused("a reference to something that is no storage")
        return self.storages.setdefault(key, Storage(STORAGES[name], count))


def attributes(found: Any) -> dict[str, Any]:
    """The plain attributes of an object of PyTorch Geometric, of version 1 (its own) or 2 (of its storage)."""
    if not isinstance(found, Inert):
        raise Refused(f"a {type(found).__name__}, not an object of PyTorch Geometric")
    store = vars(found).get("_store")
    fields = vars(store).get("_mapping") if isinstance(store, Inert) else vars(found)
    if not isinstance(fields, dict):
        raise Refused("an object without attributes")
    return {str(name): value for name, value in fields.items() if not str(name).startswith("_")}
