"""The side that asks: one worker process a model, each in its own environment, and steps taken in turns."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from peers.models import MOIETY_SHAPES, PEERS
from peers.worker import Request

from moiety.errors import InputError

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
LONG = 5.0  # s: longer steps are timed once
SAME_FOR_ALL = {  # without the allocator's, every tensor over 128 KiB is page-faulted anew, which changes the ranking
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
Cost = dict[str, Any]  # what a worker answers: seconds, peak, rise, nodes, edges; or error


class Asked(Protocol):
    """What is asked for costs."""

    def ask(self, request: Request) -> Cost: ...


class Worker:
    """A model in another process."""

    def __init__(self, name: str, num_parameters: int, device: str = "cpu"):
        python = sys.executable if name in MOIETY_SHAPES else str(PEERS_PYTHON)
        environment = os.environ | SAME_FOR_ALL | {"PYTHONPATH": str(ROOT / "benchmarks")}
        self.introduction: dict[str, Any] | None = None
        self.process = None
        if not Path(python).exists():
            self.introduction = {"error": f"{PEERS_PYTHON.parents[1].name} is missing: `make bench` builds it"}
            return
        self.process = subprocess.Popen(
            [python, "-m", "peers.worker", name, str(num_parameters), device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def introduce(self) -> dict[str, Any]:
        """Waits until the model is built: its parameters and the versions around it, or an error."""
        if self.introduction is None:
            self.introduction = self._answer()
        return self.introduction

    def ask(self, request: Request) -> Cost:
        if "error" in self.introduce():
            return self.introduce()
        assert self.process and self.process.stdin
        with suppress(BrokenPipeError):  # the answer says why
            print(json.dumps(asdict(request)), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        if self.process and self.process.stdin:
            with suppress(BrokenPipeError):  # it ended before, and its last answer said so
                self.process.stdin.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process and self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with exit code {self.process.wait()}"}


class Crew(dict[str, Worker]):
    """Workers by the name of their model; those that cannot work are named in `broken`."""

    def __init__(self, names: Iterable[str], num_parameters: int, device: str = "cpu"):
        super().__init__({name: Worker(name, num_parameters, device) for name in names})  # they build side by side
        self.introductions = {name: worker.introduce() for name, worker in self.items()}
        self.broken = {name: words["error"] for name, words in self.introductions.items() if "error" in words}
        for name in self.broken:
            self.pop(name).close()

    @property
    def lost(self) -> dict[str, Cost]:
        """What stands in a table in place of the costs of broken models."""
        return {name: {"error": why} for name, why in self.broken.items()}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.values():
            worker.close()


def in_turns(crew: Mapping[str, Asked], request: Request, rounds: int) -> dict[str, Cost]:
    """The best of each model's steps, taken in rounds A, B, C, A, B, C; one that fails is not asked again."""
    best: dict[str, Cost] = {}
    for turn in range(rounds):
        for name, worker in crew.items():
            known = best.get(name)
            if known and ("error" in known or known["seconds"] > LONG):
                continue
            answer = worker.ask(replace(request, warm=request.warm if turn == 0 else 0))
            if known is None or "error" in answer or answer["seconds"] < known["seconds"]:
                best[name] = answer
    return best


def growing(
    crew: Mapping[str, Asked], cases: Mapping[int, Request], rounds: int, most_seconds: float
) -> dict[int, dict[str, Cost]]:
    """The same step at growing sizes. A model stops where it failed or where a step would take longer than is allowed.

    Args:
        cases: size -> request, ascending.
        most_seconds: judged from the size before, as if the cost grew with the size.
    """
    found: dict[int, dict[str, Cost]] = {}
    last: dict[str, tuple[int, Cost]] = {}
    for size, request in cases.items():
        stopped: dict[str, Cost] = {}
        for name, (before, cost) in last.items():
            if "error" in cost:
                stopped[name] = cost if cost.get("skipped") else {"error": f"failed at {before:,}", "skipped": True}
            elif (expected := cost["seconds"] * size / before) > most_seconds:
                stopped[name] = {"error": f"a step would take about {expected:,.0f} s", "skipped": True}
        working = {name: worker for name, worker in crew.items() if name not in stopped}
        found[size] = stopped | in_turns(working, request, rounds)
        last = {name: (size, cost) for name, cost in found[size].items()}
    return found


def machine(introductions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where and with what this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src"], cwd=ROOT, capture_output=True)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() + (" and changes in src" if changed.returncode == 1 else ""),
        "versions": {name: words.get("versions", {}) for name, words in introductions.items()},
    }


def check_names(names: Iterable[str]) -> list[str]:
    """The models asked for, all if none; an unknown name is refused."""
    asked = list(names) or list(PEERS)
    for name in asked:
        if name not in PEERS:
            raise InputError(f"--models: {name!r} is not one of {', '.join(PEERS)}")
    return asked
