"""report.html: one self-contained file that shows what a run did, drawn from the files of its directory.

Sections whose files are missing are left out, so a report can be drawn while the run goes on. The formats of the files
are described in `moiety.inference.run_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moiety import __version__
from moiety.inference.drawing import PREDICTED_COLOR, RESIDUE_COLORS, TRUE_COLOR, structure_figure
from moiety.inference.report_figures import (
    DOMAIN_COLORS,
    confusion_figure,
    loss_figures,
    parity_figure,
    results_figure,
    series_figure,
    timing_figure,
)
from moiety.inference.run_files import RunFiles
from moiety.inference.summary import summary

MOST_EVENTS, MOST_IDS = 20, 6
STYLE = Path(__file__).with_name("report.css")
OBJECTIVES = {
    "coordinates": (
        "Coordinate denoising",
        "Every structure is displaced by Gaussian noise and the model says, for every atom or residue, by how much.",
    ),
    "types": (
        "Masked types",
        "Some elements and residues are hidden; the model names them from the geometry around them.",
    ),
    "cell": ("Cell denoising", "Crystals are strained; the model reads the strain off the strained structure."),
}
SERIES = {
    "lr": "learning rate",
    "structures_per_s": "structures / s",
    "nodes_per_s": "nodes / s",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True)
class Section:
    """A heading of the table of contents and the HTML below it."""

    anchor: str
    title: str
    html: str


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Draws the report of a run.

    Args:
        run_dir: the run directory, finished or not.
        out: where to write it; `report.html` in the run directory when not given.

    Returns:
        The path of the report.

    Raises:
        InputError: the directory holds nothing that could be shown.
    """
    files = RunFiles.open(run_dir)
    out = Path(out) if out is not None else files.directory / "report.html"
    sections = [section for build in SECTIONS for section in build(files)]
    contents = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{s.html}</section>' for s in sections)
    name = escape(files.directory.resolve().name)
    out.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>moiety: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><header><p class=brand>moiety {__version__}</p>"
        f"<h1>Run {name}</h1><p class=date>drawn {datetime.now():%d %B %Y, %H:%M}</p>{_cards(files)}"
        f"<nav>{contents}</nav></header><main>{body}</main></body></html>",
        encoding="utf-8",
    )
    return out


def _cards(files: RunFiles) -> str:
    """The figures that one wants first."""
    cards: list[tuple[str, str]] = []
    if "parameters" in files.run:
        cards.append((_short(files.run["parameters"]), "parameters"))
    if structures := sum(summary(files)["structures"].values()):
        cards.append((f"{structures:,}", "structures to learn from"))
    if files.log:
        last = files.log[-1]
        cards.append((f"{last['step']:,}", "optimizer steps"))
        if "elapsed_s" in last:
            cards.append((_duration(last["elapsed_s"]), "of training"))
    for target in summary(files)["targets"]:
        method, value = next(iter(target["results"].items()))
        cards.append((f"{value:.3g} {target['unit']}", f"{target['target']} {target['metric']}, {method}"))
    return (
        "<div class=cards>"
        + "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in cards)
        + "</div>"
    )


def _results(files: RunFiles) -> Iterator[Section]:
    results = summary(files)
    parts = []
    if results["losses"]:
        rows = [
            [
                _domain(row["domain"]),
                escape(OBJECTIVES.get(row["objective"], (row["objective"],))[0]),
                *(_number(row[key]) for key in ("first", "last", "trivial")),
                _gain(row["last"], row["trivial"]),
            ]
            for row in results["losses"]
        ]
        parts.append(
            table_html(["domain", "objective", "first loss", "last loss", "trivial predictor", "below trivial"], rows)
        )
        parts.append(
            "<p class=caption>The trivial predictor looks at nothing: it answers zero noise, zero strain, and for "
            "hidden types the frequencies of the corpus. First: the first line of the log. Last: mean over its last "
            "twentieth.</p>"
        )
    if parts:
        yield Section("results", "What was learnt", "".join(parts))


def _losses(files: RunFiles) -> Iterator[Section]:
    parts = []
    for objective, figure in loss_figures(files).items():
        title, text = OBJECTIVES.get(objective, (objective, ""))
        parts.append(
            figure_html(figure, title, f"{text} Faint: as logged. Bold: running mean. Dotted: the trivial predictor.")
        )
    if files.validation[0]:
        lowest = min(files.validation[1])
        text = f"Of held-out structures, at every checkpoint; lowest {lowest:.3g}: those weights were taken."
        parts.append(figure_html(series_figure(files.validation, "validation score"), "Validation", text))
    if parts:
        yield Section("losses", "Loss by domain and objective", "".join(parts))


def _structures(files: RunFiles) -> Iterator[Section]:
    if not files.examples:
        return
    columns = 2 if len(files.examples) in (2, 4) else 3
    parts = [
        "<p>Each structure is drawn as the model saw it, displaced by noise. Arrows point back to where every atom or "
        f"residue came from: {_swatch(TRUE_COLOR)} the truth, {_swatch(PREDICTED_COLOR)} what the model says. "
        f'Drag to turn, scroll to zoom.</p><div class="grid columns-{columns} scenes">'
    ]
    for example in files.examples:
        figure, factor = structure_figure(example)
        beads = "".join(f" {_swatch(color)} {kind}" for kind, (color, _) in RESIDUE_COLORS.items())
        legend = f"<br>Tube: CA trace; beads:{beads}." if example["domain"] == "protein" else ""
        legend += "<br>Thin lines: the unit cell." if example["cell"] is not None else ""
        caption = (
            f"{escape(example['id'])}: {len(example['node_type'])} nodes. Noise σ = {example['sigma']:.2g} Å, arrows "
            f"{factor:.0f} times as long as the displacements. Error {example['error']:.2f} σ² (predicting nothing: "
            f"1).{legend}"
        )
        parts.append(figure_html(figure, example["domain"].capitalize(), caption, html_caption=True))
    yield Section("structures", "Denoising, seen", "".join(parts) + "</div>")


def _transfer(files: RunFiles) -> Iterator[Section]:
    pictures = []
    for target in summary(files)["targets"]:
        name = f"{target['target']}: {target['metric']} on the test set"
        pictures.append(figure_html(results_figure(target), name, "The same test set for every method."))
    for prediction in files.predictions:
        metrics = ", ".join(f"{name} {value:.3g}" for name, value in prediction.get("metrics", {}).items())
        baselines = "".join(f"; {name} {value:.3g}" for name, value in prediction.get("baselines", {}).items())
        count = f"{len(prediction['true']):,} values of the {prediction.get('split', 'test')} set"
        title = f"{prediction['target']}, {prediction.get('method', prediction['directory'])}"
        figure = confusion_figure(prediction) if prediction.get("classes") else parity_figure(prediction)
        pictures.append(figure_html(figure, title, f"{count}. {metrics}{baselines}."))
    if pictures:
        yield Section("transfer", "Transfer to labelled properties", f"<div class=grid>{''.join(pictures)}</div>")


def _speed(files: RunFiles) -> Iterator[Section]:
    parts = []
    for name, title in SERIES.items():
        curve = files.series(name)
        if curve[0]:
            parts.append(figure_html(series_figure(curve, title), title.capitalize(), ""))
    if parts:
        parts = [f"<div class=grid>{''.join(parts)}</div>"]
    if shares := time_shares(files):
        parts.append(figure_html(timing_figure(shares), "Where the time of a step goes", "Mean over the run, rank 0."))
    if parts:
        yield Section("speed", "Speed", "".join(parts))


def _events(files: RunFiles) -> Iterator[Section]:
    """Steps that were not applied, and loss spikes: the last of them."""
    rows = []
    for event in files.events[-MOST_EVENTS:]:
        ids = [name for names in event["micro_batches"].values() for name in names]
        more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
        rows.append([f"{event['step']:,}", escape(event["what"]), escape(", ".join(ids[:MOST_IDS])) + more])
    if rows:
        note = f"<p>{len(files.events)} in all, see events.jsonl; the last {len(rows)}:</p>"
        yield Section("events", "Odd steps", note + table_html(["step", "what", "structures"], rows, text=(1, 2)))


def time_shares(files: RunFiles) -> dict[str, float]:
    """Mean share of each part of a step, from the `time` of the log records."""
    totals: dict[str, float] = {}
    for record in files.log:
        for part, share in record.get("time", {}).items():
            totals[part] = totals.get(part, 0.0) + share
    return {part: total / sum(totals.values()) for part, total in totals.items()}


def _facts(files: RunFiles) -> Iterator[Section]:
    parts = []
    if corpora := files.run.get("corpora"):
        header = ["corpus", "domain", "structures", "nodes", "share of the micro-batches"]
        rows = [
            [escape(name), _domain(c["domain"]), f"{c['structures']:,}", f"{c['nodes']:,}", f"{100 * c['share']:.0f} %"]
            for name, c in corpora.items()
        ]
        parts.append("<h3>Corpora</h3>" + table_html(header, rows))
    tables = {"Sizes and versions": {key: value for key, value in files.run.items() if key != "corpora"}}
    for metrics in files.metrics:
        hidden = ("results", "unit", "metric", "directory")
        tables[f"Fine-tuning in {metrics['directory']}"] = {k: v for k, v in metrics.items() if k not in hidden}
    for title, facts in tables.items():
        if facts:
            parts.append(f"<h3>{escape(title)}</h3>" + table_html(None, [list(row) for row in _flat(facts)]))
    if files.config:
        table = table_html(None, [list(row) for row in _flat(files.config)])
        parts.append(f"<details><summary>Configuration</summary>{table}</details>")
    if parts:
        yield Section("facts", "Data, sizes, versions", "".join(parts))


SECTIONS: tuple[Callable[[RunFiles], Iterator[Section]], ...] = (
    _results,
    _structures,
    _transfer,
    _losses,
    _speed,
    _events,
    _facts,
)


def figure_html(figure: go.Figure, title: str, caption: str, html_caption: bool = False) -> str:
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    caption = caption if html_caption else escape(caption)
    return f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{caption}</figcaption></figure>"


def table_html(header: list[str] | None, rows: list[list[str]], text: tuple[int, ...] = (0, 1)) -> str:
    """An HTML table; columns that are not in `text` hold numbers and are set flush right."""

    def cells(row: list[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if i in text else ' class=n'}>{cell}</{tag}>" for i, cell in enumerate(row))

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as escaped (name, value) rows."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _flat({str(number): item for number, item in enumerate(value, start=1)}, f"{prefix}{key} ")
        else:
            shown = (
                f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            )
            yield escape(f"{prefix}{key}".replace("_", " ")), escape(shown)


def _domain(name: str) -> str:
    return f"{_swatch(DOMAIN_COLORS.get(name, '#6f6e68'))} {escape(name)}"


def _swatch(color: str) -> str:
    return f'<i class=swatch style="background:{color}"></i>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _gain(last: float, trivial: float | None) -> str:
    return "–" if not trivial else f"{100 * (1 - last / trivial):.0f} %"


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
