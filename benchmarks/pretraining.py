"""Which pretraining pays: objectives at equal FLOPs, and several domains against one at equal exposure.

    make pretraining-choices                                   all parts: hours on two cores
    python benchmarks/pretraining.py objectives [--tasks dipole,forces] [--seeds 0,1,2] [--arms "coordinates"]
    python benchmarks/pretraining.py domains                   denoising alone, the first part of the released recipe
    python benchmarks/pretraining.py labelled_domains          with labels of teachers beside, its last part
    python benchmarks/pretraining.py --show                    what is there by now; runs nothing

Every arm is a `pretrain/train.py` of the released denoising recipe with other objectives or sources, on one core, and
then LoRA from 1,000 labels of each task as in transfer.py, beside its runs from scratch. An arm has, task by task, the
one of two learning rates that is better on validation (seed 0): a head that starts as the base's own may want a lower
one than a new head. What is finished, or stands in benchmarks/results/pretraining.json, is not run again. Objectives
have the same FLOPs: a step with a second forward pass counts as 4/3, so that arm has 3/4 of the steps. Domains have the
same exposure: a single one has as many steps as the mixture spent on it, on a schedule of its own. Writes that file and
the tables of docs/pretraining.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
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
from moiety.data.build import load_recipe
from moiety.errors import InputError
from moiety.training.files import write_json

PAGE = ROOT / "docs/pretraining.md"
RESULTS = ROOT / "benchmarks/results/pretraining.json"
CONFIGS = ROOT / "pretrain/configs"
TRANSFER = ROOT / "benchmarks/results/transfer.json"
LABELS = 1000
LORA = METHODS["lora"]
RATES = (1e-3, 5e-3)  # of LoRA
TYPES = {"types": {"weight": 0.2}}
SIGMA = {"sigma_min": 0.02, "sigma_max": 0.25}
FIRST, LAST = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("released_denoising", "released"))
DOMAINS = {"molecules": ("qm9", "ccd", "gfn1"), "crystals": ("crystals", "r2scan"), "proteins": ("proteins",)}


@dataclass(frozen=True)
class Arm:
    """One pretraining."""

    objectives: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, float]
    steps: float = 1.0  # share of the part's
    supervised: Mapping[str, float] = field(default_factory=dict)  # sources of the labels of released.yaml's tasks


def of_domains(recipe: Mapping[str, Any]) -> dict[str, Arm]:
    """The mixture of a part of the released recipe, and each of its domains for as long as the mixture spent on it."""
    sources = {Path(source["path"]).name: source for source in recipe["data"]["sources"]}

    def arm(*corpora: str) -> Arm:
        labels = {
            name: source["weight"] for name, source in sources.items() if name in corpora and "supervised" in source
        }
        others = {name: source["weight"] for name, source in sources.items() if name in corpora and name not in labels}
        share = sum([*others.values(), *labels.values()]) / sum(source["weight"] for source in sources.values())
        return Arm(recipe["objectives"], others, share, labels)

    return {"all": arm(*sum(DOMAINS.values(), ()))} | {name: arm(*corpora) for name, corpora in DOMAINS.items()}


WITH_FORCES = {"qm9": 3.0, "forces": 1.0}
PARTS: dict[str, dict[str, Arm]] = {
    "objectives": {
        "coordinates": Arm({"coordinates": SIGMA}, WITH_FORCES),
        "coordinates + types": Arm({"coordinates": SIGMA, **TYPES}, WITH_FORCES),
        "self-conditioned + types": Arm({"self_conditioned": SIGMA, **TYPES}, WITH_FORCES, 3 / 4),
        "blocks + types": Arm({"blocks": SIGMA, **TYPES}, WITH_FORCES),
        "DeNS + types": Arm({"dens": SIGMA, **TYPES}, WITH_FORCES),
        "coordinates + types + labels": Arm({"coordinates": SIGMA, **TYPES}, {"qm9": 2.0}, supervised={"gfn1": 2.0}),
    },
    "domains": of_domains(FIRST),
    "labelled_domains": of_domains(LAST),
}
STEPS = {"objectives": 3000, "domains": 6000, "labelled_domains": 6000}
ONE_OF_EACH = ["dipole", "crystals", "residues"]
TASKS = {"objectives": ["dipole", "forces"], "domains": ONE_OF_EACH, "labelled_domains": ONE_OF_EACH}
AT_HOME = {"dipole": "molecules", "crystals": "crystals", "residues": "proteins", "secondary": "proteins"}
Errors = dict[str, dict[str, dict[str, float]]]  # arm -> task -> seed -> test error


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    around_marks(PAGE)
    found = {part: adaptations(part, args) for part in PARTS}
    try:
        for part, arms in found.items():
            for arm in arms.values():
                arm.collect()
            if not args.show and part in args.parts:
                chosen = {name: arm for name, arm in arms.items() if name in (args.arms or arms) and arm.waiting()}
                pretrain(part, {name: arm.export for name, arm in chosen.items()})
                adapt(list(chosen.values()))
    except InputError as error:
        print(f"pretraining.py: {error}", file=sys.stderr)
        return 2
    errors = {part: {name: arm.errors for name, arm in arms.items()} for part, arms in found.items()}
    sheets = [sheet(part, by_arm) for part, by_arm in errors.items() if any(by_arm.values())]
    for one in sheets:
        one.show(Console())
    if sheets:
        where = machine({})
        parts = {part: {name: vars(arm.ledger) for name, arm in arms.items()} for part, arms in found.items()}
        write_json(RESULTS, {"machine": where, "parts": parts})
        head = f"Measured on {where['date']}, commit {where['commit']}; mean and standard deviation over seeds."
        fill(PAGE, "\n\n".join([head, *(one.markdown() for one in sheets)]))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--show", action="store_true", help="tables of what is there")
    parser.add_argument("--arms", type=runs.words({name for arms in PARTS.values() for name in arms}))
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


def pretrain(part: str, exports: Mapping[str, Path]) -> None:
    """Arms that are not finished, one core each; one that was stopped goes on."""

    def one(name: str) -> None:
        runs.call(name, "pretrain/train.py", *words(PARTS[part][name], STEPS[part]), "--out", exports[name].parent)

    runs.side_by_side(one, [name for name, export in exports.items() if not export.exists()], "pretraining")


def words(arm: Arm, steps: int) -> list[str]:
    """Arguments of pretrain/train.py."""
    sources = [{"path": f"corpora/full/{name}", "weight": weight} for name, weight in arm.sources.items()]
    sources += [
        {"path": f"corpora/full/{name}", "weight": weight, "supervised": True}
        for name, weight in arm.supervised.items()
    ]
    given = ["--config", str(CONFIGS / "released_denoising.yaml"), f"data.sources={json.dumps(sources)}"]
    given.append(f"objectives={json.dumps(arm.objectives)}")
    if arm.supervised:
        given.append(f"tasks={json.dumps(tasks_of(arm.supervised))}")
    return [*given, f"steps={round(steps * arm.steps)}"]


def tasks_of(corpora: Iterable[str]) -> list[dict[str, Any]]:
    """Those of the released recipe that the corpora have labels for."""
    labels = {label for name in corpora for label in load_recipe(name).units}
    return [task for task in LAST["tasks"] if task["label"] in labels]


@dataclass(frozen=True)
class Adaptation:
    """LoRA on what an arm has pretrained."""

    ledger: Ledger
    tasks: Sequence[str]
    seeds: Sequence[int]
    export: Path

    @property
    def where(self) -> Path:
        """The folder of the runs."""
        return self.export.parent / "transfer"

    def waiting(self) -> list[Job]:
        """What can be run next: learning rates that a task has not tried, then what it lacks at the better one."""
        jobs = []
        for task in self.tasks:
            untried = [rate for rate in RATES if rate not in self.ledger.scores(task, "lora")]
            jobs += [Job(task, "lora", LABELS, 0, rate) for rate in untried]
            if not untried and (best := self.ledger.rate(task, "lora")):
                wanted = [Job(task, "lora", LABELS, seed, best) for seed in self.seeds]
                jobs += [job for job in wanted if not self.ledger.has(job)]
        return jobs

    def collect(self) -> None:
        """What is finished, into the ledger."""
        while done := [job for job in self.waiting() if runs.finished(job, self.where)]:
            for job in done:
                entry = runs.read(self.where / job.name, job.task)
                if job.rate in self.ledger.scores(job.task, "lora"):
                    self.ledger.add(job, {"results": {LORA: entry["results"][LORA]}})
                else:
                    self.ledger.add_pilot(job, entry)
                    if self.ledger.rate(job.task, "lora") == job.rate:
                        self.ledger.errors.pop(job.task, None)  # those of a rate that is not the better one now

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """Task -> seed -> test error."""
        return {task: by_count[f"{LABELS}"][LORA] for task, by_count in self.ledger.errors.items()}


def adapt(arms: Sequence[Adaptation]) -> None:
    """Until nothing is waiting, one core a run."""

    def one(work: tuple[Job, Adaptation]) -> None:
        runs.finetune(work[0], work[1].export, work[1].where)

    while work := [(job, arm) for arm in arms for job in arm.waiting()]:
        runs.side_by_side(one, work, "fine-tuning")
        for arm in arms:
            arm.collect()


def adaptations(part: str, args: argparse.Namespace) -> dict[str, Adaptation]:
    """Arm -> what is known of it by now; a single domain has its own tasks."""
    known = json.loads(RESULTS.read_text())["parts"].get(part, {}) if RESULTS.exists() else {}
    tasks = args.tasks or TASKS[part]
    return {
        name: Adaptation(
            Ledger(**known.get(name, {"base": name})),
            [task for task in tasks if part == "objectives" or name in ("all", AT_HOME[task])],
            args.seeds,
            args.out / part / folder(name) / "export",
        )
        for name in PARTS[part]
    }


def transfer() -> Ledger:
    """What transfer.py measured: the runs from scratch."""
    return Ledger.open(TRANSFER, base_fingerprint(moiety.weights()))


def sheet(part: str, errors: Errors) -> Sheet:
    """A row an arm; the change is that against scratch. Of domains also what the mixture keeps of a domain's gain."""
    tasks = list(dict.fromkeys(task for by_task in errors.values() for task in by_task))
    measured = transfer().errors
    scratch = {task: measured.get(task, {}).get(f"{LABELS}", {}).get(METHODS["scratch"], {}) for task in tasks}
    errors = {METHODS["scratch"]: scratch} | {name: by_task for name, by_task in errors.items() if by_task}
    rows = [
        [name, *(runs.cell(by_task.get(task, {}), scratch.get(task, {})) for task in tasks)]
        for name, by_task in errors.items()
    ]
    if part != "objectives":
        rows.append(["kept by all of the gain of one", *(kept(errors, task) for task in tasks)])
    title = (
        f"{part.replace('_', ' ').capitalize()}: test error after LoRA from {LABELS:,} labels (change against scratch)"
    )
    return Sheet(title, ["pretraining", *(f"{task}, {FINE_TUNINGS[task].measure}" for task in tasks)], rows)


def kept(errors: Errors, task: str) -> str:
    """(scratch - all) / (scratch - single), where that is a gain."""
    means: dict[str, Any] = {
        name: np.mean(list(by_task[task].values())) for name, by_task in errors.items() if by_task.get(task)
    }
    try:
        gain, single = (means["from scratch"] - means[name] for name in ("all", AT_HOME[task]))
    except KeyError:
        return "–"
    return f"{gain / single:.0%}" if single > 0 else "one gains nothing"


if __name__ == "__main__":
    sys.exit(main())
