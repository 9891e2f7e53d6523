"""The launch scripts: several processes, several machines, and signals that reach the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moiety.testing.launched import Launched, free_port, gone, read_log
from moiety.testing.reliability.faults import readable
from moiety.testing.reliability.machines import Machine, two_machines
from moiety.testing.reliability.workspace import SUBJECT, Workspace

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "launch/local.sh"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("launch"))


def launch(space: Workspace, ranks: int, *words: object, machine: Machine | None = None, **variables: object):
    """launch/local.sh as a user types it, with the environment's own commands first in the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, **{name: str(value) for name, value in variables.items()}}
    prefix, extra = (machine.prefix, machine.environment) if machine else ([], {})
    command = [*prefix, LOCAL, ranks, SUBJECT, "--config", space.config, *words]
    return Launched(command, space.folder / "run", {**environment, **extra})


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_script_becomes_a_checkpoint_and_75(space: Workspace, number: signal.Signals):
    run = launch(space, 2, "steps=100000", "checkpoint_every=100000", MASTER_PORT=free_port())
    logged = len(read_log(run.out)) if (run.out / "log.jsonl").exists() else 0
    run.until_logged(logged + 3)
    ranks = run.ranks()
    os.kill(run.process.pid, number)
    assert run.wait() == 75, run.output
    assert gone(ranks.values()) and readable(run.out / "checkpoints")


@pytest.mark.slow
def test_the_same_line_on_two_machines_is_one_run(space: Workspace):
    port = free_port()
    with two_machines() as machines:
        variables = {"NNODES": 2, "MASTER_ADDR": machines[0].master, "MASTER_PORT": port}
        runs = [
            launch(Workspace(space.folder / "two"), 1, "steps=6", machine=machine, NODE_RANK=rank, **variables)
            for rank, machine in enumerate(machines)
        ]
        assert [run.wait() for run in runs] == [0, 0], runs[0].output
    assert len(read_log(runs[0].out)) == 6


SCRIPTS = sorted(path for path in (ROOT / "launch").rglob("*.s*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
