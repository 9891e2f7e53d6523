"""LMDBs of pickled PyTorch Geometric objects (OC20 IS2RE, OC22), converted in a restricted process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moiety.data.unpickle import converted


def records(path: Path, _: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Streams the attributes of the objects; the key is that of the LMDB."""
    yield from converted(path)
