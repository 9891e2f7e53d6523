"""Progress that is also seen in a file: a bar on a terminal, a line each time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import track


def tracked(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """The items; how many of them are done, and the time that is left."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, what, total, console=console)
        return
    started = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        left = (time.perf_counter() - started) / done * (total - done)
        print(f"{what} {done}/{total}  {left:.0f} s left", file=sys.stderr, flush=True)
