"""Questions, answers and the atoms they rest on, as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from moiety.data.structure import Structure
from moiety.inference.drawing import weighed_figure
from moiety.inference.report import STYLE, figure_html, table_html
from moiety.models.asking_moiety import Answer

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>{style}</style><script>{plotly}</script></head><body><main><h1>{title}</h1>{body}</main></body></html>
"""


def write_answers(path: Path, asked: Sequence[tuple[str, Structure, Answer]]) -> None:
    """Writes a page of questions about structures.

    Args:
        path: the .html file.
        asked: question, structure, and the answer with its `node_weights`.
    """
    body = "".join(_section(*entry) for entry in asked)
    path.write_text(
        PAGE.format(title="Questions and answers", style=STYLE.read_text(), plotly=get_plotlyjs(), body=body),
        encoding="utf-8",
    )


def _section(question: str, structure: Structure, answer: Answer) -> str:
    said = answer.answer or f"no answer: {answer.reason}"
    rows = [["answer", escape(said)], ["confidence", f"{answer.confidence:.0%}"]]
    rows += [[escape(choice), f"{share:.0%}"] for choice, share in answer.choices.items()]
    rows += [[number.name, escape(str(number))] for number in answer.numbers]
    rows.append(["strangeness", f"{answer.strangeness:.0%} of known structures are less strange"])
    figure = ""
    if answer.node_weights is not None:
        caption = "Halos: how much of the answer rests on each atom or residue (gradient times what was read of it)."
        figure = figure_html(weighed_figure(structure, answer.node_weights), structure.id or "structure", caption)
    return f"<section><h2>{escape(question)}</h2>{table_html(None, rows)}{figure}</section>"
