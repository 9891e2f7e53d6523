"""Recipes that transfer.py does not measure, as they stand, on their own test sets: LoRA, from scratch, no network.

    make recipes                                          all of them: an hour on two cores
    python benchmarks/recipes.py freesolv [--seeds 0]     some of them
    python benchmarks/recipes.py --show                   the table of what is there by now; runs nothing

The base is the weights of the package. LoRA has the recipe's learning rate; scratch has 2e-3, within a factor
of two of the best for each task of transfer.py. What is finished, or stands in
benchmarks/results/recipes.json for the same base, is not run again. Writes that file and the table of docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired import runs
from paired.runs import QM9, TASKS
from peers.crew import ROOT, machine
from peers.tables import NOTHING, Sheet, around_marks, fill
from rich.console import Console

import moiety
from moiety.adapters.adapter import base_fingerprint
from moiety.adapters.finetune import METHODS
from moiety.errors import InputError
from moiety.training.files import write_json

PAGE = ROOT / "docs/recipes.md"
RESULTS = ROOT / "benchmarks/results/recipes.json"
CONFIGS = ROOT / "finetune/configs"
ELSEWHERE = {task.recipe for task in TASKS.values()}  # transfer.py has them at rates that are tuned
RECIPES = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if path.stem not in ELSEWHERE and not path.stem.startswith(("released_", "bridge_"))
)
ARMS: dict[str, tuple[str, ...]] = {"lora": (), "scratch": ("lr=2e-3",)}
Errors = dict[str, dict[str, dict[str, float]]]  # "recipe: target, metric in unit" -> method -> seed -> error


@dataclass(frozen=True)
class Run:
    """One recipe, one arm, one seed."""

    recipe: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.arm}-{self.seed}"

    def words(self) -> list[str]:
        """Arguments of finetune/lora.py."""
        words = ["--config", str(CONFIGS / f"{self.recipe}.yaml"), f"method={self.arm}", *ARMS[self.arm]]
        words += [f"training.seed={self.seed}", f"data.seed={self.seed}"]
        return [*words, *(QM9 if "corpora/tiny/qm9" in (CONFIGS / f"{self.recipe}.yaml").read_text() else ())]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        around_marks(PAGE)
        base = base_fingerprint(moiety.weights())
        known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        errors: Errors = known["errors"] if known.get("base") == base else {}
        out = args.out / base
        wanted = [Run(recipe, arm, seed) for seed in args.seeds for recipe in args.recipes for arm in ARMS]
        waiting = [run for run in wanted if not is_known(run, errors) and not metrics_of(run, out).exists()]
        if not args.show:
            runs.side_by_side(lambda run: finetune(run, out), waiting, "fine-tuning")
    except InputError as error:
        print(f"recipes.py: {error}", file=sys.stderr)
        return 2
    for run in (Run(recipe, arm, seed) for recipe in RECIPES for arm in ARMS for seed in args.seeds):
        if metrics_of(run, out).exists():
            add(errors, run, json.loads(metrics_of(run, out).read_text()))
    table = sheet(errors)
    table.show(Console())
    if errors:
        where = machine({})
        write_json(RESULTS, {"machine": where, "base": base, "errors": errors})
        head = f"Measured on {where['date']}, commit {where['commit']}, base {base}; mean and standard deviation."
        fill(PAGE, f"{head}\n\n{table.markdown()}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"{', '.join(RECIPES)}; default: all")
    parser.add_argument("--show", action="store_true", help="the table of what is there")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/recipes", help="folder of the runs")
    args = parser.parse_args(argv)
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}")
    args.recipes = args.recipes or RECIPES
    return args


def finetune(run: Run, out: Path) -> None:
    runs.call(run.name, "finetune/lora.py", *run.words(), "--out", out / run.name)


def metrics_of(run: Run, out: Path) -> Path:
    return out / run.name / "metrics.json"


def is_known(run: Run, errors: Errors) -> bool:
    """Whether the repository has it."""
    return any(
        title.startswith(f"{run.recipe}:") and f"{run.seed}" in by_name.get(METHODS[run.arm], {})
        for title, by_name in errors.items()
    )


def add(errors: Errors, run: Run, metrics: Sequence[Mapping[str, Any]]) -> None:
    """What a finished run says of each target."""
    for entry in metrics:
        by_name = errors.setdefault(f"{run.recipe}: {entry['target']}, {entry['metric']} in {entry['unit']}", {})
        for name, error in entry["results"].items():
            by_name.setdefault(name, {})[f"{run.seed}"] = error


def sheet(errors: Errors) -> Sheet:
    """A row a target; of what needs no network the best."""
    networks = [METHODS["lora"], METHODS["scratch"]]
    rows = []
    for title, by_name in sorted(errors.items()):
        recipe, _, target = title.partition(": ")
        scratch = by_name.get(METHODS["scratch"], {})
        others = {name: float(np.mean(list(found.values()))) for name, found in by_name.items() if name not in networks}
        best = min(others, key=lambda name: others[name]) if others else NOTHING
        cells = [runs.cell(by_name.get(name, {}), scratch) for name in networks]
        rows.append([f"`{recipe}`", target, *cells, f"{others[best]:.4g}, {best}" if others else NOTHING])
    return Sheet(
        "Test errors (change against scratch)", ["recipe", "target", *networks, "best without a network"], rows
    )


if __name__ == "__main__":
    sys.exit(main())
