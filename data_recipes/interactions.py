"""Pairs of small neutral molecules of the CCD, at four distances each, labelled by GFN2-xTB.

A pair is two molecules in their ideal poses, the second turned at random and shifted along a random direction until the
closest two atoms are a given number of van der Waals sums apart. Nothing is relaxed: the closest pairs repel. A
molecule is in one pair, as long as its split has enough of them, and never in two splits.
"""
# Shapes: A, B atoms of the two molecules.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
from ase.data.vdw import vdw_radii
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.leak.molecules import bonded, constitution
from moiety.data.splits import SPLITS, place, portion
from moiety.data.structure import Array, Structure
from moiety.data.teachers import GFN2xTB, Labeller

MAX_HEAVY, MAX_ATOMS, MIN_ATOMS = 8, 18, 3
NUMBERS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 35))
CONTACTS = (0.85, 1.0, 1.2, 1.6)  # sums of van der Waals radii
MAX_SHIFT = 30.0  # Å: molecules of this size are apart by then
PRECISION = 1e-4  # Å


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each reads ccd, and labels its share of the pairs."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields, split after split, `options[split]` pairs of molecules that follow each other in the order of ccd."""
    members = distinct(m for m in load_recipe("ccd").module().structures(archives, {}) if is_small(m))
    wanted = [poses for split in SPLITS for poses in islice(_poses(members[split]), options[split])]
    with Labeller(GFN2xTB()) as labeller:
        for first, second, contact in portion(wanted, part, options.get("parts", 1)):
            pair = placed(first, second, contact)
            labels = labeller(pair)
            pair.energy, pair.forces, pair.theory = labels.energy, labels.forces, labeller.teacher.theory
            alone = labeller(first).energy + labeller(second).energy
            pair.scalars["interaction_energy"] = labels.energy - alone
            yield pair


def distinct(molecules: Iterable[Structure]) -> dict[str, list[Structure]]:
    """Split -> its molecules, one of each constitution; a constitution belongs to the first split that has it.

    The dictionary holds some molecules under two names, and stereoisomers. What is no single molecule is left out.
    """
    members: dict[str, dict[str, Structure]] = {split: {} for split in SPLITS}
    for molecule in molecules:
        graph = bonded(molecule)
        if graph is not None and "." not in (key := constitution(graph)):
            members[molecule.groups["split"]].setdefault(key, molecule)
    taken: set[str] = set()
    found = {}
    for split, by_constitution in members.items():
        found[split] = [molecule for key, molecule in by_constitution.items() if key not in taken]
        taken |= set(by_constitution)
    return found


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


def pairs(size: int) -> Iterator[tuple[int, int]]:
    """All pairs of `size` things, once each: neighbours first, and those that share no thing before the others."""
    for lag in range(1, size // 2 + 1):
        starts = size if 2 * lag < size else lag  # beyond half the way round, pairs come again
        for start in (*range(0, starts, 2), *range(1, starts, 2)):
            yield start, (start + lag) % size


def _poses(members: list[Structure]) -> Iterator[tuple[Structure, Structure, float]]:
    for first, second in pairs(len(members)):
        for contact in CONTACTS:
            yield members[first], members[second], contact


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
