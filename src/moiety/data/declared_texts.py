"""Corpora of texts that a YAML describes: the fields of a text record instead of those of a structure.

```yaml
domain: text
reader:
  container: csv
  fields:
    kind: {constant: mutant}
    text: {from: mutant}
    key: {from: mutated_sequence}
    value: {from: DMS_score, optional: true}
splits: {by: hash, of: key.0}
```

A field is `from` a name (dotted into mappings, a number into lists), or `constant`; an `optional` one may be missing or
empty. `hide` of the text names fields (or lists of them) whose contents are replaced in it by "the molecule": a caption
that tells the name asks no question. Containers and splits are those of `moiety.data.declared`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moiety.data.containers import check_keys, kind_of, records
from moiety.data.declared import check_splits, data_files, splitter
from moiety.data.declared_fields import Absent, value_at
from moiety.data.splits import SPLITS, even_share
from moiety.data.texts import Text
from moiety.data.validate import REMEDIES, Rejected, Verdict
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.data.build import Recipe
    from moiety.data.download import Archive

READER = ("container", "options", "fields")
FIELDS = ("kind", "text", "key", "prompt", "value")
FIELD = ("from", "constant", "optional")
HIDDEN = "the molecule"
MIN_HIDDEN = 4  # letters: shorter names are words of their own


def parts(recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any]) -> list[str]:
    """One part a file, by name."""
    check(recipe)
    return data_files(recipe, archives)


def texts(
    recipe: Recipe, archives: Mapping[str, Archive], options: Mapping[str, Any], part: str
) -> Iterator[Text | Verdict]:
    """The texts of one file, and verdicts where a record is none.

    How many of a split are wanted, `options` say; every part gives an even share of them.

    Raises:
        InputError: the recipe has a key that nobody reads, or the file is not what it says.
    """
    every = parts(recipe, archives, options)
    left = even_share(options, every.index(part), len(every))
    archive, reader = archives[part], recipe.reader
    source = archive.source
    split_of = splitter(recipe, archives, part)
    found = records(archive.path, reader["container"], reader.get("options", {}), source.member, source.limits)
    for index, (key, record) in enumerate(found):
        if len(left) == len(SPLITS) and not any(left.values()):
            return
        name = f"{part}/{key}"
        try:
            if isinstance(record, Rejected):
                raise record
            split = split_of(name, key, record)
            text = Text(id=name, split=split, **_fields(reader["fields"], record))
        except Absent as absent:
            yield Verdict(part, index, False, "missing-field", f"{key}: {absent}", REMEDIES["missing-field"])
        except Rejected as rejected:
            yield Verdict(part, index, False, rejected.code, f"{key}: {rejected.reason}", REMEDIES[rejected.code])
        else:
            if left.get(split, 1) > 0:
                left |= {split: left[split] - 1} if split in left else {}
                yield text


def check(recipe: Recipe) -> None:
    """Reads the `reader` and `splits` of a recipe without its data.

    Raises:
        InputError: an unknown key, container, field or rule, with the nearest one.
    """
    where, reader = str(recipe.path), recipe.reader
    check_keys(reader, READER, f"{where}: reader")
    for needed in ("container", "fields"):
        if needed not in reader:
            raise InputError(f"{where}: reader needs {needed!r}")
    kind_of(reader["container"], reader.get("options", {}), f"{where}: reader")
    check_keys(reader["fields"], FIELDS, f"{where}: fields")
    for name in ("kind", "text"):
        if name not in reader["fields"]:
            raise InputError(f"{where}: fields needs {name!r}")
    for name, spec in reader["fields"].items():
        check_keys(spec, (*FIELD, "hide") if name == "text" else FIELD, f"{where}: {name}")
        if ("from" in spec) == ("constant" in spec):
            raise InputError(f"{where}: {name} has either `from` or `constant`")
    check_splits(recipe)


def _fields(specs: Mapping[str, Any], record: Any) -> dict[str, Any]:
    found = {name: value for name, spec in specs.items() if (value := _value(spec, record)) is not None}
    fields: dict[str, Any] = {name: str(value) for name, value in found.items() if name != "value"}
    if "value" in found:
        fields["value"] = _number(found["value"])
    hidden = [name for path in specs["text"].get("hide", ()) for name in _names(record, path)]
    for name in sorted(hidden, key=len, reverse=True):
        if len(name) >= MIN_HIDDEN:
            fields["text"] = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, fields["text"], flags=re.IGNORECASE)
    return {"key": "", **fields}


def _value(spec: Mapping[str, Any], record: Any) -> Any:
    try:
        value = spec["constant"] if "constant" in spec else value_at(record, spec["from"])
    except Absent:
        value = None
    if value is None or value == "":
        if spec.get("optional"):
            return None
        raise Absent(f"there is no field {spec['from']}, or it is empty")
    return value


def _names(record: Any, path: str) -> list[str]:
    value = _value({"from": path, "optional": True}, record)
    return [str(name) for name in (value if isinstance(value, list) else [] if value is None else [value])]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Rejected("bad-label", f"the value should be a number, it is {str(value)[:40]!r}") from None
