"""Promises about machines: a run on two of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moiety.testing.launched import Launched, free_port, largest_difference, read_log
from moiety.testing.reliability.sameness import ROUNDING
from moiety.testing.reliability.workspace import SUBJECT, Row, Workspace

NAMES = ("moiety_a", "moiety_b")  # network namespaces
ADDRESSES = ("10.213.97.1", "10.213.97.2")


@dataclass(frozen=True)
class Machine:
    """Where a command runs as if on a machine of its own."""

    master: str  # address of the first machine
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Two network namespaces joined by a cable where the kernel allows it, else twice this machine's loopback."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not _ip("netns", "add", NAMES[0], check=False):
        yield [Machine("127.0.0.1"), Machine("127.0.0.1")]
        return
    try:
        _ip("netns", "add", NAMES[1])
        _ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        settings = {"GLOO_SOCKET_IFNAME": "cable"}
        yield [Machine(ADDRESSES[0], ["ip", "netns", "exec", name], settings) for name in NAMES]
    finally:
        for name in NAMES:
            _ip("netns", "delete", name, check=False)


def _ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], check=check, capture_output=True).returncode == 0


def two_nodes(space: Workspace, steps: int) -> Row:
    """Two launchers with node ranks of their own: one is asked to stop, both exit with 75; started again, they end."""
    hostfile = space.folder / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    words = (f"steps={steps}", "ds=zero3")
    with two_machines() as machines:
        runs = _start_nodes(space, machines, hostfile, words)
        runs[0].until_logged(steps // 2)
        next(iter(runs[1].ranks().values())).send_signal(signal.SIGUSR1)
        stopped = [run.wait() for run in runs]
        ended = [run.wait() for run in _start_nodes(space, machines, hostfile, words)]
    off_by = largest_difference(read_log(space.folder / "two_nodes"), space.undisturbed(f"steps={steps}"))
    where = "network namespaces" if machines[0].prefix else "loopback"
    figure = f"{where}: stopped with {stopped}, resumed with {ended}, {steps} steps within {off_by:.1e}"
    return Row("two nodes", figure, stopped == [75, 75] and ended == [0, 0] and off_by < ROUNDING)


def _start_nodes(space: Workspace, machines: list[Machine], hostfile: Path, words: tuple[str, ...]) -> list[Launched]:
    port = free_port()
    deepspeed = Path(sys.executable).with_name("deepspeed")
    runs = []
    for number, machine in enumerate(machines):
        launcher = [deepspeed, "--hostfile", hostfile, "--no_ssh", "--node_rank", number]
        where = ["--master_addr", machine.master, "--master_port", port]
        command = [*machine.prefix, *launcher, *where, SUBJECT, "--config", space.config, *words]
        runs.append(Launched(command, space.folder / "two_nodes", machine.environment))
    return runs
