"""CIF: crystals with their symmetry expanded, or mmCIF, told apart by the tags they use; parsed by gemmi."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moiety.data.readers.macromolecule import from_gemmi
from moiety.data.readers.text import quietly
from moiety.data.structure import Structure
from moiety.data.validate import Rejected
from moiety.models.conversion_moiety import fields_of

if TYPE_CHECKING:
    import gemmi

FULL = 1.0 - 1e-3  # occupancies are rounded
MMCIF_TAG = re.compile(r"^\s*_atom_site\.", re.MULTILINE)
ERROR_LINE = re.compile(r"string:(\d+):")


def read(text: str, all_atom: bool) -> Iterator[Structure | Rejected]:
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


def _crystal(block: gemmi.cif.Block) -> Structure:
    import gemmi

    small = quietly(lambda: gemmi.make_small_structure_from_block(block))
    partial = [site.label for site in small.sites if site.occ < FULL]
    if partial:
        raise Rejected("partial-occupancy", f"sites {', '.join(partial[:5])} are not fully occupied")
    cell = np.array(small.cell.orth.mat.tolist()).T  # gemmi keeps lattice vectors in columns
    if not small.cell.is_crystal():
        raise Rejected("singular-cell", f"the cell parameters are {small.cell.parameters}")
    sites = quietly(small.get_all_unit_cell_sites)
    positions = [small.cell.orthogonalize(site.fract).tolist() for site in sites]
    structure = Structure(**fields_of([site.element.atomic_number for site in sites], positions, cell, True))
    structure.text = [block.name]
    return structure
