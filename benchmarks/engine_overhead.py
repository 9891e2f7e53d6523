"""What DeepSpeed adds to plain DistributedDataParallel, and what the engine adds to DeepSpeed: two ranks, tiny.yaml.

    python benchmarks/engine_overhead.py

All loops train the same network on the same micro-batches. They are started together and stand still but for one,
which takes some steps before the next one's turn: machines change their speed in minutes, turns are seconds apart.
Needs `moiety data build` of the corpora of pretrain/configs/tiny.yaml (profile tiny).
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from peers.progress import tracked
from rich.console import Console
from rich.table import Table

from moiety.testing.launched import Forked
from moiety.testing.reliability.workspace import SUBJECT

ROOT = Path(__file__).parents[1]
PLAIN = SUBJECT.with_name("plain.py")
STAGES = (0, 1, 2, 3)
EVERY = 5  # steps of a turn
WARM = 2  # turns that do not count


class Loop:
    """Two ranks that only run during their turns."""

    def __init__(self, script: Path, arguments: list[str], turns: int, out: Path) -> None:
        words = [f"steps={(WARM + turns) * EVERY}", f"log_every={EVERY}", "checkpoint_every=1000000"]
        common = ["--config", ROOT / "pretrain/configs/tiny.yaml", *words]
        self._run = Forked(script, [*common, *arguments], out, ranks=2)
        self._turns = 0
        self._signal(signal.SIGSTOP)

    def turn(self) -> float:
        """Seconds of one step, from the record of the turn before to the next one."""
        started = time.perf_counter()
        self._signal(signal.SIGCONT)
        self._turns += 1
        self._run.until_logged(self._turns)
        seconds = time.perf_counter() - started
        self._signal(signal.SIGSTOP)
        return seconds / EVERY

    def end(self) -> None:
        self._run.kill()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._run.ranks().values():
            process.send_signal(number)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_overhead.json")
    args = parser.parse_args()
    commands = {"DDP": (PLAIN, ["--loop", "ddp"])}
    for stage in STAGES:
        commands[f"DeepSpeed, ZeRO-{stage}"] = (PLAIN, ["--loop", "deepspeed", f"ds=zero{stage}"])
        commands[f"engine, ZeRO-{stage}"] = (ROOT / "pretrain/train.py", [f"ds=zero{stage}"])
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            name: Loop(script, arguments, args.turns, Path(folder, name.replace(" ", "_")))
            for name, (script, arguments) in commands.items()
        }
        try:
            turns = tracked(range(WARM + args.turns), "turns", WARM + args.turns)
            seconds = [{name: loop.turn() for name, loop in loops.items()} for _ in turns][WARM:]
        finally:
            for loop in loops.values():
                loop.end()
    of = {name: [turn[name] for turn in seconds] for name in loops}
    console.print(f"a step of plain DDP: {statistics.median(of['DDP']) * 1e3:.0f} ms")
    table = Table("ZeRO", "DeepSpeed / DDP", "engine / DDP", "engine / DeepSpeed", title="time of a step, medians")
    for stage in STAGES:
        bare, engine = of[f"DeepSpeed, ZeRO-{stage}"], of[f"engine, ZeRO-{stage}"]
        ratios = (ratio(bare, of["DDP"]), ratio(engine, of["DDP"]), ratio(engine, bare))
        table.add_row(str(stage), *(f"{value:.2f}" for value in ratios))
    console.print(table)
    machine = {"machine": platform.processor() or platform.machine(), "date": str(date.today()), "steps": EVERY}
    args.out.write_text(json.dumps({**machine, "seconds_per_step": of}, indent=1) + "\n")


if __name__ == "__main__":
    main()
