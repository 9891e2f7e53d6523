"""A user's own labelled structures: from the files there are to structures with labels, units and a split.

| given | read as |
|---|---|
| .xyz .extxyz .sdf ..., as `moiety.data.readers` reads them | structures with the labels that they carry |
| .csv .tsv .parquet with a column of SMILES | molecules in conformers by RDKit, labels from the columns |
| a folder with structure files and one .csv | structures; a column of the table names their files |
| a folder of structure files | structures with the labels that they carry |
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from moiety.data.readers import structure_files
from moiety.data.splits import SPLITS, place
from moiety.data.structure import Structure
from moiety.data.validate import REMEDIES, Rejected, Verdict, verdicts
from moiety.errors import InputError

Item = TypeVar("Item")
TABLES = (".csv", ".tsv", ".parquet")
SMILES = re.compile(r"(canonical_?|isomeric_?)?smi(les)?$", re.IGNORECASE)
UNIT = re.compile(r"^(?P<name>.*?)\s*[\[(](?P<unit>[^\[\]()]+)[\])]$")  # gap [eV], solubility (mol/L)
HELD_OUT = 0.1  # share of the structures in val, and in test
FORMULAS = 20  # at least so many, each with several structures: geometries of one molecule stay together
STRETCHES = 20  # where formulas are fewer, as in a trajectory: a frame is nearly known from the ones beside it


@dataclass
class OwnData:
    """Structures that are read, each with its split in `groups`, and what is to be said about them."""

    verdicts: list[Verdict]
    units: dict[str, str] = field(default_factory=dict)
    origin: str = ""  # of geometries that are not in the files
    split_by: str = ""

    @property
    def structures(self) -> list[Structure]:
        return [verdict.structure for verdict in self.verdicts if verdict.structure is not None]


def read_own(path: Path, all_atom: bool = False) -> OwnData:
    """Structures with all their labels.

    Raises:
        InputError: nothing there, a table without SMILES or names of files, not one valid structure.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    tables = sorted(p for p in path.iterdir() if p.suffix.lower() in TABLES) if path.is_dir() else []
    if len(tables) > 1:
        raise InputError(f"{path}: has {len(tables)} tables ({', '.join(p.name for p in tables)}); leave one")
    if path.is_file() and path.suffix.lower() in TABLES:
        data = _molecules(path)
    elif tables:
        data = _files_with_table(path, tables[0], all_atom)
    else:
        found = (verdict for file in structure_files([path]) for verdict in verdicts(file, all_atom))
        data = OwnData(list(_shown(found, path)))
    if not data.structures:
        reasons = Counter(f"{verdict.code}: {verdict.reason}" for verdict in data.verdicts)
        first = "; ".join(reason for reason, _ in reasons.most_common(3)) or "there are none"
        raise InputError(f"{path}: not one usable structure ({first}); `moiety data check` names them all")
    data.split_by = assign_splits(data.structures)
    return data


def _molecules(path: Path) -> OwnData:
    """Molecules of a table with SMILES; bad rows are rejected by number."""
    from moiety.data.conformers import ORIGIN, from_smiles

    names, rows = _table(path)
    column = next((name for name in names if SMILES.match(name.strip())), None)
    if column is None:
        raise InputError(f"{path}: no column of SMILES among {', '.join(names)}; name it `smiles`")
    labels, units = _label_columns(name for name in names if name != column)
    found = []
    for number, row in enumerate(_shown(rows, path, len(rows))):
        try:
            structure = from_smiles(str(row[column]).strip())
            structure.id, structure.source = f"{path.name}#{number}", path.name
            structure.scalars = _numbers(row, labels)
            found.append(Verdict(str(path), number, True, structure=structure))
        except Rejected as rejected:
            found.append(Verdict(str(path), number, False, rejected.code, rejected.reason, REMEDIES[rejected.code]))
    return OwnData(found, units, ORIGIN)


def _files_with_table(folder: Path, table: Path, all_atom: bool) -> OwnData:
    """Structure files of a folder with the labels that a table gives them by name of file, with suffix or without."""
    names, rows = _table(table)
    files = {file.name: file for file in structure_files([folder]) if file.suffix.lower() not in TABLES}
    files |= {file.name.split(".")[0]: file for file in files.values()}
    column = next((name for name in names if rows and str(rows[0][name]).strip() in files), None)
    if column is None:
        raise InputError(f"{table}: no column ({', '.join(names)}) has names of files of {folder} in its first row")
    labels, units = _label_columns(name for name in names if name != column)
    found = []
    for number, row in enumerate(_shown(rows, folder, len(rows))):
        name = str(row[column]).strip()
        if name not in files:
            found.append(Verdict(str(table), number, False, "no-file", f"no file {name!r}", REMEDIES["no-file"]))
            continue
        for verdict in verdicts(files[name], all_atom):
            if verdict.structure is not None:
                verdict.structure.scalars |= _numbers(row, labels)
            found.append(verdict)
    return OwnData(found, units)


def _shown(items: Iterable[Item], path: Path, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar at a terminal while they are gone through."""
    console = Console(stderr=True)
    return track(items, f"reading {path.name}", total, console=console, transient=True, disable=not console.is_terminal)


def _table(path: Path) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Names of the columns, and the rows."""
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: no Parquet file ({error})") from error
        return table.column_names, table.to_pylist()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            rows: list[Mapping[str, Any]] = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a table ({error})") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}, line {number + 2}: has other cells than the header; check the delimiter")
    return list(reader.fieldnames or ()), rows


def _label_columns(columns: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Column -> name of its label, and name -> unit of those that say one: `gap [eV]`."""
    names, units = {}, {}
    for column in columns:
        match = UNIT.match(column.strip())
        names[column] = match["name"] if match else column.strip()
        if match:
            units[match["name"]] = match["unit"].strip()
    return names, units


def _numbers(row: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, float]:
    """The finite numbers of a row, by label."""
    found = {}
    for column, name in labels.items():
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            continue
        if np.isfinite(value):
            found[name] = value
    return found


def assign_splits(structures: Sequence[Structure]) -> str:
    """Gives every structure a split, about 80 % train, 10 % val, 10 % test, and says by what.

    Molecules go by scaffold, crystals by prototype, chains by sequence cluster. Other structures that have several
    geometries each go by formula, or where formulas are few in stretches of frames in a row; else each goes for itself.
    Groups are taken in an order that depends on their names alone, those that would overfill val or test go to train.
    """
    groups, split_by = _groups(structures)
    sizes = Counter(groups)
    limit = max(1, round(HELD_OUT * len(structures)))
    split_of: dict[str, str] = {}
    room = {"test": limit, "val": limit}
    for group in sorted(sizes, key=lambda name: place(name, "own")):
        split = next((name for name in room if sizes[group] <= max(1, room[name]) and room[name] > 0), "train")
        if split in room:
            room[split] -= sizes[group]
        split_of[group] = split
    for structure, group in zip(structures, groups, strict=True):
        structure.groups["split"] = split_of[group]
    counts = Counter(split_of[group] for group in groups)
    if missing := [split for split in SPLITS if not counts[split]]:
        raise InputError(
            f"{len(structures)} structures in {len(sizes)} groups by {split_by} leave none for {', '.join(missing)}; "
            "more, and more different ones are needed"
        )
    return split_by


def _groups(structures: Sequence[Structure]) -> tuple[list[str], str]:
    ids = [f"{structure.id}:{number}" for number, structure in enumerate(structures)]
    if all("scaffold" in s.groups for s in structures):
        return [s.groups["scaffold"] for s in structures], "scaffold"
    if all(s.pbc is not None and s.pbc.all() for s in structures):
        from moiety.data.prototypes import prototype

        found = [prototype(s) or name for s, name in zip(structures, ids, strict=True)]
        if len(set(found)) >= FORMULAS:
            return found, "prototype"
    if all(s.is_residue.any() for s in structures):
        from moiety.data.residues import one_letter
        from moiety.data.sequence_clusters import cluster

        return [
            str(label) for label in cluster([one_letter(s.node_type[s.is_residue]) for s in structures])
        ], "sequence"
    formulas = [str(np.unique(s.node_type, return_counts=True)) for s in structures]
    if len(set(formulas)) > len(structures) / 2:
        return ids, "structure, at random"
    if len(set(formulas)) >= FORMULAS:
        return formulas, "formula"
    stretch = [number * STRETCHES // len(structures) for number in range(len(structures))]
    return [f"{number}" for number in stretch], "stretches of frames in a row"


def labels_of(structures: Iterable[Structure]) -> Iterator[str]:
    """Names of all labels that structures have."""
    for s in structures:
        yield from (name for name in ("energy", "forces", "stress", "dipole") if getattr(s, name) is not None)
        yield from (*s.scalars, *s.node_scalars, *s.tensors, *s.node_tensors)
