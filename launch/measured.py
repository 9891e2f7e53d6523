"""Runs a command and says what it cost: python launch/measured.py COMMAND...

Prints the command, then its wall time and the peak of the memory that its processes held together (each shared page
counted once). The exit code is the command's.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

import psutil

INTERVAL = 0.5  # s between two looks


def resident(process: psutil.Process) -> int:
    """Bytes held by a process and its children, shared pages divided among those who share them."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # one ended while being counted: the next look has the rest
        pass
    return total


def main(command: list[str]) -> int:
    print(f"\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    child = subprocess.Popen(command)
    process = psutil.Process(child.pid)
    peak = 0
    while child.poll() is None:
        peak = max(peak, resident(process))
        try:
            child.wait(INTERVAL)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:  # the child got it as well; let it finish in its own way
            child.wait()
    minutes, seconds = divmod(time.monotonic() - started, 60)
    print(f"  {minutes:.0f} min {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB", flush=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
