"""`moiety selfcheck`: every promise tried out, one row each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from moiety.testing.reliability.faults import (
    asked_to_stop,
    damaged_shard,
    disk_full,
    flipped_bytes,
    hung,
    killed,
    not_finite,
    orphaned,
    stale_lock,
)
from moiety.testing.reliability.machines import two_nodes
from moiety.testing.reliability.sameness import (
    accumulation,
    activation_checkpointing,
    bfloat16,
    conservative_parity,
    exactly_once,
    parity,
    plain_ddp,
    prepared_ahead,
    resumed_twice,
    same_structures,
    world_walk,
)
from moiety.testing.reliability.workspace import Row, Workspace, timed

Check = Callable[[Workspace], Row]

QUICK: list[Check] = [  # under a minute on two cores
    partial(killed, kills=2),
    partial(flipped_bytes, each=4),
    partial(resumed_twice, steps=24),
    partial(parity, steps=10, stages=("0", "3")),
    damaged_shard,
    stale_lock,
    exactly_once,
]
FULL: list[Check] = [  # under a quarter of an hour
    partial(killed, kills=50),
    partial(disk_full, offsets=10),
    partial(flipped_bytes, each=20),
    asked_to_stop,
    not_finite,
    damaged_shard,
    hung,
    partial(orphaned, launcher="torchrun"),
    partial(orphaned, launcher="deepspeed"),
    stale_lock,
    partial(resumed_twice, steps=200),
    partial(world_walk, steps=100),
    partial(parity, steps=100),
    partial(conservative_parity, steps=100),
    partial(plain_ddp, steps=100),
    partial(accumulation, steps=100),
    partial(activation_checkpointing, steps=100),
    partial(bfloat16, steps=100),
    partial(same_structures, steps=100),
    partial(prepared_ahead, steps=40),
    exactly_once,
    partial(two_nodes, steps=20),
]


def selfcheck(full: bool) -> Iterator[Row]:
    """The rows as they come; a check that breaks is a row that does not hold."""
    with tempfile.TemporaryDirectory(prefix="moiety-selfcheck-") as folder:
        space = Workspace(Path(folder))
        for check in FULL if full else QUICK:
            try:
                yield timed(lambda check=check: check(space))
            except (AssertionError, OSError, RuntimeError) as error:
                name = check.func.__name__ if isinstance(check, partial) else check.__name__
                yield Row(name.replace("_", " "), f"{type(error).__name__}: {str(error)[-400:]}", False)


def print_rows(rows: Iterator[Row], console: Console) -> list[Row]:
    """Shows every row when it is there, and which do not hold at the end."""
    found = []
    for row in rows:
        verdict = "[green]holds[/green]" if row.ok else "[red]FAILS[/red]"
        console.print(f"{verdict}  {row.promise}: {escape(row.figure)}  [dim]{row.seconds:.0f} s[/dim]", soft_wrap=True)
        found.append(row)
    return found


def campaign(description: str, check: Callable[..., Row], count: str, default: int) -> NoReturn:
    """A script that tries one promise harder: `--count` is how often, or for how many steps; exit 1 if it fails.

    Args:
        description: the script's docstring.
        check: the promise.
        count: its argument that says how hard.
        default: of that argument.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moiety-campaign-") as folder:
        space = Workspace(Path(folder))
        rows = print_rows(iter([timed(lambda: check(space, **{count: args.count}))]), Console(highlight=False))
    sys.exit(0 if rows[0].ok else 1)
