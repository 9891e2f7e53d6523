"""What pretraining is worth: paired fine-tuning runs from few labels and many, beside what needs no network.

    make transfer                                             pilots, then the matrix: many hours on two cores
    make transfer-quick                                       dipole from 1,000 labels, LoRA and scratch
    python benchmarks/transfer.py --pilot [--tasks dipole]    learning rates, by validation
    python benchmarks/transfer.py [--tasks ...] [--counts 100,1000] [--arms ...] [--seeds 0,1,2]
    python benchmarks/transfer.py --show                      what is there by now; runs nothing

Every run is one `finetune/lora.py` on one core, as many at a time as there are cores. What is finished, or stands in
benchmarks/results/transfer.json, is not run again. A seed fixes the training labels, their order and fresh weights,
for all arms alike; arms have the same test set, the weights of their best validation score, and as many steps as
`moiety finetune` takes for as many labels. Each arm's learning rate is the best on validation at 1,000 labels (seed
0) of the task: of three, and where the best of these is at the edge, of one beyond. Writes that file, and the tables
of docs/transfer.md. The quick part takes its learning rates there, repeats the runs, and writes neither.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from paired import runs
from paired.fingerprints import NAME as FINGERPRINT
from paired.fingerprints import boosted
from paired.ledger import Errors, Ledger
from paired.runs import PILOT, TASKS, Job
from peers.crew import ROOT, machine
from peers.progress import tracked
from peers.tables import Sheet, around_marks, fill
from rich.console import Console

import moiety
from moiety.adapters.adapter import base_fingerprint
from moiety.adapters.finetune import METHODS, FinetuneConfig, LabelledData
from moiety.errors import InputError
from moiety.training.config import load_config

PAGE = ROOT / "docs/transfer.md"
RESULTS = ROOT / "benchmarks/results/transfer.json"
ARMS = {  # learning rates that are tried
    "scratch": (1e-3, 2e-3, 4e-3), "full": (5e-4, 1e-3, 2e-3), "lora": (2e-3, 5e-3, 1e-2), "head": (2e-3, 5e-3, 1e-2),
}  # fmt: skip
QUICK = {"tasks": ["dipole"], "arms": ["scratch", "lora"], "counts": [PILOT], "seeds": [0, 1]}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        around_marks(PAGE)
        if not (args.model / "config.json").is_file():
            raise InputError(f"{args.model}: no model here; pretrain one, or give --model")
        out = args.out / base_fingerprint(args.model)  # runs of one base
        ledger = Ledger.open(RESULTS, out.name)
        if args.quick:
            ledger.errors.clear()
        while pilots := pilots_of(ledger, args.tasks, args.arms):
            if not args.show:
                runs.run(pilots, args.model, out)
            done = [job for job in pilots if runs.finished(job, out)]
            for job in done:
                ledger.add_pilot(job, runs.read(out / job.name, job.task))
            if not done:
                break
        jobs = [] if args.show or args.pilot else jobs_of(ledger, args.tasks, args.counts, args.arms, args.seeds)
        runs.run([job for job in jobs if not ledger.has(job)], args.model, out)
        others([job for job in jobs if not knows_others(ledger, job)], args.model, out)
    except InputError as error:
        print(f"transfer.py: {error}", file=sys.stderr)
        return 2
    collect(ledger, jobs_of(ledger, list(TASKS), every_count(), list(ARMS), args.seeds), out)
    sheets = [sheet(ledger.errors, task) for task in ledger.errors]
    for one in sheets:
        one.show(Console())
    if not args.quick:
        write(ledger, sheets)
    return 0


def jobs_of(
    ledger: Ledger, tasks: Sequence[str], counts: Sequence[int], arms: Sequence[str], seeds: Sequence[int]
) -> list[Job]:
    """At the rates that the pilots found, few labels first; arms without a rate are left out. One was its pilot."""
    return [
        Job(task, arm, count, seed, rate)
        for count in counts for seed in seeds for task in tasks for arm in arms
        if count in TASKS[task].counts and (rate := ledger.rate(task, arm))
    ]  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilot", action="store_true", help="learning rates alone")
    parser.add_argument("--show", action="store_true", help="tables of what is there")
    parser.add_argument("--quick", action="store_true", help="the slice of `make transfer-quick`")
    parser.add_argument("--tasks", type=runs.words(TASKS), default=list(TASKS))
    parser.add_argument("--arms", type=runs.words(ARMS), default=list(ARMS))
    parser.add_argument("--counts", type=lambda text: [int(word) for word in text.split(",")], default=None)
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=moiety.weights(), help="the base; default: that of the package")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/transfer", help="folder of the runs")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    args.counts = args.counts or every_count()
    return args


def every_count() -> list[int]:
    return sorted({count for task in TASKS.values() for count in task.counts})


def knows_others(ledger: Ledger, job: Job) -> bool:
    """Whether the ledger has what needs no network, where there is something."""
    teacher = TASKS[job.task].teacher
    return teacher is None or f"{job.seed}" in ledger.of(job).get(teacher.name, {})


def others(jobs: Sequence[Job], model: Path, out: Path) -> None:
    """From the same labels, where molecules have SMILES: fingerprints and gradient boosting; and a teacher fitted."""
    first = {job.draw: job for job in jobs if not (out / job.draw).exists()}
    for name, job in tracked(first.items(), "without a network", len(first)):
        _, recipe, *words = job.words(str(model))
        config = load_config(FinetuneConfig, recipe, words)
        data = LabelledData.open(config.data, config.tasks)
        train, test = (subset.read(range(len(subset)), whole=True) for subset in (data.train, data.test))
        about = TASKS[job.task]
        task = next(task for task in data.tasks if task.name == about.target)
        answers = {about.teacher.name: about.teacher.fitted(task, train, test)} if about.teacher else {}
        if about.smiles:
            answers[FINGERPRINT] = boosted(task, train, test, job.seed)
        true = task.labels(test)
        errors = {name: task.error(answered, true) for name, answered in answers.items()}
        (out / name).write_text(json.dumps(errors) + "\n")


def pilots_of(ledger: Ledger, tasks: Sequence[str], arms: Sequence[str]) -> list[Job]:
    """What is left of them."""
    return [
        Job(task, arm, PILOT, 0, rate)
        for task in tasks for arm in arms for rate in rates(ledger.scores(task, arm), ARMS[arm])
        if rate not in ledger.scores(task, arm)
    ]  # fmt: skip


def rates(scores: dict[float, float], first: Sequence[float]) -> list[float]:
    """Those that are tried: the first ones, and where the best of them is at an edge, one of half or twice that."""
    if not set(first) <= set(scores):
        return list(first)
    best = min(first, key=lambda rate: scores[rate])
    beyond = {min(first): best / 2, max(first): best * 2}
    return sorted([*first, *([beyond[best]] if best in beyond else [])])


def collect(ledger: Ledger, jobs: Sequence[Job], out: Path) -> None:
    """What is finished, into the ledger."""
    for job in jobs:
        if not runs.finished(job, out):
            continue
        entry = runs.read(out / job.name, job.task)
        if (out / job.draw).exists():
            entry["results"] |= json.loads((out / job.draw).read_text())
        ledger.add(job, entry)


def sheet(found: Errors, task: str) -> Sheet:
    """A row a method: mean and standard deviation over the seeds, and the change against scratch."""
    counts = found[task]
    names = list(dict.fromkeys(name for by_name in counts.values() for name in by_name))
    names.sort(key=lambda name: name not in METHODS.values())
    scratch = METHODS["scratch"]
    rows = [
        [name, *(runs.cell(by_name.get(name, {}), by_name.get(scratch, {})) for by_name in counts.values())]
        for name in names
    ]
    about = TASKS[task]
    title = f"{task}: test error of `{about.recipe}`, {about.target}, {about.measure} (change against scratch)"
    return Sheet(title, ["method", *(f"{int(count):,} labels" for count in counts)], rows)


def write(ledger: Ledger, sheets: Sequence[Sheet]) -> None:
    """The figures, the tables of the page, and its plot."""
    where = machine({})
    ledger.write(RESULTS, machine=where)
    if sheets:
        head = (
            f"Measured on {where['date']}, commit {where['commit']}, base {ledger.base}; mean and standard deviation."
        )
        picture = "![Error against labels](../benchmarks/results/transfer.svg)"
        fill(PAGE, "\n\n".join([head, picture, *(one.markdown() for one in sheets)]))
        plot(ledger.errors, RESULTS.with_suffix(".svg"))


def plot(found: Errors, path: Path) -> None:
    """Error against labels, a panel a task: every seed a dot, means joined, the best baseline dotted."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "transfer"
    from matplotlib import pyplot

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (task, counts) in zip(axes.flat, found.items(), strict=False):
        for number, method in enumerate(METHODS[arm] for arm in ARMS):
            points = [(int(n), error) for n, by_name in counts.items() for error in by_name.get(method, {}).values()]
            means = [(int(n), np.mean(list(e[method].values()))) for n, e in counts.items() if method in e]
            axis.plot(*zip(*points, strict=True) if points else ([], []), ".", color=f"C{number}", alpha=0.6)
            axis.plot(*zip(*means, strict=True) if means else ([], []), "-", color=f"C{number}", label=method)
        others = [
            (int(n), min(np.mean(list(e.values())) for name, e in by_name.items() if name not in METHODS.values()))
            for n, by_name in counts.items()
        ]
        axis.plot(*zip(*others, strict=True), "k:", label="best baseline without a network")
        axis.set(xscale="log", yscale="log", title=task, xlabel="labels", ylabel=TASKS[task].measure)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
