"""PDB and mmCIF through gemmi: residues by default, atoms on request.

Of several models the first is read, of alternative locations the first; waters are dropped. Each is noted.
"""
# Shapes: A atoms, N nodes.

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moiety.data.readers.text import count_of, quietly
from moiety.data.structure import Array, Structure
from moiety.data.validate import MAX_NODES, Noted, Rejected
from moiety.models.conversion_moiety import BOND, ISOTOPES, RESIDUE_ALIASES, WATER, element_numbers, nodes_from_atoms
from moiety.models.vocabulary_moiety import RESIDUE_ID

if TYPE_CHECKING:
    import gemmi

ATOM_RECORDS = ("ATOM", "HETATM")
COORDINATE = re.compile(r" *[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+|nan|inf) *", re.IGNORECASE)
MODEL = re.compile(r"^MODEL", re.MULTILINE)
MODEL_END = re.compile(r"^ENDMDL.*\n?", re.MULTILINE)
MAX_ATOMS = 20 * MAX_NODES  # of the residues of MAX_NODES
FULL = 1.0 - 1e-3  # occupancies are rounded
NO_ALTLOC, NO_INSERTION = 0, ord(" ")  # as gemmi writes them


def read_pdb(text: str, all_atom: bool) -> Iterator[Noted | Rejected]:
    """The structure of a PDB file."""
    import gemmi

    _refuse_damaged(text)
    num_models = len(MODEL.findall(text))
    first_end = MODEL_END.search(text)
    first = text[: first_end.end()] if first_end else text  # a trajectory may hold any number
    if num_models > 1 and not first_end:
        raise Rejected("truncated", f"{num_models} MODEL records and no ENDMDL")
    yield from_gemmi(quietly(lambda: gemmi.read_pdb_string(first)), all_atom, num_models)


@np.errstate(over="ignore", invalid="ignore")  # coordinates that are NaN or absurd have a verdict afterwards
def from_gemmi(found: gemmi.Structure, all_atom: bool, num_models: int = 0) -> Noted:
    """The first model as a Structure: complete amino acids as residue nodes, everything else but water as atoms."""
    import gemmi

    num_models = max(num_models, len(found))
    del found[1:]
    if len(found) and found[0].count_atom_sites() > MAX_ATOMS:
        raise Rejected("too-many-nodes", f"{found[0].count_atom_sites()} atom records")
    notes = [f"the first of {num_models} models"] if num_models > 1 else []
    notes += _file_notes(quietly(lambda: gemmi.FlatStructure(found)))  # refuses names of 8 characters
    found.remove_alternative_conformations()
    found.remove_waters()
    flat: Any = quietly(lambda: gemmi.FlatStructure(found))  # its stubs call the arrays objects
    if len(flat.pos) == 0:
        raise Rejected("no-atoms", "no atom records but water, if any")
    res_name = _strings(flat.residue_names)
    fields = nodes_from_atoms(
        coord=flat.pos,
        numbers=element_numbers(np.char.decode(flat.element_names)),
        atom_name=_strings(flat.atom_names),
        res_name=res_name,
        chain=_strings(flat.chain_ids),
        res_id=flat.resnums,
        ins_code=flat.icodes.astype(str),
        hetero=flat.het_flags == ord("H"),
        residues=not all_atom,
    )
    structure = Structure(**fields)
    amino = any(RESIDUE_ALIASES.get(name, name) in RESIDUE_ID for name in np.unique(res_name).tolist())
    if amino and not all_atom and not structure.is_residue.any():
        raise Rejected("no-usable-residues", "there are amino acids, none with N, CA and C")
    if not all_atom:
        notes += _residue_notes(structure, flat, res_name)
    return Noted(structure, tuple(notes))


def _file_notes(flat: Any) -> list[str]:
    """What is odd about the atoms of the first model as they stand in the file."""
    names, notes = _strings(flat.residue_names), []
    other_places = int((flat.altlocs != NO_ALTLOC).sum())
    if other_places:
        notes.append(f"{count_of(other_places, 'atom')} at alternative locations: the first of each is read")
    occupancy = np.where(flat.altlocs != NO_ALTLOC, 1.0, flat.occ)
    if (occupancy < FULL).any():
        notes.append(f"{count_of((occupancy < FULL).sum(), 'atom')} of an occupancy below 1 read as present")
    columns = (_strings(flat.chain_ids), flat.resnums, flat.icodes, names, _strings(flat.atom_names), flat.altlocs)
    repeated = len(names) - len(set(zip(*(column.tolist() for column in columns), strict=True)))
    if repeated:
        notes.append(f"{count_of(repeated, 'atom')} of a name that its residue has already")
    water = np.isin(names, WATER)
    if water.any():
        notes.append(f"{count_of(water.sum(), 'atom')} of water left out")
    isotopes = int(np.isin(np.char.decode(flat.element_names), tuple(ISOTOPES))[~water].sum())
    if isotopes:
        notes.append(f"{count_of(isotopes, 'atom')} of D or T read as H")
    return notes


def _residue_notes(structure: Structure, flat: Any, res_name: Array) -> list[str]:
    """What became of residues: those named otherwise, left out, inserted, or not bonded to the next."""
    keys = list(zip(_strings(flat.chain_ids), flat.resnums.tolist(), flat.icodes.tolist(), res_name, strict=True))
    residues = dict.fromkeys(keys)
    aliases = Counter(f"{name} read as {RESIDUE_ALIASES[name]}" for *_, name in residues if name in RESIDUE_ALIASES)
    notes = [f"{count_of(count, 'residue')} {what}" for what, count in sorted(aliases.items())]
    unknown = int((structure.node_type == RESIDUE_ID["UNK"]).sum())
    if unknown:
        notes.append(f"{count_of(unknown, 'residue')} outside the vocabulary read as UNK")
    assert structure.chain is not None  # nodes_from_atoms names chains and numbers
    assert structure.residue_index is not None
    kept = set(zip(structure.chain, structure.residue_index.tolist(), strict=True))
    left_out = sum((str(chain), number) not in kept for chain, number, *_ in residues)
    if left_out:
        notes.append(f"{count_of(left_out, 'amino acid')} without N, CA and C left out")
    inserted = len({key[:3] for key in residues if key[2] != NO_INSERTION})
    if inserted:
        notes.append(f"{count_of(inserted, 'residue')} with insertion codes: residue numbers repeat")
    breaks = _chain_breaks(structure)
    if breaks:
        notes.append(count_of(breaks, "chain break"))
    return notes


def _chain_breaks(structure: Structure) -> int:
    """Pairs of residues, neighbours in one chain of the file, without a peptide bond between them."""
    place = np.flatnonzero(structure.is_residue)
    if len(place) < 2 or structure.node_vectors is None or structure.chain is None:
        return 0
    chain = np.array(structure.chain)[place]
    n, c = (structure.positions[place] + structure.node_vectors[place, index] for index in (0, 1))
    apart = np.linalg.norm(c[:-1] - n[1:], axis=1) > BOND
    return int((apart & (chain[:-1] == chain[1:])).sum())


def _strings(padded: Array) -> Array:
    """[A] strings of gemmi's [A, 8] zero-padded characters."""
    return np.char.decode(np.ascontiguousarray(padded).view(f"S{padded.shape[1]}").reshape(-1), "utf-8", "replace")


def _refuse_damaged(text: str) -> None:
    """Refuses columns that hold no numbers, which gemmi reads as some, and files cut short.

    A PDB file has no count to check: a last record that is cut, or an entry of the archive without END, tells.
    """
    lines = text.rstrip("\n").split("\n")
    atoms = [line for line in lines if line.startswith(ATOM_RECORDS)]
    if not atoms:
        return
    for line in atoms:
        fields = (line[30:38], line[38:46], line[46:54])
        if len(line) >= 54 and not all(COORDINATE.fullmatch(field) for field in fields):
            raise Rejected("unreadable", f"columns 31 to 54 should hold x, y and z, they are {line[30:54]!r}")
    last = lines[-1]
    if last.startswith(ATOM_RECORDS) and len(last.rstrip()) < min(54, len(atoms[0].rstrip())):
        raise Rejected("truncated", f"the last record is cut: {last[:60]!r}")
    if not text.endswith("\n") and last.startswith(ATOM_RECORDS) and len(last) < len(atoms[0].rstrip()):
        raise Rejected("truncated", f"the last record is cut: {last[:60]!r}")
    if lines[0].startswith("HEADER") and last.startswith((*ATOM_RECORDS, "ANISOU")):
        raise Rejected("truncated", "the entry has a HEADER, and ends with an atom instead of TER or END")
