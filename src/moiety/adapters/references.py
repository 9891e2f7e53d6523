"""Reference energies: what the energy of each element is taken to be, for every level of theory of the labels.

Other sums over atoms have them too, in their own unit.

Total energies of two levels of theory differ by electronvolts an atom, and almost all of a total energy is the sum of
its elements' own. A least-squares fit per element and level of theory takes both out: the network learns the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moiety.data.structure import Array, Structure
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import ELEMENTS, TOKENS

RATIOS = 10.0 ** np.arange(-12, 3)  # that are tried


@dataclass(frozen=True)
class References:
    """Energy of each element in eV, by level of theory; predictions are in the terms of `main`, the most frequent."""

    of_theory: dict[str, dict[str, float]]
    main: str

    @classmethod
    def fit(cls, structures: Sequence[Structure], energies: Array, by_theory: bool = True) -> References:
        """Least squares on total energies [n] in eV.

        Without `by_theory` all structures are of one level, "": other sums have no zero that a method chooses.

        Raises:
            InputError: nodes that are no elements, for example residues.
        """
        level = [s.theory if by_theory else "" for s in structures]
        theories = Counter(level)
        of_theory = {}
        for theory in sorted(theories):
            chosen = [index for index, found in enumerate(level) if found == theory]
            counts = _counts([structures[index] for index in chosen])
            there = np.flatnonzero(counts.any(axis=0))
            solution = _least_squares(counts[:, there], energies[chosen])
            of_theory[theory] = {ELEMENTS[e]: float(value) for e, value in zip(there, solution, strict=True)}
        return cls(of_theory, theories.most_common(1)[0][0])

    @property
    def elements(self) -> dict[str, float]:
        """Symbol -> eV at the level of theory of the predictions."""
        return self.of_theory[self.main]

    def total(self, structure: Structure, theory: str | None = None) -> float:
        """Sum over the atoms of a structure, eV.

        Raises:
            InputError: no reference for one of its elements, or for its level of theory.
        """
        theory = structure.theory if theory is None else theory
        known = self.of_theory.get(theory)
        if known is None:
            raise InputError(
                f"{structure.id}: level of theory {theory!r} is not among those of the training labels: "
                f"{', '.join(map(repr, self.of_theory))}"
            )
        if missing := unknown_elements(structure, known):
            raise InputError(
                f"{structure.id}: no reference energy of {', '.join(missing)}, which no training label at the level "
                f"{theory!r} has; add some that do, or leave the structure out"
            )
        return sum(known[TOKENS[number]] for number in structure.node_type.tolist())

    def aligned(self, structure: Structure, energy: float) -> float:
        """A total energy at the structure's level of theory, moved to the level of the predictions."""
        if structure.theory == self.main:
            return energy
        return energy - self.total(structure) + self.total(structure, self.main)


def unknown_elements(structure: Structure, known: dict[str, float]) -> list[str]:
    """Symbols of the structure's elements, and names of what is none, that have no reference energy."""
    return [TOKENS[number] for number in np.unique(structure.node_type) if TOKENS[number] not in known]


def _counts(structures: Sequence[Structure]) -> Array:
    """[n, elements] atoms of each element."""
    for structure in structures:
        if structure.node_type.max() > len(ELEMENTS):
            raise InputError(f"{structure.id}: has nodes that are no atoms; a task of kind energy is for atoms alone")
    return np.array([np.bincount(s.node_type - 1, minlength=len(ELEMENTS)) for s in structures], dtype=np.float64)


def _least_squares(counts: Array, energies: Array) -> Array:
    """[elements] eV, of energies an atom. Elements are drawn to their mean, as strongly as the labels make likely.

    A few crystals of many elements would otherwise be fitted exactly, and the references would hold what their
    structures say. The ratio of the variances, of what elements do not explain and of the elements' energies, is that
    of the greatest evidence (MacKay 1992, doi:10.1162/neco.1992.4.3.415); where labels are many it does not matter.
    """
    sizes = counts.sum(axis=1)
    per_atom = energies / sizes
    mean = per_atom.mean()
    left, singular, right = np.linalg.svd(counts / sizes[:, None], full_matrices=False)
    rotated = left.T @ (per_atom - mean)
    unexplained = max(float(np.square(per_atom - mean).sum() - np.square(rotated).sum()), 0.0)
    free = len(counts) - len(singular)
    costs = []
    for ratio in RATIOS:
        spread = singular**2 + ratio
        variance = (np.sum(rotated**2 / spread) + unexplained / ratio) / len(counts)
        costs.append(len(counts) * np.log(max(variance, 1e-300)) + np.log(spread).sum() + free * np.log(ratio))
    best = RATIOS[int(np.argmin(costs))]
    return mean + right.T @ (singular / (singular**2 + best) * rotated)
