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
splits: {by: hash, of: key, val: 0.05, test: 0.05}
```

A field is `from` a name (dotted into mappings, a number into lists), or `constant`; `unit` is converted to Å, eV, eV/Å,
eV/Å^3, e·Å, or to what the recipe's `units` say of a scalar; `factor` multiplies; `optional` fields may be missing or
NaN; `voigt` names the order of six stresses. A record that cannot be a structure is a verdict, with its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiety.data.containers import check_keys, kind_of, records
from moiety.data.declared_fields import FIELDS, Absent, FieldReader, value_at
from moiety.data.splits import SPLITS, split_of
from moiety.data.structure import Structure
from moiety.data.validate import REMEDIES, Rejected, Verdict
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.data.build import Recipe
    from moiety.data.download import Archive

READER = ("container", "options", "key", "structure", "residues", "fields")
SPLIT = {  # rule -> its keys
    "file": ("by", *SPLITS),
    "hash": ("by", "of", "val", "test"),
    "field": ("by", "of", *SPLITS),
    "list": ("by", "of", "file", *SPLITS),
    "all": ("by", "split"),
}


def parts(recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any]) -> list[str]:
    """One part a file, by name: the lists of a split are no part."""
    check(recipe)
    lists = recipe.splits.get("file")
    return sorted(name for name in archives if name != lists)


def structures(
    recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any], part: str
) -> Iterator[Structure | Verdict]:
    """The structures of one file, each with groups["split"], and verdicts where a record is none.

    Raises:
        InputError: the recipe has a key that nobody reads, or the file is not what it says.
    """
    check(recipe)
    archive = archives[part]
    reader = recipe.reader
    fields = FieldReader(reader, recipe.units, str(recipe.path))
    split = _splitter(recipe, archives)
    left = {name: options[name] for name in SPLITS if name in options}
    found = records(archive.path, reader["container"], reader.get("options", {}), archive.source.member)
    for index, (key, record) in enumerate(found):
        name = f"{part}/{key}"
        try:
            structure = fields.structure(record)
            structure.id = f"{part}/{fields.key(record, key)}"
            structure.groups["split"] = split(name, structure, record)
        except Absent as absent:
            record = Rejected("missing-field", str(absent))
        except Rejected as rejected:
            record = rejected
        if isinstance(record, Rejected):
            yield Verdict(part, index, False, record.code, f"{key}: {record.reason}", REMEDIES[record.code])
            continue
        if left.get(structure.groups["split"], 1) <= 0:
            if len(left) == len(SPLITS) and not any(left.values()):
                return
            continue
        if structure.groups["split"] in left:
            left[structure.groups["split"]] -= 1
        structure.domain, structure.source = recipe.domain, recipe.name
        structure.theory = structure.theory or recipe.theory
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
    if not isinstance(recipe.splits, dict) or recipe.splits.get("by") not in SPLIT:
        raise InputError(f"{where}: splits is a mapping whose `by` is one of {', '.join(SPLIT)}")
    check_keys(recipe.splits, SPLIT[recipe.splits["by"]], f"{where}: splits")


def _splitter(recipe: Recipe, archives: Mapping[str, Archive]) -> Any:
    """(name, structure, record) -> split."""
    rule: dict[str, Any] = dict(recipe.splits)
    where = f"{recipe.path}: splits"
    if rule["by"] == "all":
        return lambda *_: rule["split"]
    if rule["by"] == "hash":
        shares = {name: float(rule.get(name, 0.05)) for name in ("val", "test")}
        return lambda name, _, record: split_of(_of(rule, name, record), recipe.name, **shares)
    if rule["by"] == "file":
        return lambda name, *_: _first(name, rule, lambda pattern: fnmatch(name, pattern), where)
    if rule["by"] == "field":
        return lambda name, _, record: _first(name, rule, lambda value: str(value) == _of(rule, name, record), where)
    if rule["file"] not in archives:
        raise InputError(f"{where}: the list {rule['file']} is none of the sources")
    member = {name: split for split, names in _lists(archives[rule["file"]].path, rule).items() for name in names}

    def of_list(name: str, _: Structure, record: Any) -> str:
        of = _of(rule, name, record)
        if of not in member:
            raise Rejected("missing-field", f"{of} is in none of the lists of {rule['file']}")
        return member[of]

    return of_list


def _of(rule: Mapping[str, Any], name: str, record: Any) -> str:
    """What a rule looks at: a field of the record; `key`, or nothing, is the name of the structure."""
    return name if rule.get("of", "key") == "key" else str(value_at(record, rule["of"]))


def _first(name: str, rule: Mapping[str, Any], fits: Any, where: str) -> str:
    for split in SPLITS:
        if any(fits(pattern) for pattern in rule.get(split, ())):
            return split
    raise InputError(f"{where}: {name} belongs to none of train, val and test")


def _lists(path: Path, rule: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names in a JSON of lists; the rule says which of its keys is which split."""
    found = dict(records(path, "json"))
    for split in SPLITS:
        if rule.get(split) is not None and not isinstance(found.get(rule[split]), list):
            raise InputError(f"{path}: holds no list {rule[split]!r}")
    return {split: list(map(str, found[rule[split]])) for split in SPLITS if rule.get(split) is not None}
