"""Runs that hang: who is behind, where it is, and an end to all processes instead of a bill for silence.

When one rank is stuck, the others wait for it inside a collective, without a word and without end. Every rank watches
its own steps from a thread. When they stop, each writes down how far it came and where it is; the first then names the
rank that is behind, or that does not even answer, and all of them exit.

The thread also looks whether the launcher still lives: a training process that lost it is asked to stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from moiety.training.files import write_json

HUNG = 70  # exit code, EX_SOFTWARE
INTERVAL = 1.0  # s between two looks
ANSWER = 5.0  # s that the other ranks have to say where they are


class Watchdog:
    """Watches the steps of this rank while it is entered; `beat` says that something went on."""

    def __init__(self, run_path: Path, rank: int, world_size: int, timeout: float) -> None:
        """`timeout`: s without a beat after which a run counts as hung."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.processes = run_path / "processes"
        self._phase = "start"
        self._beats = 0
        self._last = time.monotonic()
        self._main = threading.get_ident()
        self._launchers = launchers()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.processes.mkdir(exist_ok=True)
        own = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname()}
        write_json(self._path(self.rank), own)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._path(self.rank).unlink(missing_ok=True)

    def beat(self, phase: str) -> None:
        """This rank enters a phase of a step. All ranks enter the same phases in the same order."""
        self._phase = phase
        self._beats += 1
        self._last = time.monotonic()

    def _path(self, rank: int) -> Path:
        return self.processes / f"rank_{rank:05d}.json"

    def _watch(self) -> None:
        while not self._done.wait(min(INTERVAL, self.timeout / 4)):
            if not all(alive(process) for process in self._launchers):
                self._launchers = []
                print(f"rank {self.rank}: the launcher is gone", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() - self._last > self.timeout:
                self._end_hung_run()

    def _end_hung_run(self) -> None:
        """Says where this rank is, and on the lowest rank that still can who is behind; does not return."""
        stack = traceback.format_stack(sys._current_frames()[self._main])
        own = json.loads(self._path(self.rank).read_text())
        write_json(self._path(self.rank), own | {"beats": self._beats, "phase": self._phase, "stack": stack})
        time.sleep(ANSWER)
        reports = [self._report(rank) for rank in range(self.world_size)]
        answers = [report for report in reports if "beats" in report]
        if self.rank == answers[0]["rank"]:
            print(diagnosis(reports, self.timeout), file=sys.stderr, flush=True)
            time.sleep(INTERVAL)  # the launcher kills the others as soon as one is gone
        os._exit(HUNG)

    def _report(self, rank: int) -> dict[str, Any]:
        """What a rank has written down; next to nothing where its files are elsewhere."""
        try:
            return json.loads(self._path(rank).read_text())
        except OSError:
            return {"rank": rank, "pid": "unknown", "host": "another machine"}


def diagnosis(reports: list[dict[str, Any]], timeout: float) -> str:
    """Which ranks a hung run waits for, and where those are.

    Args:
        reports: of each rank; one without `beats` did not answer.
        timeout: s that passed without a beat.
    """
    answers = [report for report in reports if "beats" in report]
    silent = [report for report in reports if "beats" not in report]
    lines = [f"hung: no rank went on for {timeout:.0f} s"]
    lines += [f"rank {r['rank']} does not answer: {_condition(r)}" for r in silent]
    least, most = min(r["beats"] for r in answers), max(r["beats"] for r in answers)
    behind = [report for report in answers if report["beats"] == least]
    for report in [] if silent else behind:  # all ranks wait for a silent one
        place = f"process {report['pid']} on {report['host']}, {most - least} phases behind, in {report['phase']!r}"
        lines.append(f"rank {report['rank']} is stuck: {place}:\n{''.join(report['stack']).rstrip()}")
    return "\n".join(lines)


def _condition(report: dict[str, Any]) -> str:
    where = f"process {report['pid']} on {report['host']}"
    if report["host"] != socket.gethostname():
        return where
    try:
        return f"{where} is {psutil.Process(report['pid']).status()}"
    except psutil.NoSuchProcess:
        return f"{where} is gone"


def alive(process: psutil.Process) -> bool:
    """Whether a process is more than the exit code that nobody has asked for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launchers() -> list[psutil.Process]:
    """The processes whose end should end this one: a launcher's per-node process, and what started that.

    Nothing for a script that a person started: it may outlive the shell.
    """
    if "LOCAL_RANK" not in os.environ or ("LOCAL_WORLD_SIZE" not in os.environ and "LOCAL_SIZE" not in os.environ):
        return []
    parent = psutil.Process().parent()
    if parent is None:
        return []
    of_deepspeed = any(
        part.endswith(("deepspeed/launcher/launch.py", "deepspeed.launcher.launch")) for part in parent.cmdline()
    )
    front = parent.parent() if of_deepspeed else None
    return [parent, front] if front is not None else [parent]
