"""The command `moiety`: exit 0 done, 2 bad input or usage, 1 failure; results on stdout, everything else on stderr.

A command imports what it needs when it runs, so that `moiety --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core
import typer.main

from moiety import __version__, weights
from moiety.errors import InputError

GROUPS = {"data": "moiety.data.cli"}  # subcommand -> module whose `app` holds it, imported on use


QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # unless the user sets them


class Commands(typer.core.TyperGroup):
    """The top-level commands, plus the groups that other modules own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*GROUPS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in GROUPS:
            return super().get_command(ctx, cmd_name)
        command = typer.main.get_command(importlib.import_module(GROUPS[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Commands,
    help="Foundation models of matter: corpora, predictions, embeddings, reports.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Files = Annotated[list[Path], typer.Argument(help="Structure files, or folders of them.")]
OURS = weights()
ModelDir = Annotated[
    Path,
    typer.Option("--model", help="Directory of an exported model; else the one of the package.", show_default=False),
]
BatchNodes = Annotated[int, typer.Option(min=1, help="Nodes (atoms, residues) a batch may hold.")]
AllAtom = Annotated[bool, typer.Option(help="Read proteins atom by atom instead of residue by residue.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def note(message: str) -> None:
    """Says something to the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moiety {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def predict(
    files: Files,
    model: ModelDir = OURS,
    adapter: Annotated[Path | None, typer.Option(help="peft directory of a fine-tuned adapter.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the lines here (.jsonl) instead of to stdout.")] = None,
    batch_nodes: BatchNodes = 2048,
    all_atom: AllAtom = False,
    as_json: AsJson = False,
) -> None:
    """Predict properties: one JSON line per structure, in order; exit 2 if any of them was broken."""
    from moiety.inference.predict import load_predictor, predict_files

    predictor = load_predictor(model, adapter)
    counts = {"ok": 0, "broken": 0}
    lines = []
    sink = out.open("w", encoding="utf-8") if out else None
    try:
        for line in predict_files(predictor, files, batch_nodes, all_atom):
            counts["ok" if line["ok"] else "broken"] += 1
            if sink:
                sink.write(json.dumps(line) + "\n")
            elif as_json:
                lines.append(line)
            else:
                print(json.dumps(line), flush=True)
    finally:
        if sink:
            sink.close()
    if as_json:
        print(json.dumps({**counts, **({"out": str(out)} if out else {"predictions": lines})}))
    where = f", written to {out}" if out else ""
    note(f"{counts['ok']} structures predicted, {counts['broken']} broken{where}")
    if counts["broken"]:
        raise typer.Exit(2)


@app.command()
def finetune(
    data: Annotated[Path, typer.Option(help="A file (.extxyz, .sdf, .csv with SMILES, ...) or a folder of them.")],
    target: Annotated[str, typer.Option(help="The label to learn; energy takes forces and stress along.")],
    out: Annotated[Path, typer.Option(help="Run directory: data, adapter, metrics, report.html.")],
    model: ModelDir = OURS,
    kind: Annotated[str, typer.Option(help="How it is read off the nodes; default: found from the labels.")] = "",
    unit: Annotated[str, typer.Option(help="Unit of the label; default: what the data says.")] = "",
    method: Annotated[str, typer.Option(help="lora, rslora, dora, ia3, full, head or scratch.")] = "lora",
    all_atom: AllAtom = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a model to your own labels: splits, plans, trains, tests beside baselines, and draws a report."""
    from moiety.adapters.own import finetune_own

    options = {"kind": kind, "unit": unit, "method": method, "all_atom": all_atom, "fresh": fresh}
    metrics = finetune_own(data, target, model, out, **options)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"out": str(out), "metrics": metrics}))
    for entry in metrics:
        low, high = entry["interval"]
        for name, value in entry["results"].items():
            note(f"{entry['target']} {entry['metric']} {value:.4g} {entry['unit']}  {name}")
        note(f"  95 % interval: {low:.4g} to {high:.4g} {entry['unit']}, {entry['num_test']} test structures")
    note(f"report: {out / 'report.html'}")


@app.command()
def embed(
    files: Files,
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    model: ModelDir = OURS,
    level: Annotated[
        Literal["graph", "node"], typer.Option(help="graph: one vector a structure; node: features of every node.")
    ] = "graph",
    batch_nodes: BatchNodes = 2048,
    all_atom: AllAtom = False,
    as_json: AsJson = False,
) -> None:
    """Embed structures into an .npz file; exit 2 if any of them was broken (those are left out and named)."""
    from moiety.inference.embed import embed_files, load_encoder

    broken = embed_files(load_encoder(model), files, level, out, batch_nodes, all_atom)
    for verdict in broken:
        note(f"{verdict.file} [{verdict.index}] left out: {verdict.reason}; {verdict.remedy}")
    if as_json:
        print(json.dumps({"out": str(out), "level": level, "broken": len(broken)}))
    note(f"written to {out}, {len(broken)} broken")
    if broken:
        raise typer.Exit(2)


BridgeDir = Annotated[Path, typer.Option("--model", help="Directory of a text bridge.")]


@app.command()
def ask(
    files: Files,
    question: Annotated[str, typer.Argument(help="In words.")],
    model: BridgeDir,
    choice: Annotated[list[str] | None, typer.Option(help="An answer to choose from; give several.")] = None,
    page: Annotated[Path | None, typer.Option(help="Draw answer and structure into this .html.")] = None,
    all_atom: AllAtom = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about a structure, or about several that stand before it."""
    from moiety.bridge.use import ask_files

    answer, controls = ask_files(files, question, model, choice or (), page, all_atom)
    if as_json:
        others = {name: dataclasses.asdict(other) for name, other in controls.items()}
        print(json.dumps({**dataclasses.asdict(answer), "controls": others}))
    else:
        print(answer.answer or f"no answer: {answer.reason}")
    for name, share in answer.choices.items():
        note(f"{name}: {share:.1%}")
    note(f"confidence {answer.confidence:.1%}; {answer.strangeness:.0%} of known structures are less strange")
    for name, other in controls.items():
        note(f"control, {name}: {other.answer or other.reason} ({other.confidence:.1%})")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="Words, or a structure file.")],
    model: BridgeDir,
    where_in: Annotated[Path, typer.Option("--in", help="A corpus, or a .txt with a text a line.")],
    where: Annotated[str, typer.Option(help='Conditions on predicted properties: "gap > 5 and dipole < 2".')] = "",
    most: Annotated[int, typer.Option(min=1, help="How many are shown.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find structures by words, or texts by a structure; a corpus is indexed at the first search."""
    try:
        from moiety.bridge.searching import search as search_in
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise InputError("searching needs faiss: pip install 'moiety[bridge]'") from None
    found = search_in(query, where_in, model, where, most)
    if as_json:
        print(json.dumps({"found": [dataclasses.asdict(one) for one in found]}))
        return
    for one in found:
        numbers = ", ".join(f"{n} {v:.3g} ± {s:.2g}" for n, (v, s) in one.numbers.items() if v == v)
        print(f"{one.score:.3f}  {one.id}" + (f"  {numbers}" if numbers else ""))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory (the --out of a training script).")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the run directory.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the table of results only, write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Redraw the report of a run, finished or not, from the files in its directory."""
    from moiety.inference.describe import describe_run, needs_description
    from moiety.inference.run_files import RunFiles
    from moiety.inference.summary import print_summary, summary

    if needs_description(run):
        note("asking the exported model for examples, and the trivial predictors for their losses")
        describe_run(run)
    files = RunFiles.open(run)
    if not table:
        from moiety.inference.report import write_report

        path = write_report(run, out)
        note(f"report: {path}")
    if as_json:
        print(json.dumps(summary(files)))
    elif table:
        print_summary(summary(files))


@app.command()
def selfcheck(
    full: Annotated[bool, typer.Option("--full", help="All promises, in a quarter of an hour; else a minute.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try out what the training engine promises, on small real runs: a row each; exit 1 if one does not hold."""
    from rich.console import Console

    from moiety.testing.reliability.selfcheck import print_rows, selfcheck

    rows = print_rows(selfcheck(full), Console(stderr=as_json, highlight=False))
    if as_json:
        print(json.dumps({"rows": [vars(row) for row in rows], "ok": all(row.ok for row in rows)}))
    failed = sum(not row.ok for row in rows)
    note(f"{len(rows) - failed} of {len(rows)} promises hold, in {sum(row.seconds for row in rows):.0f} s")
    if failed:
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the only place that turns exceptions into messages and exit codes."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app(args=argv, prog_name="moiety")
    except InputError as error:
        note(f"error: {error}")
        return 2
    except Exception as error:
        if os.environ.get("MOIETY_DEBUG"):
            traceback.print_exc()
        else:
            note(f"failed: {type(error).__name__}: {error} (MOIETY_DEBUG=1 shows where)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
