"""SDF and MOL files, V2000 and V3000, record by record through RDKit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moiety.data.convert import from_object
from moiety.data.readers.text import count_of, quietly
from moiety.data.structure import Structure
from moiety.data.validate import MAX_NODES, Noted, Rejected
from moiety.models.conversion_moiety import is_drawing

RECORD_END = re.compile(r"^\$\$\$\$.*\n?", re.MULTILINE)
V3000_COUNTS = re.compile(r"^M  V30 COUNTS +(\d+)", re.ASCII)
DIGITS = re.compile(r"[0-9]+")
COUNTS_LINE = 3  # the fourth line of a molblock


def read(text: str) -> Iterator[Noted | Rejected]:
    """Every record of an SDF; hydrogens stay, nothing is sanitised: only elements, charges and coordinates are used."""
    for record in RECORD_END.split(text):
        if not record.strip():
            continue
        try:
            yield _record(record)
        except Rejected as rejected:
            yield rejected


def _record(record: str) -> Noted:
    from rdkit import Chem, rdBase

    _refuse_wrong_counts(record)
    with rdBase.BlockLogs():
        supplier = Chem.SDMolSupplier()
        supplier.SetData(record, sanitize=False, removeHs=False)
        molecule = quietly(lambda: supplier[0])
        if molecule is None:
            raise Rejected("unreadable", "RDKit cannot read the record")
        if molecule.GetNumAtoms() == 0:
            raise Rejected("no-atoms", "the record has no atoms")
        if is_drawing(molecule):
            raise Rejected("flat-2d", "every z coordinate is 0 and the record is not marked 3D")
        heavy = sum(atom.GetAtomicNum() == 1 and atom.GetIsotope() > 1 for atom in molecule.GetAtoms())
        notes = (f"{count_of(heavy, 'atom')} of D or T read as H",) if heavy else ()
        structure: Structure = quietly(lambda: from_object(molecule))
        return Noted(structure, notes)


def _refuse_wrong_counts(record: str) -> None:
    """Compares a V2000 counts line with the lines that follow; RDKit only says that it failed."""
    lines = record.rstrip().split("\n")
    if len(lines) <= COUNTS_LINE:
        raise Rejected("truncated", f"the record ends after {len(lines)} lines")
    counts = lines[COUNTS_LINE]
    if "V3000" in counts:
        _refuse_wrong_v3000(lines)
        return
    if not (DIGITS.fullmatch(counts[:3].strip()) and DIGITS.fullmatch(counts[3:6].strip())):
        raise Rejected("unreadable", f"line 4 should hold the counts, it is {counts[:40]!r}")
    num_atoms, num_bonds = int(counts[:3]), int(counts[3:6])
    end = next((place for place, line in enumerate(lines) if line.startswith("M  ")), len(lines))
    body = lines[COUNTS_LINE + 1 : end]
    atoms = next((place for place, line in enumerate(body) if len(line) < 31), len(body))  # bond lines are short
    if end == len(lines) and len(body) < num_atoms + num_bonds:
        raise Rejected(
            "truncated", f"{num_atoms} atoms and {num_bonds} bonds are declared, the record ends after {atoms}"
        )
    if atoms != num_atoms:
        raise Rejected("wrong-counts", f"{num_atoms} atoms are declared, {atoms} are there")


def _refuse_wrong_v3000(lines: list[str]) -> None:
    """Compares the declared number of atoms with the lines of the atom block: RDKit makes room for what is declared."""
    if not any(line.startswith("M  END") for line in lines):
        raise Rejected("truncated", "the record has no M  END")
    declared = next((found.group(1) for line in lines if (found := V3000_COUNTS.match(line))), None)
    if declared is None:
        raise Rejected("unreadable", "a V3000 record without COUNTS")
    places = [place for place, line in enumerate(lines) if line.rstrip() in ("M  V30 BEGIN ATOM", "M  V30 END ATOM")]
    body = lines[places[0] + 1 : places[1]] if len(places) == 2 else []
    num_atoms = sum(not line.endswith("-") for line in body)  # a dash continues the line
    if declared.lstrip("0") != str(num_atoms).lstrip("0"):
        raise Rejected("wrong-counts", f"{declared[:20]} atoms are declared, {num_atoms} are there")
    if num_atoms > MAX_NODES:
        raise Rejected("too-many-nodes", f"{num_atoms} atoms")
