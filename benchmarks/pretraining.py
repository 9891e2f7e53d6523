"""Which pretraining pays: objectives at equal FLOPs, and several domains against one at equal exposure.

    make pretraining-choices                                   both parts: hours on two cores
    python benchmarks/pretraining.py objectives [--steps 3000] [--tasks dipole,forces] [--seeds 0,1,2]
    python benchmarks/pretraining.py domains [--steps 6000]
    python benchmarks/pretraining.py --show                    what is there by now; runs nothing

Every arm is a `pretrain/train.py` of the released recipe with other objectives or sources, on one core, and then
LoRA from 1,000 labels of each task as in transfer.py, at the learning rates of its pilots. Finished runs are not run
again. Objectives have the same FLOPs: a step with a second forward pass counts as 4/3, so that arm has 3/4 of the
steps. Domains have the same exposure: a single one has as many steps as the mixture spent on it, on a schedule of its
own. Writes benchmarks/results/pretraining.json and the tables of docs/pretraining.md.
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
from paired.ledger import Ledger
from paired.runs import TASKS as FINE_TUNINGS
from paired.runs import Job
from peers.crew import ROOT, machine
from peers.tables import Sheet, around_marks, fill
from rich.console import Console

import moiety
from moiety.adapters.adapter import base_fingerprint
from moiety.adapters.finetune import METHODS
from moiety.errors import InputError

PAGE = ROOT / "docs/pretraining.md"
RESULTS = ROOT / "benchmarks/results/pretraining.json"
TRANSFER = ROOT / "benchmarks/results/transfer.json"
LABELS = 1000
TYPES = {"types": {"weight": 0.2}}
SIGMA = {"sigma_min": 0.02, "sigma_max": 0.25}
MIXTURE = {"qm9": 6.0, "ccd": 3.0, "crystals": 1.5, "proteins": 2.0}  # of the released recipe


@dataclass(frozen=True)
class Arm:
    """One pretraining; None leaves what the released recipe has."""

    objectives: Mapping[str, Mapping[str, float]] | None
    sources: Mapping[str, float]
    steps: float = 1.0  # share of the part's


def of_domain(*corpora: str) -> Arm:
    return Arm(None, {c: MIXTURE[c] for c in corpora}, sum(MIXTURE[c] for c in corpora) / sum(MIXTURE.values()))


WITH_FORCES = {"qm9": 3.0, "forces": 1.0}
PARTS: dict[str, dict[str, Arm]] = {
    "objectives": {
        "coordinates": Arm({"coordinates": SIGMA}, WITH_FORCES),
        "coordinates + types": Arm({"coordinates": SIGMA, **TYPES}, WITH_FORCES),
        "self-conditioned + types": Arm({"self_conditioned": SIGMA, **TYPES}, WITH_FORCES, 3 / 4),
        "blocks + types": Arm({"blocks": SIGMA, **TYPES}, WITH_FORCES),
        "DeNS + types": Arm({"dens": SIGMA, **TYPES}, WITH_FORCES),
    },
    "domains": {
        "all": Arm(None, MIXTURE),
        "molecules": of_domain("qm9", "ccd"),
        "crystals": of_domain("crystals"),
        "proteins": of_domain("proteins"),
    },
}
STEPS = {"objectives": 3000, "domains": 6000}
TASKS = {"objectives": ["dipole", "forces"], "domains": ["dipole", "crystals", "residues"]}
AT_HOME = {"dipole": "molecules", "crystals": "crystals", "residues": "proteins", "secondary": "proteins"}
Errors = dict[str, dict[str, dict[int, float]]]  # arm -> task -> seed -> test error


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    around_marks(PAGE)
    found: dict[str, Errors] = {}
    try:
        for part in PARTS:
            steps, tasks = args.steps or STEPS[part], args.tasks or TASKS[part]
            exports = {name: args.out / part / folder(name) / f"{steps}/export" for name in PARTS[part]}
            if not args.show and part in args.parts:
                pretrain(part, exports, steps)
                fine_tune(part, exports, tasks, args.seeds, args.out)
            found[part] = collect(exports, tasks, args.seeds, args.out)
    except InputError as error:
        print(f"pretraining.py: {error}", file=sys.stderr)
        return 2
    sheets = [sheet(part, errors) for part, errors in found.items() if errors]
    for one in sheets:
        one.show(Console())
    if sheets:
        where = machine({})
        RESULTS.write_text(json.dumps({"machine": where, "errors": found}, indent=1) + "\n")
        head = f"Measured on {where['date']}, commit {where['commit']}; mean and standard deviation over seeds."
        fill(PAGE, "\n\n".join([head, *(one.markdown() for one in sheets)]))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--show", action="store_true", help="tables of what is there")
    parser.add_argument("--steps", type=int, help="of the longest pretraining")
    parser.add_argument("--tasks", type=runs.words(FINE_TUNINGS))
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/pretraining", help="folder of the runs")
    args = parser.parse_args(argv)
    args.parts = args.parts or list(PARTS)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return args


def folder(name: str) -> str:
    return name.replace(" + ", "_").replace(" ", "_")


def pretrain(part: str, exports: Mapping[str, Path], steps: int) -> None:
    """Arms that are not finished, one core each; one that was stopped goes on."""

    def one(name: str) -> None:
        runs.call(name, "pretrain/train.py", *words(PARTS[part][name], steps), "--out", exports[name].parent)

    runs.side_by_side(one, [name for name, export in exports.items() if not export.exists()], "pretraining")


def words(arm: Arm, steps: int) -> list[str]:
    """Arguments of pretrain/train.py."""
    sources = [{"path": f"corpora/full/{name}", "weight": weight} for name, weight in arm.sources.items()]
    given = ["--config", str(ROOT / "pretrain/configs/released_denoising.yaml"), f"data.sources={json.dumps(sources)}"]
    if arm.objectives is not None:
        given.append(f"objectives={json.dumps(arm.objectives)}")
    return [*given, f"steps={round(steps * arm.steps)}"]


def rate_of(task: str, method: str) -> float | None:
    """That of the pilots of transfer.py."""
    return Ledger.open(TRANSFER, base_fingerprint(moiety.weights())).rate(task, method)


def jobs_of(tasks: Sequence[str], seeds: Sequence[int], method: str) -> list[Job]:
    rates = {task: rate_of(task, method) for task in tasks}
    if missing := [task for task, rate in rates.items() if rate is None]:
        raise InputError(f"no learning rate of {method} for {missing[0]}; run transfer.py --pilot --tasks {missing[0]}")
    return [Job(task, method, LABELS, seed, rates[task]) for seed in seeds for task in tasks]


def fine_tune(part: str, exports: Mapping[str, Path], tasks: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """LoRA on every arm, of a single domain on its own tasks; and from scratch, which no arm has a part in."""
    for name, export in exports.items():
        own = [task for task in tasks if part == "objectives" or AT_HOME[task] == name or name == "all"]
        runs.run(jobs_of(own, seeds, "lora"), export, export.parent / "transfer")
    runs.run(jobs_of(tasks, seeds, "scratch"), next(iter(exports.values())), out / "scratch")


def collect(exports: Mapping[str, Path], tasks: Sequence[str], seeds: Sequence[int], out: Path) -> Errors:
    """Of what is finished."""
    found: Errors = {}
    arms = {"from scratch": ("scratch", out / "scratch")}
    arms |= {name: ("lora", export.parent / "transfer") for name, export in exports.items()}
    for name, (method, where) in arms.items():
        for job in jobs_of([task for task in tasks if rate_of(task, method)], seeds, method):
            if runs.finished(job, where):
                error = runs.read(where / job.name, job.task)["results"][METHODS[method]]
                found.setdefault(name, {}).setdefault(job.task, {})[job.seed] = error
    return found


def sheet(part: str, errors: Errors) -> Sheet:
    """A row an arm; the change is that against scratch. Of domains also what the mixture keeps of a domain's gain."""
    tasks = list(dict.fromkeys(task for by_task in errors.values() for task in by_task))
    scratch = errors.get("from scratch", {})
    rows = [
        [name, *(runs.cell(by_task.get(task, {}), scratch.get(task, {})) for task in tasks)]
        for name, by_task in errors.items()
    ]
    if part == "domains":
        rows.append(["kept by all of the gain of one", *(kept(errors, task) for task in tasks)])
    title = f"{part.capitalize()}: test error after LoRA from {LABELS:,} labels (change against scratch)"
    return Sheet(title, ["pretraining", *tasks], rows)


def kept(errors: Errors, task: str) -> str:
    """(scratch - all) / (scratch - single)."""
    means: dict[str, Any] = {
        name: np.mean(list(by_task[task].values())) for name, by_task in errors.items() if task in by_task
    }
    try:
        gain, single = (means["from scratch"] - means[name] for name in ("all", AT_HOME[task]))
    except KeyError:
        return "–"
    return f"{gain / single:.0%}"


if __name__ == "__main__":
    sys.exit(main())
