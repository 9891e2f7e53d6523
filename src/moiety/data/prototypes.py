"""The prototype of a crystal: what is left of it without its elements and its measures, in AFLOW's notation."""

from __future__ import annotations

import warnings

import numpy as np
from pymatgen.analysis.prototypes import get_protostructure_label_from_spg_analyzer
from pymatgen.core import Structure as Crystal
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from moiety.data.structure import Structure

SYMMETRY_TOLERANCE = 0.01  # Å


def prototype(structure: Structure, tolerance: float = SYMMETRY_TOLERANCE) -> str:
    """Formula, Pearson symbol, space group and Wyckoff letters, such as AB2_cP12_205_a_c (pyrite).

    Args:
        structure: a crystal.
        tolerance: Å, by which atoms may miss the place that symmetry gives them.

    Returns:
        "" where no symmetry is found that all atoms obey, and for what is not periodic in three directions.
    """
    if structure.cell is None or not np.all(structure.pbc):
        return ""
    numbers = structure.node_type.tolist()
    crystal = Crystal(structure.cell, numbers, structure.positions, coords_are_cartesian=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen: its own deprecations, and that argon has no electronegativity
        try:
            analyzer = SpacegroupAnalyzer(crystal, tolerance)
            return get_protostructure_label_from_spg_analyzer(analyzer, raise_errors=True).split(":")[0]
        except ValueError:  # pymatgen: spglib found none, or sites that are not a whole number of its orbits
            return ""
