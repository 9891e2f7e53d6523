"""Are two crystals one? Cells are reduced and mapped by pymatgen."""

from __future__ import annotations

from typing import Any

import numpy as np
import spglib
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure as Crystal

from moiety.data.leak.fingerprint import lattice
from moiety.data.structure import Structure

MAX_SITES = 400  # of a cell that is matched


def primitive(structure: Structure, tolerance: float) -> list[Crystal]:
    """The primitive cell, as spglib and as pymatgen see it: of a rattled supercell either may find the wrong one.

    Args:
        structure: a periodic structure.
        tolerance: Å, by which atoms may miss the place where a translation puts them.
    """
    crystal = _crystal(structure)
    cell: Any = (crystal.lattice.matrix, crystal.frac_coords, structure.node_type)
    standard: Any = spglib.standardize_cell(cell, to_primitive=True, no_idealize=True, symprec=tolerance)
    reduced = crystal.get_primitive_structure()
    if standard is None:  # no symmetry, not even of the identity: spglib 2 says so for some cells
        return [reduced]
    vectors, fractions, node_type = standard
    return [Crystal(vectors, node_type.tolist(), fractions), reduced]


def matched_rms(first: list[Crystal], second: list[Crystal]) -> float | None:
    """Å, root mean square displacement between two primitive cells on their mean lattice; None where they do not match.

    Mirror images match: cells are mapped by any lattice symmetry. Lattices are compared as they are, not scaled.

    Args:
        first: one crystal, from `primitive`: its views are tried against the same views of the other.
        second: the other.
    """
    matcher = StructureMatcher(ltol=0.1, stol=0.2, angle_tol=3, primitive_cell=False, scale=False)
    for a, b in zip(first, second, strict=False):
        found = matcher.get_rms_dist(a, b) if len(a) == len(b) <= MAX_SITES else None
        if found is not None:
            return float(found[0] * np.cbrt((a.volume + b.volume) / 2 / len(a)))
    return None


def _crystal(structure: Structure) -> Crystal:
    return Crystal(lattice(structure), structure.node_type.tolist(), structure.positions, coords_are_cartesian=True)
