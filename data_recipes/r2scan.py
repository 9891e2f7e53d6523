"""Crystals on the prototypes of `crystals` with more of their substitutions, labelled by CHGNet, to pretrain on.

Each has a strained and rattled copy. Families of prototypes are in the split that they have in `crystals`: none of
its test or validation set is in train. No label is one that a recipe is tested on: those are of SevenNet-0, a model of
PBE. An energy is that of an atom, and stress is a virial (stress times volume), so that both compare between cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.splits import portion, select, shuffled
from moiety.data.structure import Structure
from moiety.data.teachers import CHGNetR2SCAN, Labeller

MAX_FORCE = 20.0  # eV/Å: beyond it atoms are crammed, and the teacher extrapolates


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each repeats the substitutions, and labels its share."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields the first `options[split]` crystals of each split, of at most `options["variants"]` of a prototype."""
    chosen = portion(unlabelled(archives["pymatgen"], tuple(options.items())), part, options.get("parts", 1))
    with Labeller(CHGNetR2SCAN()) as labeller:
        for crystal in labeller.applied(chosen):
            if crystal.forces is not None and np.linalg.norm(crystal.forces, axis=1).max() <= MAX_FORCE:
                yield relative(crystal)


@cache  # of a process, for all its parts
def unlabelled(pymatgen: Archive, options: tuple[tuple[str, int], ...]) -> list[Structure]:
    """The crystals of all parts, in a hashed order."""
    crystals, numbers = load_recipe("crystals").module(), dict(options)
    prototypes = list(crystals.aflow_prototypes(pymatgen))
    for prototype in prototypes:
        crystals.classify(prototype)
    variants = [v for prototype in prototypes for v in crystals.substituted(prototype, numbers["variants"])]
    variants = [variants[index] for index in shuffled((v.id for v in variants), salt="r2scan")]
    copies = [copy for variant in variants for copy in (variant, crystals.rattled(variant, 1))]
    chosen = select([copy.groups["split"] for copy in copies], numbers)
    return [replace(copies[index], source="r2scan") for index in chosen]


def relative(crystal: Structure) -> Structure:
    """The energy of an atom, and the virial, in the place of the energy and the stress of the cell."""
    assert crystal.energy is not None and crystal.stress is not None and crystal.cell is not None
    per_atom = crystal.energy / crystal.num_nodes
    virial = crystal.stress * np.linalg.det(crystal.cell)
    return replace(crystal, energy=None, stress=None, scalars={"energy_per_atom": per_atom}, tensors={"virial": virial})
