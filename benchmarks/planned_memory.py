"""The memory that `--plan` states beside the peak of a run: python benchmarks/planned_memory.py

One process on the CPU, some configurations of pretrain/configs, `small` with small micro-batches. Needs the corpora of
profile tiny.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moiety.testing.launched import read_log
from moiety.training.config import PretrainConfig, load_config
from moiety.training.mixture import Mixture
from moiety.training.plan import make_plan

ROOT = Path(__file__).parents[1]
CASES = {
    "tiny": [],
    "quickstart": [],
    "small": [
        "data.sources=[{path: corpora/tiny/qm9}, {path: corpora/tiny/crystals}, {path: corpora/tiny/proteins}]",
        "node_budget=800",
        "edge_budget=30000",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    assert not torch.cuda.is_available(), "states the memory of a GPU where there is one"
    table = Table("configuration", "planned, MiB", "measured, MiB", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in CASES.items():
            path, out = ROOT / f"pretrain/configs/{name}.yaml", Path(folder, name)
            words = [*overrides, "micro_batches=1", f"steps={args.steps}", "log_every=1"]
            config = load_config(PretrainConfig, path, words)
            planned = make_plan(config, Mixture.open(config.data), flops_per_s=1.0).peak_bytes(0, 1) / 2**20
            command = [sys.executable, ROOT / "pretrain/train.py", "--config", path, "--out", out, *words]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            measured = read_log(out)[-1]["peak_memory_mib"]
            table.add_row(name, f"{planned:,.0f}", f"{measured:,}", f"{planned / measured:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
