"""CIF: crystals with their symmetry expanded, or mmCIF, told apart by the tags they use; parsed by gemmi."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moiety.data.readers.macromolecule import FULL, from_gemmi
from moiety.data.readers.text import count_of, quietly
from moiety.data.structure import Structure
from moiety.data.validate import MAX_NODES, Noted, Rejected
from moiety.models.conversion_moiety import ISOTOPES, fields_of

if TYPE_CHECKING:
    import gemmi

MMCIF_TAG = re.compile(r"^[ \t]*_atom_site\.", re.MULTILINE)
MAX_OPERATIONS = 1_000  # the largest space group has 192
ERROR_LINE = re.compile(r"string:(\d+):")


def read(text: str, all_atom: bool) -> Iterator[Noted | Rejected]:
    """The structure of an mmCIF, or that of every block of a CIF."""
    import gemmi

    document = _document(text)
    if MMCIF_TAG.search(text):
        yield from_gemmi(quietly(lambda: gemmi.make_structure_from_block(document[0])), all_atom)
        return
    blocks = [block for block in document if block.find(["_atom_site_label"])]
    if not blocks:
        raise Rejected("no-atoms", "no data block has atom sites")
    for block in blocks:
        try:
            yield _crystal(block)
        except Rejected as rejected:
            yield rejected


def _document(text: str) -> gemmi.cif.Document:
    import gemmi

    try:
        return gemmi.cif.read_string(text)
    except (ValueError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        where = ERROR_LINE.search(message)
        rest = text.split("\n")[int(where.group(1)) :] if where else []
        in_last_loop = where is not None and int(where.group(1)) > 1 and "loop_" not in "\n".join(rest)
        code = "truncated" if in_last_loop else "unreadable"
        raise Rejected(code, f"not a complete CIF ({message})") from None


def _crystal(block: gemmi.cif.Block) -> Noted:
    import gemmi

    small = quietly(lambda: gemmi.make_small_structure_from_block(block))
    partial = [site.label for site in small.sites if site.occ < FULL]
    if partial:
        raise Rejected("partial-occupancy", f"sites {', '.join(partial[:5])} are not fully occupied")
    cell = np.array(small.cell.orth.mat.tolist()).T  # gemmi keeps lattice vectors in columns
    if not small.cell.is_crystal():
        raise Rejected("singular-cell", f"the cell parameters are {small.cell.parameters}")
    notes = _symmetry_notes(small)
    isotopes = sum(site.element.name in ISOTOPES for site in small.sites)
    if isotopes:
        notes.append(f"{count_of(isotopes, 'site')} of D or T read as H")
    sites = quietly(small.get_all_unit_cell_sites)
    positions = [small.cell.orthogonalize(site.fract).tolist() for site in sites]
    structure = Structure(**fields_of([site.element.atomic_number for site in sites], positions, cell, True))
    structure.text = [block.name]
    return Noted(structure, tuple(notes))


def _symmetry_notes(small: gemmi.SmallStructure) -> list[str]:
    """Notes on the symmetry that will be expanded; refuses two that disagree, and more sites than can be wanted."""
    import gemmi

    num_operations = max(len(small.symops), 1)
    if len(small.sites) > MAX_NODES or num_operations > MAX_OPERATIONS:
        raise Rejected("too-many-nodes", f"{len(small.sites)} sites and {num_operations} symmetry operations")
    if not (small.symops or small.spacegroup_hm or small.spacegroup_hall or small.spacegroup_number):
        return ["no symmetry is given: read as P 1"]
    named = gemmi.find_spacegroup_by_name(small.spacegroup_hm, small.cell.alpha, small.cell.gamma)
    if small.symops and named is not None:
        expected = len(named.operations())
        if num_operations != expected:
            reason = f"{small.spacegroup_hm!r} has {expected} operations, {num_operations} are listed"
            raise Rejected("wrong-symmetry", reason)
    if not small.symops and small.spacegroup is None:
        raise Rejected("wrong-symmetry", f"the space group {small.spacegroup_hm!r} is not known")
    return []
