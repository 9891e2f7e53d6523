"""What was measured, as tables for the terminal and for a page, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moiety.errors import InputError

REFERENCE = "torchmd-et"  # costs 1.00
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = "–"
Costs = Mapping[str, Mapping[str, Any]]  # model -> cost


@dataclass
class Sheet:
    """One table: its first column names the models."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", *(f"{note}  " for note in self.notes)] if self.notes else [])])

    def show(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False)


def ratio(costs: Costs, model: str, reference: str) -> float | None:
    """Of the best seconds of two models; None where one of them has none."""
    seconds = [costs.get(name, {}).get("seconds") for name in (model, reference)]
    return seconds[0] / seconds[1] if seconds[0] is not None and seconds[1] else None


def sheet(title: str, groups: Mapping[str, Costs], show: Any) -> Sheet:
    """A row a model, a column a group of costs; `show` turns (costs, model) into a cell, None where there is nothing.

    Why a cell is empty is said below the table, once for each model and reason.
    """
    models = list(dict.fromkeys(name for costs in groups.values() for name in costs))
    rows = [[name, *(show(costs, name) or NOTHING for costs in groups.values())] for name in models]
    reasons: dict[str, list[str]] = {}
    for group, costs in groups.items():
        for name, cost in costs.items():
            if "error" in cost:
                reasons.setdefault(f"{name}: {cost['error']}", []).append(group)
    return Sheet(title, ["model", *groups], rows, [f"{why} ({', '.join(at)})" for why, at in reasons.items()])


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """All tables of a run on the CPU; parts that were not measured are left out."""
    found = [_bars(results["bars"])] if results.get("bars") else []
    for key, title in (
        ("dense", "Energy, ms an atom, boxes of N atoms at 0.1 atoms/Å³ (55 neighbours)"),
        ("sparse", "Energy, ms an atom, boxes of N atoms at 0.01 atoms/Å³ (5 neighbours on the mean)"),
        ("molecules", "Direct step, ms an atom, batches of N molecules"),
    ):
        if results.get(key):
            found.append(sheet(title, {f"N = {int(n):,}": costs for n, costs in results[key].items()}, _per_atom))
    if results.get("memory"):
        groups = {f"{task}, {what}": _only(costs, what) for task, costs in results["memory"].items() for what in BYTES}
        found.append(sheet("Memory of one step, box of 2,000 atoms, GiB", groups, _gibibytes))
    if results.get("global"):
        groups = {f"{task}, N = {n}": costs for n, tasks in results["global"].items() for task, costs in tasks.items()}
        found.append(sheet("Global attention in every second block: what it adds to a step", groups, _added))
    for name, why in results.get("broken", {}).items():
        found[0].notes.append(f"{name} could not be built: {why}")
    return found


BYTES = {"beyond before": "rise", "in all": "peak"}


def _bars(bars: Mapping[str, Mapping[str, Costs]]) -> Sheet:
    groups = {f"{case}: {task}": costs for case, tasks in bars.items() for task, costs in tasks.items()}

    def show(costs: Costs, model: str) -> str | None:
        value = ratio(costs, model, REFERENCE)
        return f"{value:.2f}" if value is not None else None

    found = sheet(f"CPU seconds of the best step, {REFERENCE} = 1.00 (lower is faster)", groups, show)
    absolute = (f"{group} {costs[REFERENCE]['seconds']:.3f} s" for group, costs in groups.items() if has(costs))
    found.notes.insert(0, f"{REFERENCE}: " + ", ".join(absolute) if any(map(has, groups.values())) else _no_reference())
    return found


def has(costs: Costs) -> bool:
    return ratio(costs, REFERENCE, REFERENCE) is not None


def _no_reference() -> str:
    return f"no ratios: {REFERENCE} was not measured"


def _per_atom(costs: Costs, model: str) -> str | None:
    cost = costs.get(model, {})
    return f"{1000 * cost['seconds'] / cost['nodes']:.3g}" if "seconds" in cost else None


def _only(costs: Costs, what: str) -> Costs:
    return {name: {**cost, "bytes": cost.get(BYTES[what])} for name, cost in costs.items()}


def _gibibytes(costs: Costs, model: str) -> str | None:
    size = costs.get(model, {}).get("bytes")
    return f"{size / 2**30:.2f}" if size is not None else None


def _added(costs: Costs, model: str) -> str | None:
    cost = costs.get(model, {})
    return f"{cost['seconds'] / cost['seconds_without'] - 1:+.1%}" if cost.get("seconds_without") else None


def page(results: Mapping[str, Any]) -> str:
    """All tables as Markdown, headed by where they come from."""
    where = results["machine"]
    sizes = ", ".join(f"{name} {words['parameters']:,}" for name, words in results["models"].items())
    versions = {p: v for found in where["versions"].values() for p, v in found.items()}
    head = [
        f"Measured on {where['date']}, commit {where['commit']}, {where['cpu']} ({where['cores']} cores, one used), "
        f"Python {where['python']}; load of the machine {where['load'][0]:.1f} before, {where['load'][1]:.1f} after.",
        f"Parameters: {sizes}.",
        "Versions: " + ", ".join(f"{package} {number}" for package, number in sorted(versions.items())) + ".",
    ]
    tail = ["![Cost an atom against size](../benchmarks/results/speed_scaling.svg)"] if results.get("dense") else []
    return "\n\n".join([*head, *(found.markdown() for found in sheets(results)), *tail])


def fill(path: Path, text: str) -> None:
    """Puts the text between the marks of a page."""
    before, after = around_marks(path)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def around_marks(path: Path) -> tuple[str, str]:
    """What stands before and after the marks of a page.

    Raises:
        InputError: the page has no marks.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path}: no lines {BEGIN} and {END} to write the tables between; put them back")
    return before, after


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Cost an atom against size, dense and sparse boxes and batches, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "speed"
    from matplotlib import pyplot

    panels = [(key, name) for key, name in PANELS.items() if results.get(key)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), squeeze=False, sharey=True)
    for axis, (key, name) in zip(axes[0], panels, strict=True):
        for index, model in enumerate(results["models"]):
            points = [(int(n), costs.get(model, {})) for n, costs in results[key].items()]
            line = [(n, 1000 * cost["seconds"] / cost["nodes"]) for n, cost in points if "seconds" in cost]
            ours = model.startswith("moiety")
            axis.plot(
                *zip(*line, strict=True) if line else ([], []), marker="o", markersize=3, label=model,
                linewidth=2 if ours else 1, linestyle="-" if ours else "--", color=f"C{index}",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=name, title="direct step" if key == "molecules" else "energy")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("CPU ms / atom")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


PANELS = {"dense": "atoms, 0.1 / Å³", "sparse": "atoms, 0.01 / Å³", "molecules": "molecules in the batch"}
