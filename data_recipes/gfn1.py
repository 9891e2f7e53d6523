"""Molecules of QM9 and small ones of the CCD with energy, forces, dipole, gap and charges of GFN1-xTB, to pretrain on.

Every other molecule of QM9 stays at its minimum by DFT; the others, and those of the CCD, are shaken off theirs. No
molecule of a test or validation set of `qm9` or `forces` is in train, and no label is one that a recipe is tested on:
those are of B3LYP and of GFN2-xTB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.splits import place, portion
from moiety.data.structure import Structure
from moiety.data.teachers import GFN1xTB, Labeller

SIGMAS = (0.03, 0.10)  # Å


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each reads qm9 and ccd, and labels its share of the molecules."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields the first `options[split]` molecules of each split of qm9, then the first `options["ccd"]` of ccd's."""
    forces, pairs = (load_recipe(name).module() for name in ("forces", "interactions"))
    from_qm9 = list(load_recipe("qm9").module().structures(archives, options, [0, None]))
    small = pairs.distinct(m for m in load_recipe("ccd").module().structures(archives, {}) if forces.is_small(m))
    chosen = [placed(molecule, shaken=number % 2 == 1) for number, molecule in enumerate(from_qm9)]
    chosen += [placed(molecule, shaken=True) for molecule in small["train"][: options["ccd"]]]
    with Labeller(GFN1xTB()) as labeller:
        for labelled in labeller.applied(portion(chosen, part, options.get("parts", 1))):
            if labelled.forces is not None and np.linalg.norm(labelled.forces, axis=1).max() <= forces.MAX_FORCE:
                yield labelled


def placed(molecule: Structure, shaken: bool) -> Structure:
    """The molecule without its labels, as it is or in another geometry that depends on its name alone."""
    rng = np.random.default_rng(int(place(molecule.id, "gfn1") * 2**53))
    sigma = float(rng.uniform(*SIGMAS)) if shaken else 0.0
    return Structure(
        node_type=molecule.node_type,
        positions=molecule.positions + rng.normal(0, sigma, molecule.positions.shape),
        domain="molecule",
        id=molecule.id,
        source="gfn1",
        scalars={"sigma": sigma},
        text=molecule.text[:1],
        groups={"split": molecule.groups["split"]},
    )
