"""Files that whoever reads them sees whole: the old content or the new, also after a power cut."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Sees the names in a folder safely on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one level: a.b.0 -> value."""
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {key: value for name, inner in items for key, value in flatten(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: node}


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> old and new value of what differs between two nested contents."""
    old, new = flatten(before), flatten(now)
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key, "absent"), new.get(key, "absent")) for key in keys if old.get(key) != new.get(key)}
