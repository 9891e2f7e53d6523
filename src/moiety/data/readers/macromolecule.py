"""PDB and mmCIF through gemmi: residues by default, atoms on request.

Of several models the first is read, of alternative locations the first; waters are dropped.
"""
# Shapes: A atoms, N nodes.

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moiety.data.readers.text import quietly
from moiety.data.structure import Array, Structure
from moiety.data.validate import Rejected
from moiety.models.conversion_moiety import RESIDUE_ALIASES, element_numbers, nodes_from_atoms
from moiety.models.vocabulary_moiety import RESIDUE_ID

if TYPE_CHECKING:
    import gemmi

ATOM_RECORDS = ("ATOM", "HETATM")


def read_pdb(text: str, all_atom: bool) -> Iterator[Structure | Rejected]:
    """The structure of a PDB file."""
    import gemmi

    _refuse_truncated(text)
    yield from_gemmi(quietly(lambda: gemmi.read_pdb_string(text)), all_atom)


def from_gemmi(found: gemmi.Structure, all_atom: bool) -> Structure:
    """The first model as a Structure: complete amino acids as residue nodes, everything else but water as atoms."""
    import gemmi

    while len(found) > 1:
        del found[1]
    found.remove_alternative_conformations()
    found.remove_waters()
    flat: Any = gemmi.FlatStructure(found)  # its stubs call the arrays objects
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
    return structure


def _strings(padded: Array) -> Array:
    """[A] strings of gemmi's [A, 8] zero-padded characters."""
    return np.char.decode(np.ascontiguousarray(padded).view(f"S{padded.shape[1]}").reshape(-1), "utf-8")


def _refuse_truncated(text: str) -> None:
    """A PDB file has no count to check: a last record that is cut, or an entry of the archive without END, tells."""
    lines = text.rstrip("\n").split("\n")
    atoms = [line for line in lines if line.startswith(ATOM_RECORDS)]
    if not atoms:
        return
    last = lines[-1]
    if last.startswith(ATOM_RECORDS) and len(last.rstrip()) < min(54, len(atoms[0].rstrip())):
        raise Rejected("truncated", f"the last record is cut: {last[:60]!r}")
    if not text.endswith("\n") and last.startswith(ATOM_RECORDS) and len(last) < len(atoms[0].rstrip()):
        raise Rejected("truncated", f"the last record is cut: {last[:60]!r}")
    if lines[0].startswith("HEADER") and last.startswith((*ATOM_RECORDS, "ANISOU")):
        raise Rejected("truncated", "the entry has a HEADER, and ends with an atom instead of TER or END")
