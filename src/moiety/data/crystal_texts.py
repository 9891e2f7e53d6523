"""What a crystal looks like, in words: symmetry, cell, and the neighbours of every distinct site.

The sentences are generated from the geometry (spglib, pymatgen's CrystalNN: Pan et al., Inorg. Chem. 60, 1590, 2021);
nobody wrote them.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict

from pymatgen.analysis.local_env import CrystalNN
from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
from pymatgen.core import Structure as Crystal
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from moiety.data.structure import Structure

SYMMETRY_TOLERANCE = 0.01  # Å, as in the crystals corpus


def describe(structure: Structure) -> str:
    """A few sentences on a crystal. Lengths in Å, angles in degrees."""
    crystal = _crystal(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of elements without an electronegativity or a radius
        analyzer = SpacegroupAnalyzer(crystal, SYMMETRY_TOLERANCE)
        cell = analyzer.get_conventional_standard_structure().lattice
        sites = _sites(crystal, analyzer)
    names = f" ({', '.join(structure.text)})" if structure.text else ""
    edges = _listed([f"{length:.2f}" for length in cell.abc])
    angles = _listed([f"{angle:.1f}" for angle in cell.angles])
    return " ".join(
        [
            f"{formula(structure)}{names} crystallizes in the {analyzer.get_crystal_system()} space group "
            f"{analyzer.get_space_group_symbol()} ({analyzer.get_space_group_number()}).",
            f"The edges of the conventional cell are {edges} Å, its angles {angles} degrees.",
            *sites,
        ]
    )


def formula(structure: Structure) -> str:
    """The reduced formula of a crystal."""
    return _crystal(structure).composition.reduced_formula


def _crystal(structure: Structure) -> Crystal:
    assert structure.cell is not None  # a crystal
    return Crystal(structure.cell, structure.node_type.tolist(), structure.positions, coords_are_cartesian=True)


def _sites(crystal: Crystal, analyzer: SpacegroupAnalyzer) -> list[str]:
    """One sentence a kind of site: sites of one element with the same neighbours are one kind.

    None of a crystal with an element whose radius is not known (Cf): CrystalNN needs it.
    """
    if any(element.symbol not in CovalentRadius.radius and not element.atomic_radius for element in crystal.elements):
        return []
    dataset = analyzer.get_symmetry_dataset()
    equivalent = dataset.equivalent_atoms.tolist()
    finder = CrystalNN()
    counts: Counter[str] = Counter()
    for site in sorted(set(equivalent)):
        distances: dict[str, list[float]] = defaultdict(list)
        for neighbour in finder.get_nn_info(crystal, site):
            distances[neighbour["site"].specie.symbol].append(
                crystal[site].distance_from_point(neighbour["site"].coords)
            )
        counts[f"{crystal[site].specie.symbol} {_surrounded(distances)}"] += 1
    return [f"{text}{f' ({count} such sites)' if count > 1 else ''}." for text, count in counts.items()]


def _surrounded(distances: dict[str, list[float]]) -> str:
    if not distances:
        return "has no close neighbours"
    parts = []
    for symbol, lengths in sorted(distances.items()):
        shortest, longest = f"{min(lengths):.2f}", f"{max(lengths):.2f}"
        reach = f"at {shortest} Å" if shortest == longest else f"between {shortest} and {longest} Å"
        parts.append(f"{len(lengths)} {symbol} {reach}")
    return f"is surrounded by {_listed(parts)}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
