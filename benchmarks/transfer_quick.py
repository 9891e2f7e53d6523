"""What pretraining is worth: QM9 dipole and gap from 1,000 labels, by four methods, three seeds, same steps and data.

    python benchmarks/transfer_quick.py [--model runs/quickstart/export] [--out runs/transfer]

Every run is one `finetune/lora.py`; those that are finished are not repeated. A seed fixes the choice of the training
labels, their order and the fresh weights, for all methods alike; the test set is the same 5,000 molecules throughout.
Learning rates are each method's own, chosen among two or three on the dipole of 1,000 validation molecules.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/transfer_quick.json"
TARGETS, SEEDS = ("dipole", "gap"), (0, 1, 2)
METHODS = {"lora": 5e-3, "full": 1e-3, "head": 5e-3, "scratch": 2e-3}  # learning rates
BASELINES = ("mean predictor", "linear in composition")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/export")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    jobs = [(target, method, seed) for seed in SEEDS for target in TARGETS for method in METHODS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # one core a run
        runs = pool.map(lambda job: finetune(args.model, args.out, *job), jobs)
        metrics = list(track(runs, "fine-tuning", total=len(jobs), console=Console(stderr=True)))
    results = collect(jobs, metrics)
    print_results(results)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def finetune(model: str, out: Path, target: str, method: str, seed: int) -> dict[str, Any]:
    """One fine-tuning on one core; its metrics.json."""
    folder = out / f"{target}-{method}-{seed}"
    if not (folder / "metrics.json").exists():
        overrides = [f"model={model}", f"method={method}", f"lr={METHODS[method]}"]
        overrides += [f"training.seed={seed}", f"data.seed={seed}"]
        config = ROOT / f"finetune/configs/qm9_{target}.yaml"
        command = [sys.executable, ROOT / "finetune/lora.py", "--config", config, "--out", folder, *overrides]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder}: exit {done.returncode}\n{done.stderr[-2000:]}")
    (metrics,) = json.loads((folder / "metrics.json").read_text())
    return metrics


def collect(jobs: list[tuple[str, str, int]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """target -> method -> MAE of every seed, baselines included."""
    table: dict[str, dict[str, list[float]]] = {}
    for (target, _, _), entry in zip(jobs, metrics, strict=True):
        for name, value in entry["results"].items():
            values = table.setdefault(f"{target} ({entry['unit']})", {}).setdefault(name, [])
            if name not in BASELINES or len(values) < len(SEEDS):  # every method reports the same baselines
                values.append(value)
    return {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine(), "mae": table}


def print_results(results: dict[str, Any]) -> None:
    for target, methods in results["mae"].items():
        scratch = np.mean(methods["from scratch"])
        table = Table("method", "MAE", "standard deviation", "against scratch", title=f"{target}, test MAE, 3 seeds")
        for name, values in sorted(methods.items(), key=lambda item: float(np.mean(item[1]))):
            mean = float(np.mean(values))
            table.add_row(name, f"{mean:.4f}", f"{np.std(values, ddof=1):.4f}", f"{mean / scratch - 1:+.1%}")
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
