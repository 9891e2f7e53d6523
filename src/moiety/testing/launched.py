"""Training as users launch it, in processes of its own, for tests that kill, stop and compare runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
REPEATABLE = ("step", "loss", "losses", "grad_norm", "lr", "skipped_steps", "samples")  # bit by bit after a resume
PATIENCE = 240.0  # s that anything may take

Record = dict[str, Any]


class Launched:
    """A training script under plain python, or under the deepspeed launcher on several ranks."""

    def __init__(self, script: Path, arguments: Sequence[object], out: Path, ranks: int = 1) -> None:
        """Starts `script ARGUMENTS --out OUT` in a process group of its own."""
        self.out = out
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        launcher = [
            Path(sys.executable).with_name("deepspeed"),
            "--num_accelerators",
            ranks,
            "--master_port",
            free_port(),
        ]
        command = [*(launcher if ranks > 1 else [sys.executable]), script, *arguments, "--out", out]
        out.parent.mkdir(parents=True, exist_ok=True)
        self.output_path = out.parent / f"{out.name}.output"
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it said on stdout and stderr."""
        return self.output_path.read_text()

    def wait(self) -> int:
        """Its exit code; a process that does not end is killed with its group, and that is an error."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.out} did not end:\n{self.output[-4000:]}") from None

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something to happen while the run goes on."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.out} ended or hangs before it happened:\n{self.output[-4000:]}")
            time.sleep(0.01)

    def until_logged(self, lines: int) -> None:
        log = self.out / "log.jsonl"
        self.until(lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by local rank, once the launcher has started them."""
        found = {}
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                environment = process.environ()
                is_rank = "LOCAL_RANK" in environment and "python" in process.name()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if is_rank:
                found[int(environment["LOCAL_RANK"])] = process
        return found

    def kill(self) -> None:
        """SIGKILL to everything it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train(script: Path, arguments: Sequence[object], out: Path, ranks: int = 1) -> list[Record]:
    """Runs to the end and returns the log."""
    run = Launched(script, arguments, out, ranks)
    code = run.wait()
    assert code == 0, f"exit code {code}:\n{run.output[-4000:]}"
    return read_log(out)


def read_log(out: Path) -> list[Record]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def repeatable(records: Sequence[Record]) -> list[Record]:
    """What must be equal, to the last bit, in two runs of the same configuration."""
    return [{key: record[key] for key in REPEATABLE} for record in records]


def largest_difference(a: Sequence[Record], b: Sequence[Record]) -> float:
    """Relative, over every loss of every domain and every gradient norm; the structures must be the same."""
    assert [record["samples"] for record in a] == [record["samples"] for record in b]
    pairs = [(x["grad_norm"], y["grad_norm"]) for x, y in zip(a, b, strict=True)]
    for x, y in zip(a, b, strict=True):
        assert x["losses"].keys() == y["losses"].keys()
        pairs += [(x["losses"][d][o], y["losses"][d][o]) for d in x["losses"] for o in x["losses"][d]]
    return max(abs(p - q) / abs(q) for p, q in pairs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
