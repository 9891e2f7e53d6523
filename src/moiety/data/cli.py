"""`moiety data`: list and build corpora, look at one, check structure files, pack own structures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moiety.data.validate import Verdict

app = typer.Typer(help="Corpora and structure files.", no_args_is_help=True, pretty_exceptions_enable=False)

Files = Annotated[list[Path], typer.Argument(help="Structure files, or folders of them.")]
AllAtom = Annotated[bool, typer.Option(help="Read proteins atom by atom instead of residue by residue.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """The corpora that can be built here, and the large ones that are read from files one has (--from)."""
    from moiety.data.build import list_recipes

    recipes, large = (
        [
            {
                "name": recipe.name,
                "domain": recipe.domain,
                "profiles": list(recipe.profiles),
                "licence": recipe.licence,
                "title": recipe.title,
                "gated": any(source.gate for source in recipe.sources),
            }
            for recipe in list_recipes(large=size)
        ]
        for size in (False, True)
    )
    if as_json:
        print(json.dumps({"recipes": recipes, "large": large}))
        return
    rows = [[r["name"], r["domain"], ", ".join(r["profiles"]), r["licence"], r["title"]] for r in recipes]
    _table(["recipe", "domain", "profiles", "licence", "what it is"], rows)
    rows = [[r["name"], r["domain"], "gated" if r["gated"] else "", r["licence"], r["title"]] for r in large]
    _table(["large corpus", "domain", "", "licence", "what it is"], rows)


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see `moiety data list`), or the path of its YAML.")],
    profile: Annotated[str, typer.Option(help="tiny (minutes) or full.")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Default: corpora/PROFILE/RECIPE; of a collection, PROFILE.")] = None,
    limit: Annotated[int | None, typer.Option(min=3, help="At most this many structures.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Parts built at a time. Default: the cores.")] = None,
    engine: Annotated[str, typer.Option(help="processes, or ray (a cluster); the shards are the same.")] = "processes",
    given: Annotated[
        Path | None, typer.Option("--from", help="Folder of source files you have.", exists=True, file_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build a corpus: fetch its sources, read, validate, write shards and manifest. A collection: each that changed."""
    from moiety.data.build import build as build_corpus
    from moiety.data.build import default_out, is_built, load_collection

    collection = load_collection(recipe)
    if collection is None:
        manifest = build_corpus(recipe, profile, out, limit, workers, engine, given)
        _show(out or default_out(manifest["name"], profile), manifest, as_json)
        return
    for name in collection.corpora:
        folder = out / name if out else default_out(name, profile)
        if is_built(name, profile, folder, limit):
            _note(f"{name}: {folder} was built by the same recipe, profile and options; kept")
        else:
            build_corpus(name, profile, folder, limit, workers, engine, given)
    _show_all(out or default_out("", profile), collection.corpora, as_json)


@app.command()
def show(
    corpus: Annotated[Path, typer.Argument(help="Directory of a corpus, or of several.")],
    as_json: AsJson = False,
) -> None:
    """What is in a corpus, or a table of several; every shard is hashed against its manifest."""
    from moiety.data.shards import MANIFEST, verify

    names = sorted(path.parent.name for path in corpus.glob(f"*/{MANIFEST}"))
    if names and not (corpus / MANIFEST).exists():
        _show_all(corpus, names, as_json)
    else:
        _show(corpus, verify(corpus), as_json)


@app.command()
def check(files: Files, all_atom: AllAtom = False, as_json: AsJson = False) -> None:
    """A verdict for every structure of the files, and what is odd about good ones; exit 2 if any is rejected."""
    counts: Counter[str] = Counter()
    found = []
    for verdict in _verdicts(files, all_atom):
        counts[verdict.code] += 1
        if as_json:
            fields = ("file", "index", "ok", "code", "reason", "remedy", "notes")
            found.append({name: getattr(verdict, name) for name in fields})
        else:
            print(_line(verdict))
    num_rejected = counts.total() - counts["ok"]
    if as_json:
        print(json.dumps({"ok": counts["ok"], "rejected": _rejected(counts), "verdicts": found}))
    for code, number in _rejected(counts).items():
        _note(f"{code:<20}{number:>8,}")
    _note(f"{counts['ok']} structures ok, {num_rejected} rejected")
    if num_rejected:
        raise typer.Exit(2)


@app.command()
def pack(
    files: Files,
    out: Annotated[Path, typer.Option(help="Directory of the new corpus.")],
    licence: Annotated[str, typer.Option(help="Licence of the structures, for the manifest.")] = "not stated",
    all_atom: AllAtom = False,
    as_json: AsJson = False,
) -> None:
    """Write own structures to a corpus. Rejected ones are named, counted in the manifest, and left out."""
    from moiety.data.shards import write_corpus

    def told() -> Iterator[Verdict]:
        for verdict in _verdicts(files, all_atom):
            if verdict.structure is None:
                _note(_line(verdict))
            else:
                verdict.structure.id = f"{verdict.file}#{verdict.index}"
            yield verdict

    manifest = write_corpus(told(), out, source=", ".join(map(str, files)), licence=licence)
    _show(out, manifest, as_json)


@app.command()
def leak(
    train: Annotated[str, typer.Option(help="Corpus, CORPUS:SPLIT, or structure files: what is learned from.")],
    test: Annotated[str, typer.Option(help="The same: what must not stand in the other.")],
    out: Annotated[Path | None, typer.Option(help="Write every finding here, one JSON line each.")] = None,
    fail: Annotated[bool, typer.Option("--fail", help="Exit 2 if a duplicate is found.")] = False,
    as_json: AsJson = False,
) -> None:
    """Duplicates and near duplicates across two sets; scaffolds and prototypes they share."""
    from moiety.data.leak.report import compare, lines

    report = compare(train, test, out)
    print(json.dumps(report.as_dict()) if as_json else "\n".join(lines(report)))
    if fail and report.num_duplicates:
        _note(f"{report.num_duplicates} structures of {test} stand in {train}")
        raise typer.Exit(2)


def _verdicts(files: list[Path], all_atom: bool) -> Iterator[Verdict]:
    from moiety.data.readers import structure_files
    from moiety.data.validate import verdicts

    for path in structure_files(files):
        yield from verdicts(path, all_atom)


def _line(verdict: Verdict) -> str:
    if verdict.ok:
        line = f"{verdict.file} [{verdict.index}] ok" + "".join(f"; {note}" for note in verdict.notes)
    else:
        line = f"{verdict.file} [{verdict.index}] {verdict.code}: {verdict.reason}; {verdict.remedy}"
    return _printable(line)


def _printable(text: str) -> str:
    """The text on one line: names and contents of files may hold line ends and commands to the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _rejected(counts: Counter[str]) -> dict[str, int]:
    return {code: number for code, number in sorted(counts.items()) if code != "ok"}


def _show(path: Path, manifest: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(path), **manifest}))
        return
    counts, is_text = manifest["counts"], "kinds" in manifest
    rejected = ", ".join(f"{code} {number}" for code, number in counts["rejected"].items()) or "none"
    rows = [
        ["corpus", str(path)],
        ["texts" if is_text else "structures", f"{counts['ok']:,} of {counts['in']:,}; rejected: {rejected}"],
        *([["noted", _counted(manifest["noted"])]] if "noted" in manifest else []),
        ["splits", _counted(manifest["splits"])],
        ["domains", _counted(manifest["domains"])],
        ["kinds", _counted(manifest["kinds"])]
        if is_text
        else ["nodes, edges", f"{manifest['num_nodes']:,}, {manifest['num_edges']:,} within {manifest['cutoff']} Å"],
        ["labels", ", ".join(f"{name} ({unit})" for name, unit in manifest["units"].items()) or "none with a unit"],
        ["source", manifest["source"]],
        ["licence", manifest["licence"]],
        ["citation", manifest["citation"] or "none"],
        ["shards", f"{len(manifest['shards'])}, {sum(s['bytes'] for s in manifest['shards']) / 1e6:.1f} MB"],
        *(["note", note] for note in manifest.get("notes", [])),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")


def _show_all(folder: Path, names: Iterable[str], as_json: bool) -> None:
    from moiety.data.shards import verify

    manifests = {name: verify(folder / name) for name in names}
    if as_json:
        print(json.dumps({"path": str(folder), "corpora": manifests}))
        return
    rows = [
        [
            name,
            ", ".join(manifest["domains"]),
            f"{manifest['counts']['ok']:,}",
            f"{sum(manifest['counts']['rejected'].values()):,}",
            _counted(manifest["splits"]),
            ", ".join(manifest["units"]) or _counted(manifest.get("kinds", {})) or "none",
            manifest["licence"],
        ]
        for name, manifest in manifests.items()
    ]
    _table(["corpus", "domain", "structures", "rejected", "splits", "labels", "licence"], rows)


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200  # a pipe has no width: do not wrap
    Console(highlight=False, markup=False, width=width).print(table)


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
