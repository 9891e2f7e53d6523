"""Accuracy for the same compute: models of .4 M parameters from scratch, at equal CPU time and at equal samples.

    make bench-accuracy                                       pilots, then the matrix: many hours on two cores
    python benchmarks/accuracy.py --pilot [--tasks u0]        learning rates and readouts, by validation
    python benchmarks/accuracy.py [--budgets 510s,80000p,400000p] [--tasks u0,gap,forces] [--models ...] [--seeds 0,1]
    python benchmarks/accuracy.py --show                      what is there by now; runs nothing

Runs benchmarks/accuracy/train.py, one core each and two at a time; what is finished is not run again, so that a matrix
that was interrupted goes on. A budget is CPU seconds (s) or molecule passes (p). Writes accuracy.json and accuracy.svg
into benchmarks/results and the tables of docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import tables
from peers.crew import PEERS_PYTHON, ROOT, SAME_FOR_ALL, machine
from rich.console import Console

from moiety.errors import InputError

PAGE = ROOT / "docs/accuracy.md"
RESULTS = ROOT / "benchmarks/results/accuracy.json"
SETTINGS = ROOT / "benchmarks/accuracy/settings.json"
ARRAYS = ROOT / "corpora/accuracy"
PROCESSES = 2  # more would disturb each other's clocks
MODELS = ("moiety-l1", "moiety-l2", "moiety-l1-global", "tensornet", "torchmd-et", "visnet", "mace")
BUDGETS = ("510s", "80000p", "400000p")
CORPUS = {"u0": "qm9", "gap": "qm9", "forces": "forces"}  # of each task
COLUMNS = {  # (task, what is measured) -> title, label of the baselines
    ("u0", "label"): ("U0, meV", "energy"),
    ("gap", "label"): ("gap, meV", "gap"),
    ("forces", "forces"): ("forces, meV/Å", "forces"),
    ("forces", "label"): ("energy beside forces, meV", "energy"),
}
LEARNING_RATES = (5e-4, 1e-3, 2e-3)  # tried for every model, beside its published one
PILOT = "60s"

Runs = Mapping[tuple[str, str, str], list[dict[str, Any]]]  # budget, task, model -> a finished run a seed


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    model: str
    budget: str
    seed: int
    lr: float | None = None  # None: that of the settings
    readout: str | None = None

    @property
    def name(self) -> str:
        tried = f"-{self.lr:g}-{self.readout}" if self.lr else ""
        return f"{self.task}-{self.model}-{self.budget}-{self.seed}{tried}"

    def command(self, out: Path) -> list[str]:
        python = sys.executable if self.model.startswith("moiety") else str(PEERS_PYTHON)
        amount = ["--seconds" if self.budget.endswith("s") else "--passes", self.budget[:-1]]
        tried = ["--lr", str(self.lr), "--readout", str(self.readout), "--points", "1", "--no-test"] if self.lr else []
        return [
            python, str(ROOT / "benchmarks/accuracy/train.py"), "--model", self.model, "--task", self.task, *amount,
            "--seed", str(self.seed), "--data", str(ARRAYS), "--out", str(out), *tried,
        ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    broken: list[str] = []
    try:
        tables.around_marks(PAGE)
        baselines = read_baselines()
        if args.pilot:
            broken = pilot(args.tasks, args.models, args.out / "pilot")
            return told(broken)
        jobs = [Job(t, m, b, s) for b in args.budgets for s in args.seeds for t in args.tasks for m in args.models]
        if not args.show:
            broken = run(jobs, args.out)
    except InputError as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2
    runs = read(args.out)
    budgets = sorted({budget for budget, _, _ in runs}, key=lambda b: (b.endswith("p"), int(b[:-1])))
    sheets = [sheet(runs, baselines, budget) for budget in budgets]
    for found in sheets:
        found.show(Console())
    if sheets:
        write(runs, baselines, sheets)
    return told(broken)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilot", action="store_true", help="choose learning rates and readouts")
    parser.add_argument("--show", action="store_true", help="tables of what is there")
    parser.add_argument("--budgets", type=words(check_budget), default=list(BUDGETS))
    parser.add_argument("--tasks", type=words(one_of(CORPUS)), default=list(CORPUS))
    parser.add_argument("--models", type=words(one_of(MODELS)), default=list(MODELS))
    parser.add_argument("--seeds", type=words(int), default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/accuracy", help="folder of the runs")
    return parser.parse_args(argv)


def words(check: Any) -> Any:
    """A reader of words between commas."""
    return lambda text: [check(word) for word in text.split(",")]


def one_of(known: Iterable[str]) -> Any:
    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return word

    return check


def check_budget(word: str) -> str:
    if word[-1:] not in ("s", "p") or not word[:-1].isdecimal() or int(word[:-1]) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no budget: say 510s (CPU seconds) or 80000p (molecule passes)")
    return word


def read_baselines() -> dict[str, dict[str, float]]:
    """Baseline -> task:what -> MAE in meV or meV/Å."""
    found: dict[str, dict[str, float]] = {}
    for (task, what), (_, label) in COLUMNS.items():
        path = ARRAYS / f"{CORPUS[task]}.json"
        if not path.exists():
            raise InputError(f"no {path}; make it with benchmarks/accuracy/prepare.py")
        for name, error in json.loads(path.read_text())["baselines"][label].items():
            found.setdefault(name, {})[f"{task}:{what}"] = 1000 * error
    return found


def run(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Trains what is not finished yet; returns what broke, with the reason."""
    left = [job for job in jobs if not (folder / f"{job.name}.json").exists()]
    if any(not job.model.startswith("moiety") for job in left) and not PEERS_PYTHON.exists():
        raise InputError(f"{PEERS_PYTHON.parents[1].name} is missing: `make bench` builds it")

    def train(job: Job) -> str:
        environment = os.environ | SAME_FOR_ALL
        done = subprocess.run(job.command(folder / f"{job.name}.json"), env=environment, capture_output=True, text=True)
        print(f"{job.name}: {'done' if done.returncode == 0 else 'FAILED'}", file=sys.stderr, flush=True)
        return f"{job.name}: exit {done.returncode}\n{done.stderr[-1500:]}" if done.returncode else ""

    with ThreadPoolExecutor(max_workers=PROCESSES) as pool:
        return [failure for failure in pool.map(train, left) if failure]


def pilot(tasks: Sequence[str], models: Sequence[str], folder: Path) -> list[str]:
    """Chooses by validation error among four learning rates; for the gap then the readout, at the best of them."""
    settings = json.loads(SETTINGS.read_text())
    published = {model: settings["published"][model]["lr"] for model in models}
    broken: list[str] = []
    for task in tasks:
        first = "mean" if task == "gap" else "sum"
        jobs = {m: [Job(task, m, PILOT, 0, lr, first) for lr in (*LEARNING_RATES, published[m])] for m in models}
        broken += run([job for of in jobs.values() for job in of], folder)
        if task == "gap":
            for model, of in jobs.items():
                if tried(of, folder):
                    of.append(Job(task, model, PILOT, 0, tried(of, folder)[0][1].lr, "sum"))
            broken += run([of[-1] for of in jobs.values()], folder)
        for model, of in jobs.items():
            if ranked := tried(of, folder):
                best = ranked[0][1]
                errors = {f"{job.lr:g} {job.readout}": round(error, 2) for error, job in ranked}
                chosen = {"lr": best.lr, "readout": best.readout, "pilot": PILOT, "validation": errors}
                settings.setdefault(task, {})[model] = chosen
    SETTINGS.write_text(json.dumps(settings, indent=1) + "\n")
    Console().print_json(json.dumps({task: settings.get(task, {}) for task in tasks}))
    return broken


def tried(jobs: Iterable[Job], folder: Path) -> list[tuple[float, Job]]:
    """(validation error, job) of the runs that came to an end, best first."""
    found = []
    for job in jobs:
        path = folder / f"{job.name}.json"
        val = json.loads(path.read_text())["val"] if path.exists() else None
        if val is not None:
            found.append((val.get("forces", val["label"]), job))
    return sorted(found, key=lambda pair: pair[0])


def read(folder: Path) -> Runs:
    """All runs of the folder, seeds in order."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        entry = json.loads(path.read_text())
        budget = f"{entry['seconds']:.0f}s" if entry["seconds"] is not None else f"{entry['passes']}p"
        found.setdefault((budget, entry["task"], entry["model"]), []).append(entry)
    return found


def sheet(runs: Runs, baselines: Mapping[str, Mapping[str, float]], budget: str) -> tables.Sheet:
    """Test error of every model at one budget: mean of the seeds (each of them), ratio to the best peer's mean."""
    models = [model for model in MODELS if any((budget, task, model) in runs for task in CORPUS)]
    errors = {
        (model, column): [run["test"][column[1]] for run in runs.get((budget, column[0], model), []) if run["test"]]
        for model in models
        for column in COLUMNS
    }
    best = {
        column: min(
            (float(np.mean(e)) for (m, c), e in errors.items() if c == column and e and is_peer(m)), default=None
        )
        for column in COLUMNS
    }
    rows = [[model, *(cell(errors[model, column], best[column]) for column in COLUMNS)] for model in models]
    for name, of in baselines.items():
        rows.append([name, *(f"{of[k]:.1f}" if (k := ":".join(c)) in of else tables.NOTHING for c in COLUMNS)])
    amount = f"{int(budget[:-1]):,} {'CPU seconds' if budget.endswith('s') else 'molecule passes'}"
    seen = {model: passes_of(runs, budget, model) for model in models}
    notes = [f"{model}: {', '.join(of)}" for model, of in seen.items() if of]
    return tables.Sheet(
        f"Test MAE after {amount}: mean (each seed), ratio to the best peer (lower is better)",
        ["model", *(title for title, _ in COLUMNS.values())],
        rows,
        notes,
    )


def is_peer(model: str) -> bool:
    return not model.startswith("moiety")


def cell(errors: Sequence[float], best: float | None) -> str:
    if not errors:
        return tables.NOTHING
    mean = float(np.mean(errors))
    against = f", x{mean / best:.2f}" if best else ""
    return f"{mean:.1f} ({' '.join(f'{error:.1f}' for error in errors)}){against}"


def passes_of(runs: Runs, budget: str, model: str) -> list[str]:
    """What a model's runs came to, by task."""
    found = []
    for task in CORPUS:
        for entry in runs.get((budget, task, model), [])[:1]:
            if entry["points"]:
                last = entry["points"][-1]
                found.append(f"{task} {last['passes']:,} passes in {last['seconds']:.0f} s at lr {entry['lr']:g}")
    return found


def write(runs: Runs, baselines: Mapping[str, Any], sheets: Sequence[tables.Sheet]) -> None:
    """JSON, curves and page."""
    where = machine({})
    entries = [run for of in runs.values() for run in of]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": where, "baselines": baselines, "runs": entries}, indent=1) + "\n")
    plot(runs, RESULTS.with_suffix(".svg"))
    sizes = {run["model"]: run["num_parameters"] for of in runs.values() for run in of}
    head = f"Tables of {where['date']}, commit {where['commit']}, {where['cpu']}, one core a run. Parameters: "
    head += ", ".join(f"{model} {sizes[model]:,}" for model in MODELS if model in sizes) + "."
    tables.fill(PAGE, "\n\n".join([head, *(found.markdown() for found in sheets)]))


def plot(runs: Runs, path: Path) -> None:
    """Validation error along the runs of the longest budget of each kind: a row a task; against time and passes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"
    from matplotlib import pyplot

    tasks = [task for task in CORPUS if any(t == task for _, t, _ in runs)]
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(9.5, 3.6 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        what = "forces" if task == "forces" else "label"
        for axis, kind, along in zip(row, "sp", ("seconds", "passes"), strict=True):
            budgets = [b for b, t, _ in runs if t == task and b.endswith(kind)]
            longest = max(budgets, key=lambda b: int(b[:-1]), default="")
            for index, model in enumerate(MODELS):
                look = {"linestyle": "--", "linewidth": 1} if is_peer(model) else {"linewidth": 2}
                for number, entry in enumerate(runs.get((longest, task, model), [])):
                    line = [(point[along], point["val"][what]) for point in entry["points"]]
                    label = model if number == 0 else None
                    axis.plot(
                        *zip(*line, strict=True), color=f"C{index}", marker="o", markersize=2, label=label, **look
                    )
            x_label = "CPU seconds" if along == "seconds" else "molecule passes"
            axis.set(yscale="log", xlabel=x_label, ylabel=f"validation MAE: {COLUMNS[task, what][0]}")
            axis.grid(alpha=0.3, which="both")
    lines = {line.get_label(): line for line in figure.findobj(pyplot.Line2D) if line.get_label() in MODELS}
    axes[0][0].legend(handles=list(lines.values()), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def told(broken: Sequence[str]) -> int:
    for failure in broken:
        print(failure, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
