"""S22: 22 complexes of two molecules, their reference interaction energies, and what GFN2-xTB makes of them.

The references are CCSD(T) at the limit of a complete basis (Takatani et al. 2010), as ase.data.s22 has them. For
evaluation only: all of it is test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from ase.data.s22 import create_s22_system, get_interaction_energy_s22, get_number_of_dimer_atoms, s22

from moiety.data.download import Archive
from moiety.data.structure import Structure
from moiety.data.teachers import GFN2xTB, Labeller, available

THEORY = "CCSD(T)/CBS, counterpoise corrected"


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields the complexes in the order of the set: hydrogen bonds, dispersion, both."""
    if not available(GFN2xTB()):
        yield from map(complex_of, s22)
        return
    with Labeller(GFN2xTB()) as labeller:
        for name in s22:
            pair = complex_of(name)
            alone = sum(labeller(molecule).energy for molecule in molecules(pair))
            pair.scalars["interaction_energy_gfn2"] = labeller(pair).energy - alone
            yield pair


def notes(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """Whether the labels of the teacher are there."""
    teacher = GFN2xTB()
    if available(teacher):
        return []
    return [f"built without interaction_energy_gfn2: it needs {teacher.package} (pip install 'moiety[labels]')"]


def complex_of(name: str) -> Structure:
    atoms = create_s22_system(name)
    first, second = get_number_of_dimer_atoms(name)
    return Structure(
        node_type=atoms.numbers,
        positions=atoms.positions,
        domain="complex",
        id=name,
        source="s22",
        chain=["A"] * first + ["B"] * second,
        scalars={"interaction_energy": get_interaction_energy_s22(name)},
        text=[name.replace("_", " ")],
        theory=THEORY,
        groups={"split": "test"},
    )


def molecules(pair: Structure) -> list[Structure]:
    """The two molecules of a complex, each in the geometry it has there."""
    chain = np.array(pair.chain)
    return [Structure(pair.node_type[chain == name], pair.positions[chain == name]) for name in ("A", "B")]
