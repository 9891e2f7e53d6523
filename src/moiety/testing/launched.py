"""Training in processes of its own, for tests and campaigns that kill, stop and compare runs.

`Launched` is what users do: a script under plain python or a launcher. Half of its time goes by in imports, so `Forked`
starts the same script in processes that have them already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from moiety.training.watchdog import alive

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
SETTINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
PRELOADED = ("deepspeed", "transformers.modeling_utils", "moiety.training.export", "moiety.training.loop", "ase")
REPEATABLE = ("step", "loss", "losses", "grad_norm", "lr", "skipped_steps", "samples")  # bit by bit after a resume
PATIENCE = 240.0  # s that anything may take
GRACE = 10.0  # s that forked ranks have to notice that another one is gone

Record = dict[str, Any]


class Started:
    """A run under way; how it was started is for subclasses."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.output_path = out.parent / f"{out.name}.output"
        out.parent.mkdir(parents=True, exist_ok=True)

    @property
    def output(self) -> str:
        """What it said on stdout and stderr."""
        return self.output_path.read_text()

    def exit_code(self) -> int | None:
        """None while it runs; signals are negative."""
        raise NotImplementedError

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by local rank."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to all of it."""
        raise NotImplementedError

    def wait(self) -> int:
        """Its exit code; a run that does not end is killed, and that is an error."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.exit_code()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.out} did not end:\n{self.output[-4000:]}")
            time.sleep(0.02)
        return code

    def stop(self, number: signal.Signals) -> int:
        """Asks the first rank to stop; the run's exit code."""
        self.ranks()[0].send_signal(number)
        return self.wait()

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something to happen while the run goes on."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.exit_code() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.out} ended or hangs before it happened:\n{self.output[-4000:]}")
            time.sleep(0.005)

    def until_logged(self, lines: int) -> None:
        log = self.out / "log.jsonl"
        self.until(lambda: log.exists() and log.read_bytes().count(b"\n") >= lines)


class Launched(Started):
    """A command that ends in `--out OUT`, as users type it."""

    def __init__(self, command: Sequence[object], out: Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(out)
        env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in (*command, "--out", out)],
                env={**env, **SETTINGS, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        return self.process.poll()

    def ranks(self) -> dict[int, psutil.Process]:
        found: dict[int, psutil.Process] = {}
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                environment = process.environ()
                is_rank = "LOCAL_RANK" in environment and "python" in process.name()
                is_worker = process.parent() in found.values()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if is_rank and not is_worker:
                found[int(environment["LOCAL_RANK"])] = process
        return found

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launcher_command(launcher: str, ranks: int) -> list[object]:
    """torchrun or deepspeed on this machine; a script and its arguments follow."""
    options = {
        "torchrun": ["--nproc-per-node", ranks, "--master-port", free_port()],
        "deepspeed": ["--num_accelerators", ranks, "--master_port", free_port()],
    }
    return [Path(sys.executable).with_name(launcher), *options[launcher]]


class Forked(Started):
    """`script ARGUMENTS --out OUT` in processes that are forked off one with everything imported."""

    def __init__(
        self,
        script: Path,
        arguments: Sequence[object],
        out: Path,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(out)
        self.output_path.write_text("")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))  # counts when the first one starts
        argv = [str(part) for part in (script, *arguments, "--out", out)]
        port = str(free_port())
        before = dict(os.environ)
        os.environ.update(SETTINGS, DS_ACCELERATOR="cpu")  # which the server of forks starts with
        self.processes = []
        try:
            for rank in range(ranks):
                variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
                variables |= environment or {}
                process = context.Process(target=_run_script, args=(argv, variables, self.output_path))
                process.start()
                self.processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._first_death = 0.0

    def exit_code(self) -> int | None:
        """As a launcher does: the first rank that fails ends all."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed and None in codes:
            self._first_death = self._first_death or time.monotonic()
            if time.monotonic() - self._first_death > GRACE:
                self.kill()
            return None
        return failed[0] if failed else None if None in codes else 0

    def ranks(self) -> dict[int, psutil.Process]:
        return {rank: psutil.Process(process.pid) for rank, process in enumerate(self.processes)}

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _run_script(argv: list[str], variables: dict[str, str], output_path: Path) -> None:
    """What a forked process does: the script, with its output in a file and its mistakes as exit codes."""
    os.environ.update(variables)
    output = os.open(output_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def train(script: Path, arguments: Sequence[object], out: Path, ranks: int = 1) -> list[Record]:
    """Runs to the end and returns the log."""
    run = Forked(script, arguments, out, ranks)
    code = run.wait()
    assert code == 0, f"exit code {code}:\n{run.output[-4000:]}"
    return read_log(out)


def gone(processes: Iterable[psutil.Process], within: float = 60.0) -> bool:
    """Whether processes end in time; what is left of one that nobody waited for does not count."""
    processes = list(processes)
    deadline = time.monotonic() + within
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


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
