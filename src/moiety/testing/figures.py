"""What a check measured: figures with bounds, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """What was measured of one law, on one output of one structure."""

    law: str
    output: str
    structure: str
    value: float
    bound: float
    unit: str = "relative"  # of value and bound

    @property
    def ok(self) -> bool:
        return bool(self.value <= self.bound)


@dataclass
class Report:
    """All figures, and the laws that could not be checked with the reason."""

    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(figure.ok for figure in self.figures)

    def worst(self) -> list[Figure]:
        """Of every law and output the figure nearest to its bound, or furthest beyond it."""
        found: dict[tuple[str, str], Figure] = {}
        for figure in self.figures:
            key = (figure.law, figure.output)
            if key not in found or not figure.value <= found[key].value:  # a NaN is the worst
                found[key] = figure
        return list(found.values())

    def table(self) -> str:
        """One line a law and output."""
        rows = [("law", "output", "worst on", "figure", "bound", "unit", "")]
        for f in self.worst():
            rows.append(
                (f.law, f.output, f.structure, f"{f.value:.1e}", f"{f.bound:.0e}", f.unit, "ok" if f.ok else "FAILS")
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{law}: not checked, {why}" for law, why in self.left_out.items())])

    def write(self, path: str | Path) -> None:
        """All figures as JSON."""
        figures = [asdict(figure) | {"ok": figure.ok} for figure in self.figures]
        Path(path).write_text(json.dumps({"ok": self.ok, "figures": figures, "left_out": self.left_out}, indent=1))
