"""The files of a run directory, as reports and tables read them. Whatever is missing yet is simply empty.

log.jsonl                training: step, loss, losses {domain: {objective: value}}, lr, structures_per_s, ... per line
events.jsonl             training: step, what was odd about it, its structures by micro-batch
config.json              training: the configuration, any nesting
run.json                 training: parameters, versions, machine, corpora {name: {domain, structures, nodes, share}}
trivial.json             describe_run: {domain: {objective: loss of a predictor that knows nothing}}
denoising_examples.json  describe_run: a list, see `moiety.inference.examples.denoising_examples`
metrics.json             fine-tuning, a list: target, metric, unit, results {method: value}; the rest is shown as is
predictions.json         the same: target, unit, split, true [n], predicted [n], metrics {name: value}, baselines, and
                         classes [names] where true and predicted are their numbers
validation.jsonl         fine-tuning: step, score of held-out structures per line

`metrics.json` and `predictions.json` are looked for in the run directory and in the directories directly below it, so a
fine-tuning that puts its `--out` inside the pretraining run appears in that run's report. Results of the same target
from several files stand in one table; method names are shown as written, "mean predictor" marks the trivial one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moiety.errors import InputError

Curve = tuple[list[int], list[float]]  # steps, values


@dataclass
class RunFiles:
    """Everything a report can draw on."""

    directory: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    trivial: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    validation: Curve = field(default_factory=lambda: ([], []))

    @classmethod
    def open(cls, directory: Path) -> RunFiles:
        """Reads what is there.

        Raises:
            InputError: no run directory, or nothing in it that a report could show, or a file that is no JSON.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such run directory; give the --out of a training script")
        files = cls(
            directory=directory,
            log=_read_log(directory / "log.jsonl"),
            events=_read_log(directory / "events.jsonl"),
            config=_read(directory / "config.json", {}),
            run=_read(directory / "run.json", {}),
            trivial=_read(directory / "trivial.json", {}),
            examples=_read(directory / "denoising_examples.json", []),
            metrics=_read_each(directory, "metrics.json"),
            predictions=_read_each(directory, "predictions.json"),
            validation=_curve(_read_log(directory / "validation.jsonl"), "score"),
        )
        if not (files.log or files.examples or files.metrics or files.predictions):
            raise InputError(
                f"{directory}: nothing to report yet (no log.jsonl, metrics.json, predictions.json or "
                "denoising_examples.json); give the --out of a training script"
            )
        return files

    def losses(self) -> dict[tuple[str, str], Curve]:
        """(domain, objective) -> its loss over the steps, in the order of appearance."""
        curves: dict[tuple[str, str], Curve] = {}
        for record in self.log:
            for domain, values in record.get("losses", {}).items():
                for objective, value in values.items():
                    steps, losses = curves.setdefault((domain, objective), ([], []))
                    steps.append(record["step"])
                    losses.append(value)
        return curves

    def series(self, name: str) -> Curve:
        """A number of the log, such as `lr`, over the steps."""
        return _curve(self.log, name)


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    records = [record for record in records if isinstance(record.get(name), int | float)]
    return [record["step"] for record in records], [float(record[name]) for record in records]


def _read(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); delete it or write it again") from error


def _read_each(directory: Path, name: str) -> list[dict[str, Any]]:
    paths = [directory / name, *sorted(directory.glob(f"*/{name}"))]
    return [{"directory": path.parent.name, **entry} for path in paths if path.exists() for entry in _read(path, [])]


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; its last line may be half written while the run goes on. A resumed step counts once."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == len(lines) and not line.endswith("\n")):
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
        if "step" in record:
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]
