"""Being asked to stop: SIGTERM and SIGUSR1 (a scheduler's preemption) and Ctrl-C end a step, not the work.

A signal only sets a flag. The ranks learn of each other's flags in the sum that ends every step, write a checkpoint
together and exit: 75 (EX_TEMPFAIL) tells a scheduler to queue the job again.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Catches the signals while it is entered; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.exit_code = PREEMPTED  # also of ranks that were not signalled themselves
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (*PREEMPTIONS, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            self.exit_code = INTERRUPTED
        self.asked = True
        print(f"{signal.Signals(number).name}: this step, a checkpoint, then the end", file=sys.stderr, flush=True)
