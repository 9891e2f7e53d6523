"""For how long training stands still while a checkpoint begins, in steps: python benchmarks/save_stall.py

tiny.yaml, whose steps are short, and small.yaml, with a checkpoint every fifth step. Needs corpora of profile tiny.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moiety.testing.launched import train

ROOT = Path(__file__).parents[1]
SMALL = ["data.sources=[{path: corpora/tiny/qm9}]", "node_budget=800", "edge_budget=30000", "micro_batches=2"]
CASES = [("tiny", ranks, ds, []) for ranks, ds in ((1, "zero0"), (2, "zero0"), (2, "zero2"), (2, "zero3"))]
CASES.append(("small", 2, "zero3", [*SMALL, "workers=0"]))
EVERY = 5  # steps between two checkpoints, and two records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=10)
    args = parser.parse_args()
    table = Table("configuration", "ranks", "ds", "saves", "a step, ms", "median stall", "longest", "of a step")
    words = [f"steps={(args.saves + 1) * EVERY}", f"log_every={EVERY}", f"checkpoint_every={EVERY}"]
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks, ds, overrides in CASES:
            arguments = ["--config", ROOT / f"pretrain/configs/{name}.yaml", f"ds={ds}", *overrides, *words]
            records = train(ROOT / "pretrain/train.py", arguments, Path(folder, f"{name}_{ds}_{ranks}"), ranks)
            elapsed = [b["elapsed_s"] - a["elapsed_s"] for a, b in itertools.pairwise(records)]
            stalls = [record["time"]["save"] * s for record, s in zip(records[1:], elapsed, strict=True)]
            step = statistics.median(s - stall for s, stall in zip(elapsed, stalls, strict=True)) / EVERY
            median = statistics.median(stalls)
            times = (f"{step * 1e3:.0f}", f"{median * 1e3:.1f} ms", f"{max(stalls) * 1e3:.1f} ms")
            table.add_row(name, str(ranks), ds, str(len(stalls)), *times, f"{median / step:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
