"""The table at the end of a run: what was shown to the model, how far the losses fell, what transfer was worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from moiety.inference.run_files import RunFiles


def summary(files: RunFiles) -> dict[str, Any]:
    """The results of a run as one JSON-ready dictionary.

    Returns:
        structures: {domain: number of structures in the training corpora};
        losses: rows {domain, objective, first, last, trivial}; last is a mean over a few lines of the log, trivial the
        loss of a predictor that knows nothing (None where it is not known);
        targets: rows {target, metric, unit, results {method: value}}, all files of the same target together.
    """
    structures: dict[str, int] = {}
    for corpus in files.run.get("corpora", {}).values():
        structures[corpus["domain"]] = structures.get(corpus["domain"], 0) + corpus["structures"]
    return {
        "structures": structures,
        "losses": [
            {"domain": domain, "objective": objective, **_ends(values)}
            | {"trivial": files.trivial.get(domain, {}).get(objective)}
            for (domain, objective), (_, values) in files.losses().items()
        ],
        "targets": _targets(files.metrics),
    }


def print_summary(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables for a person."""
    console = console or Console()
    if results["structures"]:
        table = Table("domain", _right("structures"), title="Pretraining corpora", title_justify="left")
        for domain, count in results["structures"].items():
            table.add_row(domain, f"{count:,}")
        console.print(table)
    if results["losses"]:
        columns = ("domain", "objective", *map(_right, ("first", "last", "trivial predictor")))
        table = Table(*columns, title="Pretraining losses", title_justify="left")
        for row in results["losses"]:
            table.add_row(row["domain"], row["objective"], *(_number(row[key]) for key in ("first", "last", "trivial")))
        console.print(table)
    for target in results["targets"]:
        title = f"{target['target']}: {target['metric']} on test"
        table = Table("method", _right(target["unit"] or "value"), title=title, title_justify="left")
        for method, value in target["results"].items():
            table.add_row(method, _number(value))
        console.print(table)


def _ends(values: list[float]) -> dict[str, float]:
    """Means over the first line and over the last twentieth: the first steps fall too fast to be averaged."""
    return {"first": float(values[0]), "last": float(np.mean(values[-max(1, len(values) // 20) :]))}


def _targets(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    targets: dict[str, dict[str, Any]] = {}
    for entry in metrics:
        row = targets.setdefault(
            entry["target"],
            {"target": entry["target"], "metric": entry["metric"], "unit": entry.get("unit", ""), "results": {}},
        )
        row["results"] |= entry["results"]
    for row in targets.values():
        row["results"] = dict(sorted(row["results"].items(), key=lambda item: item[1]))
    return list(targets.values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _right(name: str) -> Column:
    return Column(name, justify="right")
