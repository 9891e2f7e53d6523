"""What DeepSpeed adds to plain DistributedDataParallel, and what the engine adds to DeepSpeed: two ranks, tiny.yaml.

    python benchmarks/engine_overhead.py

The three loops train the same network on the same micro-batches in turns. A ratio is the median over rounds of that
of the two runs in the same round, since machines change their speed in the meantime. Needs
`moiety data build` of the corpora of pretrain/configs/tiny.yaml (profile tiny).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moiety.testing.launched import read_log, train
from moiety.testing.reliability.workspace import SUBJECT

ROOT = Path(__file__).parents[1]
PLAIN = SUBJECT.with_name("plain.py")
STAGES = (0, 1, 2, 3)
EVERY = 10  # steps between two looks at the clock; the first of them warm up


def seconds_per_step(script: Path, arguments: list[str], steps: int, out: Path) -> float:
    """Of the steps after the first look at the clock."""
    common = ["--config", ROOT / "pretrain/configs/tiny.yaml", f"steps={steps}", f"log_every={EVERY}"]
    train(script, [*common, *arguments], out, ranks=2)
    clock = [record["elapsed_s"] for record in read_log(out)]
    return (clock[-1] - clock[0]) / (steps - EVERY)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_overhead.json")
    args = parser.parse_args()
    loops = {"DDP": (PLAIN, ["--loop", "ddp"])}
    for stage in STAGES:
        loops[f"DeepSpeed, ZeRO-{stage}"] = (PLAIN, ["--loop", "deepspeed", f"ds=zero{stage}"])
        loops[f"engine, ZeRO-{stage}"] = (ROOT / "pretrain/train.py", [f"ds=zero{stage}"])
    rounds: dict[str, list[float]] = {name: [] for name in loops}
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, (script, arguments) in loops.items():
                out = Path(folder, f"{number} {name}".replace(" ", "_"))
                rounds[name].append(seconds_per_step(script, arguments, args.steps, out))
                console.print(f"round {number + 1} of {args.rounds}  {name}: {rounds[name][-1] * 1e3:.0f} ms a step")
    table = Table("ZeRO", "DeepSpeed / DDP", "engine / DDP", "engine / DeepSpeed", title="time of a step, medians")
    for stage in STAGES:
        bare, engine = rounds[f"DeepSpeed, ZeRO-{stage}"], rounds[f"engine, ZeRO-{stage}"]
        ratios = (ratio(bare, rounds["DDP"]), ratio(engine, rounds["DDP"]), ratio(engine, bare))
        table.add_row(str(stage), *(f"{value:.2f}" for value in ratios))
    console.print(table)
    machine = {"machine": platform.processor() or platform.machine(), "date": str(date.today()), "steps": args.steps}
    args.out.write_text(json.dumps({**machine, "seconds_per_step": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
