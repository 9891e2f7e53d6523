"""The plots of a report: one look, units on every axis, colours that follow the domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from moiety.inference.run_files import Curve, RunFiles

DOMAIN_COLORS = {
    "molecule": "#2a78d6",
    "crystal": "#1baf7a",
    "protein": "#eb6834",
    "surface": "#eda100",
    "complex": "#4a3aa7",
    "field": "#e87ba4",
}
LOSS_UNITS = {
    "coordinates": "mean squared error / σ²",
    "cell": "mean squared error / σ²",
    "types": "cross-entropy / nats",
}
INK, MUTED, GRID = "#1f1f1d", "#6f6e68", "#e6e5df"
POINT_COLOR = "#2a78d6"


def loss_figures(files: RunFiles) -> dict[str, go.Figure]:
    """Objective -> its loss per domain over the steps: faint as logged, bold smoothed, dotted the trivial predictor."""
    figures: dict[str, go.Figure] = {}
    for (domain, objective), curve in files.losses().items():
        figure = figures.setdefault(objective, base_figure("step", LOSS_UNITS.get(objective, "loss")))
        add_curve(figure, curve, domain, DOMAIN_COLORS.get(domain, MUTED))
        trivial = files.trivial.get(domain, {}).get(objective)
        if trivial is not None:
            figure.add_trace(
                go.Scatter(
                    x=[curve[0][0], curve[0][-1]], y=[trivial, trivial], mode="lines", showlegend=False, name=domain,
                    line={"color": DOMAIN_COLORS.get(domain, MUTED), "width": 1.5, "dash": "dot"},
                    hovertemplate=f"{domain}, trivial predictor: {trivial:.3f}<extra></extra>",
                )
            )  # fmt: skip
    for figure in figures.values():
        figure.update_yaxes(rangemode="tozero")
    return figures


def series_figure(curve: Curve, title: str, color: str = POINT_COLOR) -> go.Figure:
    """One number of the log over the steps."""
    figure = base_figure("step", title, height=230)
    add_curve(figure, curve, title, color)
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return figure


def timing_figure(shares: dict[str, float]) -> go.Figure:
    """Where the time of a step goes: {part: share}, as one bar."""
    colors = [*DOMAIN_COLORS.values()]
    figure = base_figure("share of a step / %", "", height=140)
    for index, (part, share) in enumerate(shares.items()):
        figure.add_trace(
            go.Bar(
                x=[100 * share], y=[""], orientation="h", name=f"{part} {100 * share:.0f} %",
                marker={"color": colors[index % len(colors)], "line": {"color": "white", "width": 2}},
                hovertemplate=f"{part}: {100 * share:.1f} %<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.1, legend={"traceorder": "normal", "y": 1.15})
    figure.update_xaxes(range=[0, 100])
    return figure


def parity_figure(prediction: dict[str, Any]) -> go.Figure:
    """Predicted against true values, and the line on which they agree."""
    true = np.asarray(prediction["true"], dtype=np.float32)
    predicted = np.asarray(prediction["predicted"], dtype=np.float32)
    unit = f" / {prediction['unit']}" if prediction.get("unit") else ""
    figure = base_figure(f"true {prediction['target']}{unit}", f"predicted {prediction['target']}{unit}", height=400)
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    margin = 0.03 * (high - low or 1.0)
    ends = [low - margin, high + margin]
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line={"color": MUTED, "width": 1}, hoverinfo="skip"))
    figure.add_trace(
        go.Scattergl(
            x=true, y=predicted, mode="markers", marker={"size": 4, "color": POINT_COLOR, "opacity": 0.3},
            hovertemplate="true %{x:.3f}, predicted %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(showlegend=False)
    figure.update_xaxes(range=ends, showgrid=True)
    figure.update_yaxes(range=ends, scaleanchor="x", constrain="domain")
    return figure


def confusion_figure(prediction: dict[str, Any]) -> go.Figure:
    """Of every true class, the share that each class was predicted for."""
    names = prediction["classes"]
    true, predicted = (np.asarray(prediction[key], dtype=np.int64) for key in ("true", "predicted"))
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (true, predicted), 1)
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = base_figure(f"predicted {prediction['target']}", f"true {prediction['target']}", height=420)
    figure.add_trace(
        go.Heatmap(
            x=names, y=names, z=share, zmin=0, zmax=1, colorscale=[[0, "white"], [1, POINT_COLOR]], showscale=False,
            text=[[f"{value:.0%}" if value >= 0.005 else "" for value in row] for row in share],
            texttemplate="%{text}" if len(names) <= 10 else "",
            hovertemplate="true %{y}, predicted %{x}: %{z:.1%}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def results_figure(target: dict[str, Any]) -> go.Figure:
    """The error of every method on the same test set, best first, as bars."""
    names, values = list(target["results"])[::-1], list(target["results"].values())[::-1]
    best = min(values)
    unit = f" / {target['unit']}" if target["unit"] else ""
    figure = base_figure(f"{target['metric']}{unit} (lower is better)", "", height=130 + 54 * len(names))
    figure.add_trace(
        go.Bar(
            x=values, y=names, orientation="h", text=[f"{value:.3g}" for value in values], textposition="outside",
            marker={"color": [POINT_COLOR if value == best else "#b9c7dc" for value in values]}, cliponaxis=False,
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(showlegend=False, bargap=0.4)
    figure.update_xaxes(rangemode="tozero", range=[0, 1.15 * max(values)], showgrid=True)
    figure.update_yaxes(showgrid=False, automargin=True, ticksuffix="  ")
    return figure


def base_figure(x_title: str, y_title: str, height: int = 330) -> go.Figure:
    """An empty figure in the look of the report."""
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 16, "t": 28, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": None},
        hoverlabel={"bgcolor": "white"},
    )
    axis = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "tickfont": {"color": MUTED}}
    figure.update_xaxes(title=x_title, showgrid=False, showline=True, **axis)
    figure.update_yaxes(title=y_title, **axis)
    return figure


def add_curve(figure: go.Figure, curve: Curve, name: str, color: str) -> None:
    """A curve as logged (faint) and its running mean (bold)."""
    steps, values = curve
    hover = f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>"
    common = {"x": steps, "mode": "lines", "name": name, "hovertemplate": hover}
    if len(values) > 20:
        figure.add_trace(
            go.Scatter(y=values, line={"color": color, "width": 1}, opacity=0.22, showlegend=False, **common)
        )
        values = running_mean(values)
    figure.add_trace(go.Scatter(y=values, line={"color": color, "width": 2.2}, showlegend=True, **common))


def running_mean(values: list[float]) -> list[float]:
    """Centred mean over about a thirtieth of the curve, one-sided at the ends."""
    half = max(1, len(values) // 60)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return ((total[last] - total[first]) / (last - first)).tolist()
