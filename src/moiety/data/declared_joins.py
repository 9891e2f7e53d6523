"""Tables beside the structures: affinities in an index, gaps in a CSV, systems and references in a log.

```yaml
join:
  file: INDEX_general_PL_data.*      # pattern among the sources; without it the table lies in the archive that is read
  member: ["*.txt.xz"]               # of an archive: the members that hold the table
  container: lines
  options: {columns: [code, resolution, year, affinity], comment: "#"}
  key: code                          # column; without it a row is called FILE/NUMBER
  pattern: "([^/]+)_protein[.]pdb"   # its groups, put together, are what is compared
```

A record is called FILE/KEY; `pattern` finds in that what is looked up, and in the names of the rows where there is no
`key`. What the row holds is `joined.COLUMN` to fields and splits. A record without a row keeps its structure and is
counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from moiety.data.containers import check_keys, kind_of, records
from moiety.data.validate import Rejected
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.data.download import Archive

JOIN = ("file", "member", "container", "options", "key", "pattern")
JOINED = "joined."  # what the paths to columns begin with


class Join:
    """Rows by key: those columns that the recipe reads, of all rows of the table (about 300 bytes a row and column)."""

    def __init__(self, spec: Mapping[str, Any], columns: Iterable[str], archives: Mapping[str, Archive], part: str):
        self.pattern = re.compile(spec.get("pattern", "(.*)"))
        self.columns = sorted(set(columns))
        self.table = spec.get("file") or ", ".join(spec.get("member", ())) or part
        self.rows: dict[str, tuple[Any, ...]] = {}
        for name, row in _rows(spec, archives, part):
            if missing := [column for column in (*self.columns, spec.get("key")) if column and column not in row]:
                raise InputError(f"{self.table}: has no column {missing[0]!r}; it has {', '.join(row)}")
            key = str(row[spec["key"]]) if "key" in spec else self._key(name)
            if key is None:
                continue
            cells = tuple(row[column] for column in self.columns)
            if self.rows.setdefault(key, cells) != cells:
                raise InputError(f"{self.table}: two rows of the key {key!r} differ; check the key of the join")

    def _key(self, name: str) -> str | None:
        found = self.pattern.search(name)
        return "".join(found.groups()) if found else None

    def row(self, name: str) -> dict[str, Any] | None:
        """The columns of the record of that name; None where the table does not have it."""
        found = self.rows.get(self._key(name) or "")
        return None if found is None else dict(zip(self.columns, found, strict=True))


def _rows(spec: Mapping[str, Any], archives: Mapping[str, Archive], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and cells of the rows; a row that cannot be read is one that is not there."""
    tables = {part: archives[part]}
    if "file" in spec:
        tables = {name: archive for name, archive in sorted(archives.items()) if fnmatch(name, spec["file"])}
        if not tables:
            raise InputError(f"join: none of the sources is called {spec['file']}; give it with --from DIR")
    for name, archive in tables.items():
        member = spec.get("member", archive.source.member)
        for key, row in records(
            archive.path, spec["container"], spec.get("options", {}), member, archive.source.limits
        ):
            if isinstance(row, Rejected):
                continue
            yield f"{name}/{key}", row


def check_join(spec: Mapping[str, Any], where: str) -> None:
    """Reads a join without its table.

    Raises:
        InputError: an unknown key, container or option, or a pattern that is none.
    """
    check_keys(spec, JOIN, where)
    if "container" not in spec or ("file" not in spec and "member" not in spec):
        raise InputError(f"{where} needs 'container', and 'file' or 'member'")
    kind_of(spec["container"], spec.get("options", {}), where)
    try:
        groups = re.compile(spec.get("pattern", "(.*)")).groups
    except re.error as error:
        raise InputError(f"{where}: pattern {spec['pattern']!r} is no regular expression ({error})") from None
    if not groups:
        raise InputError(f"{where}: pattern {spec['pattern']!r} has no group, and what is in groups is compared")


def with_joined(record: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a mapping that has the row under `joined`; a list is a mapping of its places."""
    if isinstance(record, Mapping):
        return {**record, "joined": row}
    items = enumerate(record) if isinstance(record, list | tuple) else ()
    return {**{str(place): value for place, value in items}, "joined": row}
