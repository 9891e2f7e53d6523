"""Fine-tuning runs that are compared: which tasks, with which words, where their results stand."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired.teacher_baseline import CRYSTAL_ENERGY, DIPOLE, ENERGY, FORCES, GAP, TeacherBaseline
from peers.crew import ROOT
from peers.progress import tracked

from moiety.adapters.own import steps_for
from moiety.errors import InputError

PILOT = 1000  # labels
NUM_VAL = 500


@dataclass(frozen=True)
class Task:
    """A recipe, which of its targets counts, and from how many labels it is learned."""

    recipe: str
    target: str
    measure: str  # of the error
    counts: tuple[int, ...]
    changes: tuple[str, ...] = ()
    of_many: tuple[str, ...] = ()  # changes, too, from more labels than the pilots have
    smiles: bool = False  # its structures have them
    teacher: TeacherBaseline | None = None  # what a teacher of pretraining says of it


QM9 = ("corpus=corpora/full/qm9",)  # its val split has 10,000, of which pretraining saw none
LARGE = ("node_budget=160",)  # two of the 4,000 crystals have as many nodes
TASKS = {
    "dipole": Task("qm9_dipole", "dipole", "MAE, D", (100, 1000, 9000), QM9, smiles=True, teacher=DIPOLE),
    "u0": Task("qm9_u0", "u0", "MAE, eV", (100, 1000, 9000), QM9, smiles=True, teacher=ENERGY),
    "gap": Task("qm9_gap", "gap", "MAE, eV", (100, 1000, 9000), QM9, smiles=True, teacher=GAP),
    "forces": Task("forces_conservative", "forces", "MAE, eV/Å", (100, 1000, 2000), ("num_val=300",), teacher=FORCES),
    "crystals": Task(
        "crystals_energy", "energy", "MAE, eV/atom", (100, 1000, 4000), ("num_val=200",), LARGE, teacher=CRYSTAL_ENERGY
    ),
    "residues": Task("proteins_residues", "residue", "% wrong", (100, 1000, 10000), ("num_val=200",)),
    "secondary": Task("proteins_secondary", "secondary_structure", "% wrong", (100, 1000, 10000), ("num_val=200",)),
}


@dataclass(frozen=True)
class Job:
    """One fine-tuning."""

    task: str
    arm: str
    count: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-{self.count}-{self.seed}-{self.rate:g}"

    @property
    def draw(self) -> str:
        """Where stands what needs no network and is not in every run's metrics, from the same labels."""
        return f"{self.task}-others-{self.count}-{self.seed}.json"

    def words(self, model: str) -> list[str]:
        """Arguments of finetune/lora.py."""
        task = TASKS[self.task]
        steps = steps_for(self.count)
        words = [f"num_val={NUM_VAL}", *task.changes, f"model={model}", f"method={self.arm}", f"num_train={self.count}"]
        words += [f"steps={steps}", f"checkpoint_every={steps // 6}", "patience=6", f"lr={self.rate:g}"]
        words += task.of_many if self.count > PILOT else ()
        words += [f"training.seed={self.seed}", f"data.seed={self.seed}"]
        return ["--config", str(ROOT / f"finetune/configs/{task.recipe}.yaml"), *words]


def words(known: Iterable[str]) -> Any:
    """A reader of words between commas."""

    def read(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return text.split(",")

    return read


def run(jobs: Sequence[Job], model: Path, out: Path) -> None:
    """Those that are not finished, one core each."""
    waiting = [job for job in jobs if not finished(job, out)]
    side_by_side(lambda job: finetune(job, model, out), waiting, "fine-tuning")


def finetune(job: Job, model: Path, out: Path) -> None:
    call(job.name, "finetune/lora.py", *job.words(str(model)), "--out", out / job.name)


def side_by_side(work: Callable[[Any], None], items: Sequence[Any], what: str) -> None:
    """As many at a time as there are cores, with a bar."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in tracked(pool.map(work, items), what, len(items)):
            pass


def call(name: str, script: str, *words: str | Path, ranks: int = 1) -> None:
    """A script of the project, on one core, or on a few with a rank each.

    Raises:
        InputError: it failed; with its last words.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", str(ranks)]
    start = launcher if ranks > 1 else [sys.executable]
    done = subprocess.run([*start, ROOT / script, *words], env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name}: exit {done.returncode}\n{done.stderr[-2000:]}")


def finished(job: Job, out: Path) -> bool:
    return (out / job.name / "metrics.json").exists()


def read(folder: Path, task: str) -> dict[str, Any]:
    """The entry of metrics.json that counts."""
    entries = json.loads((folder / "metrics.json").read_text())
    return next(entry for entry in entries if entry["target"] == TASKS[task].target)


def cell(by_seed: Mapping[Any, float], scratch: Mapping[Any, float]) -> str:
    """Mean ± standard deviation, and the change against scratch over the seeds that both have."""
    if not by_seed:
        return "–"
    values = list(by_seed.values())
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 and np.ptp(values) > 1e-9 * max(values) else ""
    both = sorted(by_seed.keys() & scratch.keys())
    ratio = np.mean([by_seed[seed] for seed in both]) / np.mean([scratch[seed] for seed in both]) if both else 1.0
    change = f"{ratio - 1:+.0%}" if ratio < 10 else f"{ratio:,.0f} times"
    return f"{np.mean(values):.4g}{spread}" + (f" ({change})" if both and by_seed is not scratch else "")
