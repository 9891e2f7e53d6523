"""What paired runs found, in a file of the repository: a run that is in it need not be run again, here or elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paired.runs import Job

from moiety.adapters.finetune import METHODS
from moiety.training.files import write_json

WITH_BASE = {METHODS[method] for method in METHODS if method != "scratch"}  # results that depend on the base
Errors = dict[str, dict[str, dict[str, dict[str, float]]]]


@dataclass
class Ledger:
    """Validation scores of the pilots and test errors of one base.

    Another base keeps what does not depend on it: results from scratch, and baselines.
    """

    base: str  # its fingerprint
    pilots: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # task -> arm -> rate -> score
    errors: Errors = field(default_factory=dict)  # task -> labels -> method or baseline -> seed -> error

    @classmethod
    def open(cls, path: Path, base: str) -> Ledger:
        """What the file has that holds for the base; empty where there is no file."""
        facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        ledger = cls(base, facts.get("pilots", {}), facts.get("errors", {}))
        if facts.get("base", base) != base:
            ledger.pilots = {
                task: {"scratch": arms["scratch"]} for task, arms in ledger.pilots.items() if "scratch" in arms
            }
            for by_count in ledger.errors.values():
                for by_name in by_count.values():
                    for name in WITH_BASE & set(by_name):
                        del by_name[name]
        return ledger

    def write(self, path: Path, **facts: Any) -> None:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**facts, "base": self.base, "pilots": self.pilots, "errors": self.errors})

    def has(self, job: Job) -> bool:
        return f"{job.seed}" in self.of(job).get(METHODS[job.arm], {})

    def of(self, job: Job) -> dict[str, dict[str, float]]:
        """Method or baseline -> seed -> error, from as many labels."""
        return self.errors.get(job.task, {}).get(f"{job.count}", {})

    def add(self, job: Job, entry: dict[str, Any]) -> None:
        """What the metrics of a finished run say."""
        by_count = self.errors.setdefault(job.task, {})
        by_name = by_count.setdefault(f"{job.count}", {})
        for name, error in entry["results"].items():  # every arm reports the same baselines
            by_name.setdefault(name, {})[f"{job.seed}"] = error
        self.errors[job.task] = dict(sorted(by_count.items(), key=lambda item: int(item[0])))

    def add_pilot(self, job: Job, entry: dict[str, Any]) -> None:
        """The validation score of a learning rate."""
        self.pilots.setdefault(job.task, {}).setdefault(job.arm, {})[f"{job.rate:g}"] = entry["validation"]

    def scores(self, task: str, arm: str) -> dict[float, float]:
        """Learning rate -> validation score."""
        return {float(rate): score for rate, score in self.pilots.get(task, {}).get(arm, {}).items()}

    def rate(self, task: str, arm: str) -> float | None:
        """The learning rate of the lowest validation score."""
        scores = self.scores(task, arm)
        return min(scores, key=lambda rate: scores[rate]) if scores else None
