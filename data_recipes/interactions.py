"""Pairs of small neutral molecules of the CCD, at four distances each, labelled by GFN2-xTB.

A pair is two molecules in their ideal poses, the second turned at random and shifted along a random direction until the
closest two atoms are a given number of van der Waals sums apart. Nothing is relaxed: the closest pairs repel.
"""
# Shapes: A, B atoms of the two molecules.

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from ase.data.vdw import vdw_radii
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.splits import SPLITS, place
from moiety.data.structure import Array, Structure
from moiety.data.teachers import GFN2xTB, Labeller

MAX_HEAVY, MAX_ATOMS, MIN_ATOMS = 8, 18, 3
NUMBERS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 35))
CONTACTS = (0.85, 1.0, 1.2, 1.6)  # sums of van der Waals radii
MAX_SHIFT = 30.0  # Å: molecules of this size are apart by then
PRECISION = 1e-4  # Å
MAX_FORCE = 50.0  # eV/Å: poses of the dictionary that are no molecules


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields, split after split, pairs of neighbours in the hashed order of ccd; a molecule is in one pair at most."""
    molecules = [m for m in load_recipe("ccd").module().structures(archives, {}) if is_small(m)]
    with Labeller(GFN2xTB()) as labeller:
        for split in SPLITS:
            members = [molecule for molecule in molecules if molecule.groups["split"] == split]
            pairs = zip(members[::2], members[1::2], strict=False)  # of an odd number the last has no partner
            yield from _up_to(options.get(split, len(members) * len(CONTACTS)), pairs, labeller)


def is_small(molecule: Structure) -> bool:
    """Neutral, closed-shell and organic, of few atoms."""
    numbers = molecule.node_type
    return (
        (molecule.charge, molecule.spin) == (0, 1)
        and MIN_ATOMS <= len(numbers) <= MAX_ATOMS
        and np.count_nonzero(numbers > 1) <= MAX_HEAVY
        and 6 in numbers
        and set(numbers.tolist()) <= NUMBERS
    )


def _up_to(count: int, pairs: Iterator[tuple[Structure, Structure]], labeller: Labeller) -> Iterator[Structure]:
    for first, second in pairs:
        if count <= 0:
            return
        alone = [labeller(molecule) for molecule in (first, second)]
        if max(np.linalg.norm(labels.forces, axis=1).max() for labels in alone) > MAX_FORCE:
            continue
        for contact in CONTACTS[:count]:
            pair = placed(first, second, contact)
            labels = labeller(pair)
            pair.energy, pair.forces, pair.theory = labels.energy, labels.forces, labeller.teacher.theory
            pair.scalars["interaction_energy"] = labels.energy - sum(labels.energy for labels in alone)
            yield pair
        count -= len(CONTACTS)


def placed(first: Structure, second: Structure, contact: float) -> Structure:
    """The pair at a contact distance; turn and direction depend on the names alone, and are shared by all distances."""
    name = f"{first.id}+{second.id}"
    rng = np.random.default_rng(int(place(name, "interactions") * 2**53))
    here = first.positions - first.positions.mean(axis=0)
    there = Rotation.random(rng=rng).apply(second.positions - second.positions.mean(axis=0))
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    reach = contact * (vdw_radii[first.node_type][:, None] + vdw_radii[second.node_type])
    return Structure(
        node_type=np.concatenate([first.node_type, second.node_type]),
        positions=np.vstack([here, there + shift(here, there, direction, reach) * direction]),
        domain="complex",
        id=f"{name}:{contact}",
        source="interactions",
        chain=["A"] * first.num_nodes + ["B"] * second.num_nodes,
        scalars={"contact": contact},
        text=[f"{first.text[0]} and {second.text[0]}"] if first.text and second.text else [],
        groups={"split": first.groups["split"], "first": first.id, "second": second.id, "pair": name},
    )


def shift(here: Array, there: Array, direction: Array, reach: Array) -> float:
    """The shortest way (Å) beyond which no atom of `there` [B, 3] comes within reach [A, B] of one of `here` [A, 3]."""
    inside, outside = 0.0, MAX_SHIFT
    if bool((cdist(here, there) >= reach).all()):
        return 0.0
    while outside - inside > PRECISION:
        middle = (inside + outside) / 2
        if (cdist(here, there + middle * direction) >= reach).all():
            outside = middle
        else:
            inside = middle
    return outside
