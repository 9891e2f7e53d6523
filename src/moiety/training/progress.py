"""What a person sees while a run goes on: a bar with the time left on a terminal, one line a record elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows log records on stderr."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False)
        self._bar: RichProgress | None = None

    def show(self, record: dict[str, Any], total_steps: int) -> None:
        if not self._enabled:
            return
        text = summary(record)
        if not self._console.is_terminal:
            left = record["elapsed_s"] / record["step"] * (total_steps - record["step"])
            print(f"step {record['step']}/{total_steps}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.description}"), console=self._console)
            self._bar.start()
            self._bar.add_task("", total=total_steps, completed=record["step"])
        self._bar.update(self._bar.task_ids[0], completed=record["step"], description=text)

    def note(self, text: str) -> None:
        if self._enabled:
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def summary(record: dict[str, Any]) -> str:
    """One line: loss, then each domain's losses, then the speed."""
    domains = "  ".join(
        f"{domain} " + " ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in losses.items())
        for domain, losses in record["losses"].items()
    )
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    return f"loss {record['loss']:.4f}  {domains}  {record['structures_per_s']:.0f} structures/s{skipped}"
