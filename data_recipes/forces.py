"""Small neutral molecules of the CCD, each shaken off its ideal pose into one geometry, labelled by GFN2-xTB.

Every coordinate is moved by Gaussian noise whose width is the molecule's own, drawn with the noise from its name.
Nothing is relaxed. Molecules of ccd's train stay in train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import numpy as np

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.splits import SPLITS, place, portion
from moiety.data.structure import Structure
from moiety.data.teachers import GFN2xTB, Labeller

MAX_ATOMS, MIN_ATOMS = 30, 4
NUMBERS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 35))
SIGMAS = (0.03, 0.10)  # Å
MAX_FORCE = 50.0  # eV/Å: beyond it two atoms were thrown at each other
NUM_VAL = 310  # of ccd's val; its test alone has too few of these molecules


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each reads ccd, and labels its share of the molecules."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields the first `options[split]` molecules of split after split, in the order of ccd."""
    molecules = load_recipe("ccd").module().structures(archives, {})
    members = held_out(load_recipe("interactions").module().distinct(m for m in molecules if is_small(m)))
    wanted = list(chain.from_iterable(members[split][: options[split]] for split in SPLITS))
    with Labeller(GFN2xTB()) as labeller:
        for molecule in portion(wanted, part, options.get("parts", 1)):
            for labelled in labeller.applied([rattled(molecule)]):
                if labelled.forces is not None and np.linalg.norm(labelled.forces, axis=1).max() <= MAX_FORCE:
                    yield labelled


def is_small(molecule: Structure) -> bool:
    """Neutral, closed-shell and organic, of few atoms, in the ideal pose."""
    numbers = molecule.node_type
    return (
        (molecule.charge, molecule.spin) == (0, 1)
        and MIN_ATOMS <= len(numbers) <= MAX_ATOMS
        and 6 in numbers
        and set(numbers.tolist()) <= NUMBERS
        and molecule.groups["pose"] == "ideal"
    )


def held_out(members: Mapping[str, list[Structure]]) -> dict[str, list[Structure]]:
    """The splits of ccd with all but the first NUM_VAL of val moved to the end of test."""
    found = dict(members)
    found["val"], found["test"] = members["val"][:NUM_VAL], members["test"] + members["val"][NUM_VAL:]
    for split, molecules in found.items():
        for molecule in molecules:
            molecule.groups["split"] = split
    return found


def rattled(molecule: Structure) -> Structure:
    """The molecule in another geometry; noise and its width depend on the name alone."""
    rng = np.random.default_rng(int(place(molecule.id, "forces") * 2**53))
    sigma = float(rng.uniform(*SIGMAS))
    return Structure(
        node_type=molecule.node_type,
        positions=molecule.positions + rng.normal(0, sigma, molecule.positions.shape),
        domain="molecule",
        id=molecule.id,
        source="forces",
        scalars={"sigma": sigma},
        text=molecule.text[:1],
        groups={"split": molecule.groups["split"]},
    )
