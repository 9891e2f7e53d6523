"""The memory and the time that `--plan` states beside those of runs: python benchmarks/planned.py

Some configurations of pretrain/configs on the CPU: one process, and two at every strategy of launch/ds with a network
whose weights take more memory than its micro-batches. Needs the corpora of profile tiny.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moiety.testing.launched import Launched, read_log
from moiety.training.config import PretrainConfig, load_config
from moiety.training.mixture import Mixture
from moiety.training.plan import STRATEGIES, make_plan

ROOT = Path(__file__).parents[1]
ALL_DOMAINS = "data.sources=[{path: corpora/tiny/qm9}, {path: corpora/tiny/crystals}, {path: corpora/tiny/proteins}]"
AGAIN = "checkpoint_activations=true"
CASES = [  # configuration, overrides, ranks, steps
    ("tiny", [], 1, 16),
    ("quickstart", [], 1, 16),
    ("small", [ALL_DOMAINS, "node_budget=800", "edge_budget=30000"], 1, 16),
    ("small", [ALL_DOMAINS, "node_budget=800", "edge_budget=30000", AGAIN], 1, 16),
    ("tiny", [AGAIN], 1, 16),
]
WIDE = [
    "data.sources=[{path: corpora/tiny/qm9}]",
    "node_budget=200",
    "edge_budget=6000",
    "num_layers=8",
    "precision=fp32",
]
CASES += [("base", [*WIDE, f"ds={strategy}"], 2, 6) for strategy in STRATEGIES]


def measured(path: Path, words: Sequence[str], ranks: int, out: Path) -> tuple[float, float]:
    """Peak of the first rank in MiB, and seconds a step after the first two."""
    run = Launched([ROOT / "launch/local.sh", ranks, ROOT / "pretrain/train.py", "--config", path, *words], out)
    assert run.wait() == 0, run.output
    records = read_log(out)
    seconds = (records[-1]["elapsed_s"] - records[1]["elapsed_s"]) / (len(records) - 2)
    return records[-1]["peak_memory_mib"], seconds


def main() -> None:
    assert not torch.cuda.is_available(), "states the memory of a GPU where there is one"
    columns = ("planned, MiB", "measured", "ratio", "planned, s a step", "measured", "ratio")
    table = Table("configuration", "ranks", *columns)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides, ranks, steps) in enumerate(CASES):
            path = ROOT / f"pretrain/configs/{name}.yaml"
            words = [*overrides, f"micro_batches={ranks}", f"steps={steps}", "log_every=1"]
            config = load_config(PretrainConfig, path, words)
            plan = make_plan(config, Mixture.open(config.data), world_sizes=(ranks,))
            size, seconds = plan.peak_bytes(config.training.ds, ranks) / 2**20, plan.seconds_per_step / ranks
            real_size, real_seconds = measured(path, words, ranks, Path(folder, str(number)))
            what = " ".join([name, *(word for word in overrides if word.startswith(("ds", "checkpoint")))])
            in_memory = (f"{size:,.0f}", f"{real_size:,.0f}", f"{size / real_size:.2f}")
            in_time = (f"{seconds:.2f}", f"{real_seconds:.2f}", f"{seconds / real_seconds:.2f}")
            table.add_row(what, str(ranks), *in_memory, *in_time)
            console.print(what, *in_memory, *in_time)
    console.print(table)


if __name__ == "__main__":
    main()
