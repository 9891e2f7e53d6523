"""Structure files (SDF, extxyz, xyz, CIF, mmCIF, PDB) through moiety.data.readers. Option: `all_atom`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moiety.data.structure import Structure
from moiety.data.validate import Rejected


def records(path: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, Structure | Rejected]]:
    """Streams the structures of a file; the key is the number of the structure, from 0."""
    from moiety.data.readers import items

    for number, item in enumerate(items(path, options.get("all_atom", False))):
        yield str(number), item if isinstance(item, Rejected) else item.structure
