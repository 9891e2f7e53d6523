"""Corpora that a YAML describes: which container, which field means what in which unit, which split.

```yaml
reader:
  container: hdf5                      # see moiety.data.containers
  options: {layout: conformers, conformers: conformations, fields: [atomic_numbers], per_conformer: [dft_total_energy]}
  key: {from: data.sid}                # optional: the id within the file; else the container's own
  fields:
    node_type: {from: atomic_numbers}
    positions: {from: conformations, unit: bohr}
    energy: {from: dft_total_energy, unit: hartree}
    forces: {from: dft_total_gradient, unit: hartree/bohr, factor: -1}
    scalars: {gap: {from: homolumogap, unit: eV}}
splits: {by: hash, of: key.0, val: 0.05, test: 0.05}
```

A field is `from` a name (dotted into mappings, a number into lists), or `constant`; `unit` is converted to Å, eV, eV/Å,
eV/Å^3, e·Å, or to what the recipe's `units` say of a scalar; `factor` multiplies; `optional` fields may be missing or
NaN; `voigt` names the order of six stresses; `smiles` makes a charge of a SMILES. A record that cannot be a structure
is a verdict, with its key. Labels in a table beside: `join`, see moiety.data.declared_joins.

A split looks at the field that `of` names, at `key` (FILE/KEY, the whole id), or at a part of the container's key: with
`key.0` the conformers of an HDF5 group stay together, `key.-1` is the number of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moiety.data import archives as packed
from moiety.data.containers import check_keys, kind_of, records
from moiety.data.declared_fields import FIELDS, NAMED, Absent, FieldReader, value_at
from moiety.data.declared_joins import JOINED, Join, check_join, with_joined
from moiety.data.splits import SPLITS, even_share, split_of
from moiety.data.structure import Structure
from moiety.data.validate import REMEDIES, Rejected, Verdict
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.data.build import Recipe
    from moiety.data.download import Archive

READER = ("container", "options", "key", "structure", "residues", "fields", "join")
SPLIT = {  # rule -> its keys
    "file": ("by", *SPLITS),
    "hash": ("by", "of", "val", "test"),
    "field": ("by", "of", *SPLITS),
    "list": ("by", "of", "file", *SPLITS),
    "all": ("by", "split"),
}
MISSING_LABEL = "missing-label"  # code of a structure that is ok and has no row in the table that is joined
PART_BYTES = 64 << 20  # of small files that are built together: the PDB has 200,000
READS = ("declared*.py", "unit_names.py", "splits.py", "containers/*.py", "readers/*.py", "guarded*.py", "unpickle*.py")
Part = str | list[str]  # a file by its name, or the first and the last of several
Splitter = Callable[[str, str, Any], str]


def parts(recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any]) -> list[Part]:
    """One part a file, by name; small files are one part together. The lists and tables of a recipe are no part."""
    check(recipe)
    runs: list[list[str]] = []
    room = 0
    for name in data_files(recipe, archives):
        size = archives[name].path.stat().st_size
        if not runs or size > room:
            runs.append([])
            room = PART_BYTES
        runs[-1].append(name)
        room -= size
    return [run[0] if len(run) == 1 else [run[0], run[-1]] for run in runs]


def structures(
    recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any], part: Part
) -> Iterator[Structure | Verdict]:
    """The structures of a part, each with groups["split"], and verdicts where a record is none.

    How many of a split are wanted, `options` say; every part gives an even share of them.

    Raises:
        InputError: the recipe has a key that nobody reads, or a file is not what it says.
    """
    every = parts(recipe, archives, options)
    left = even_share(options, every.index(part), len(every))
    first, last = (part, part) if isinstance(part, str) else part
    for name in data_files(recipe, archives):
        if first <= name <= last:
            yield from _structures_of(recipe, archives, name, left)


def _structures_of(
    recipe: Recipe, archives: Mapping[str, Archive], file: str, left: dict[str, int]
) -> Iterator[Structure | Verdict]:
    """The structures of one file, as long as some are `left` to take of their split."""
    archive, reader = archives[file], recipe.reader
    fields = FieldReader(reader, recipe.units, str(recipe.path))
    join = Join(reader["join"], _joined_columns(recipe), archives, file) if "join" in reader else None
    split = splitter(recipe, archives, file)
    source = archive.source
    found = records(archive.path, reader["container"], reader.get("options", {}), source.member, source.limits)
    for index, (key, record) in enumerate(found):
        if len(left) == len(SPLITS) and not any(left.values()):
            return
        name = f"{file}/{key}"
        row = join.row(name) if join else None
        view = with_joined(record, row or {}) if join and not isinstance(record, Rejected) else record
        try:
            structure = fields.structure(record, view)
            structure.id = f"{file}/{fields.key(view, key)}"
            structure.groups["split"] = split(name, key, view)
        except Absent as absent:
            record = Rejected("missing-field", str(absent))
        except Rejected as rejected:
            record = rejected
        if isinstance(record, Rejected):
            yield Verdict(file, index, False, record.code, f"{key}: {record.reason}", REMEDIES[record.code])
            continue
        if left.get(structure.groups["split"], 1) <= 0:
            continue
        if structure.groups["split"] in left:
            left[structure.groups["split"]] -= 1
        structure.domain, structure.source = recipe.domain, recipe.name
        structure.theory = structure.theory or recipe.theory
        if join and row is None:
            yield Verdict(file, index, True, MISSING_LABEL, f"{key}: no row in {join.table}", structure=structure)
        else:
            yield structure


def check(recipe: Recipe) -> None:
    """Reads the `reader` and `splits` of a recipe without its data.

    Raises:
        InputError: an unknown key, container, field, unit or rule, with the nearest one.
    """
    where = str(recipe.path)
    check_keys(recipe.reader, READER, f"{where}: reader")
    if "container" not in recipe.reader:
        raise InputError(f"{where}: reader needs 'container'")
    kind_of(recipe.reader["container"], recipe.reader.get("options", {}), f"{where}: reader")
    check_keys(recipe.reader.get("fields", {}), list(FIELDS), f"{where}: fields")
    FieldReader(recipe.reader, recipe.units, where)
    check_splits(recipe)
    if "join" in recipe.reader:
        check_join(recipe.reader["join"], f"{where}: join")
    elif columns := _joined_columns(recipe):
        raise InputError(f"{where}: {JOINED}{columns[0]} is a column of a table, and the reader has no `join`")


def check_splits(recipe: Recipe) -> None:
    """Reads the `splits` of a recipe; InputError names an unknown rule or key."""
    where = str(recipe.path)
    if not isinstance(recipe.splits, dict) or recipe.splits.get("by") not in SPLIT:
        raise InputError(f"{where}: splits is a mapping whose `by` is one of {', '.join(SPLIT)}")
    check_keys(recipe.splits, SPLIT[recipe.splits["by"]], f"{where}: splits")


def code() -> bytes:
    """The source of all that reads the files of such a recipe: a changed reader is a changed corpus."""
    here = Path(__file__).parent
    return b"".join(path.read_bytes() for pattern in READS for path in sorted(here.glob(pattern)))


def data_files(recipe: Recipe, archives: Mapping[str, Archive]) -> list[str]:
    """The names of the files that hold structures, sorted."""
    rule = recipe.splits
    beside = [rule["file"]] if "file" in rule else []
    if rule["by"] == "list":
        beside += [] if "file" in rule else [rule[split] for split in SPLITS if split in rule]
    beside += [recipe.reader["join"]["file"]] if "file" in recipe.reader.get("join", {}) else []
    return sorted(name for name in archives if not any(fnmatch(name, pattern) for pattern in beside))


def _joined_columns(recipe: Recipe) -> list[str]:
    """The columns of the table beside that fields and splits look at."""
    fields = recipe.reader.get("fields", {})
    specs = [spec for name, spec in fields.items() if name not in (*NAMED, "text")]
    specs += [spec for name in NAMED for spec in fields.get(name, {}).values()]
    paths = [spec.get("from", "") for spec in specs] + [*fields.get("text", ()), recipe.splits.get("of", "")]
    return [path.removeprefix(JOINED) for path in paths if isinstance(path, str) and path.startswith(JOINED)]


def splitter(recipe: Recipe, archives: Mapping[str, Archive], file: str) -> Splitter:
    """(FILE/KEY, key, record) -> split."""
    rule: dict[str, Any] = dict(recipe.splits)
    where = f"{recipe.path}: splits"
    if rule["by"] == "all":
        return lambda *_: rule["split"]
    if rule["by"] == "hash":
        shares = {name: float(rule.get(name, 0.05)) for name in ("val", "test")}
        return lambda name, key, record: split_of(_of(rule, file, key, record), recipe.name, **shares)
    if rule["by"] == "file":
        return lambda name, *_: _first(name, rule, lambda pattern: fnmatch(name, pattern), where)
    if rule["by"] == "field":
        return lambda name, key, record: _first(
            name, rule, lambda value: str(value) == _of(rule, file, key, record), where
        )
    member = {name: split for split, names in _lists(rule, archives, file, where).items() for name in names}

    def of_list(name: str, key: str, record: Any) -> str:
        of = _of(rule, file, key, record)
        if of not in member:
            raise Rejected("not-in-split", f"{of} is in none of the lists")
        return member[of]

    return of_list


def _of(rule: Mapping[str, Any], file: str, key: str, record: Any) -> str:
    """What a rule looks at: FILE/KEY (whatever folder the file is in), one of the names in KEY, or a field."""
    of = rule.get("of", "key")
    if of == "key":
        return f"{PurePosixPath(file).name}/{key}"
    if not of.startswith("key."):
        return str(value_at(record, of))
    names, place = key.split("/"), int(of.removeprefix("key."))
    if not -len(names) <= place < len(names):
        raise Absent(f"the key {key} has no {of}")
    return names[place]


def _first(name: str, rule: Mapping[str, Any], fits: Any, where: str) -> str:
    """The split that claims a record; train comes last, so that it can be the rest."""
    for split in reversed(SPLITS):
        if any(fits(pattern) for pattern in rule.get(split, ())):
            return split
    raise InputError(f"{where}: {name} belongs to none of train, val and test")


def _lists(rule: Mapping[str, Any], archives: Mapping[str, Archive], file: str, where: str) -> dict[str, list[str]]:
    """The names of every split: from one JSON of lists, or from a text file a split, one name a line.

    A text file is one of the sources, or a member of the archive that is read.
    """
    wanted = {split: rule[split] for split in SPLITS if rule.get(split) is not None}
    if "file" not in rule:
        return {split: _names(pattern, archives, file, where) for split, pattern in wanted.items()}
    if rule["file"] not in archives:
        raise InputError(f"{where}: the list {rule['file']} is none of the sources")
    path = archives[rule["file"]].path
    found = dict(records(path, "json"))
    for list_name in wanted.values():
        if not isinstance(found.get(list_name), list):
            raise InputError(f"{path}: holds no list {list_name!r}")
    return {split: list(map(str, found[list_name])) for split, list_name in wanted.items()}


def _names(pattern: str, archives: Mapping[str, Archive], file: str, where: str) -> list[str]:
    lists = [(archive.path, ("*",)) for name, archive in archives.items() if fnmatch(name, pattern)]
    if not lists and packed.is_archive(archives[file].path):
        lists = [(archives[file].path, (pattern,))]
    found = [row for path, member in lists for _, row in records(path, "lines", {"columns": ["name"]}, member)]
    names = [row["name"] for row in found]
    if not names:
        raise InputError(f"{where}: no list {pattern} in {file} and among the sources; give it with --from DIR")
    return names
