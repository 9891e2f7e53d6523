"""Molecules of QM9 and small ones of the CCD with energy, forces, dipole, gap and charges of GFN1-xTB, to pretrain on.

Every other molecule of QM9 stays at its minimum by DFT; the others, and those of the CCD, are shaken off theirs. No
molecule of a test or validation set of `qm9` or `forces` is in train, nor one of QM9 with a constitution of those of
`forces`, nor one of the CCD with a constitution of those of `qm9`. No label is one that a recipe is tested on: those
are of B3LYP and of GFN2-xTB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import numpy as np

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.leak.molecules import bonded, constitution
from moiety.data.splits import place, portion
from moiety.data.structure import Structure
from moiety.data.teachers import GFN1xTB, Labeller

SIGMAS = (0.03, 0.10)  # Å


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each reads qm9 and ccd, and labels its share of the molecules."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields the first `options[split]` molecules of each split of qm9, then the first `options["ccd"]` of ccd's."""
    chosen = _chosen(archives["qm9pack"], archives["biotite"], tuple(options.items()))
    largest = load_recipe("forces").module().MAX_FORCE
    with Labeller(GFN1xTB()) as labeller:
        for labelled in labeller.applied(portion(chosen, part, options.get("parts", 1))):
            if labelled.forces is not None and np.linalg.norm(labelled.forces, axis=1).max() <= largest:
                yield labelled


@cache  # of a process, for all its parts: bonds of ten thousands of molecules are looked for
def _chosen(qm9pack: Archive, biotite: Archive, options: tuple[tuple[str, int], ...]) -> list[Structure]:
    """The molecules without labels, in a fixed order."""
    archives, numbers = {"qm9pack": qm9pack, "biotite": biotite}, dict(options)
    forces, pairs, qm9 = (load_recipe(name).module() for name in ("forces", "interactions", "qm9"))
    small = pairs.distinct(m for m in load_recipe("ccd").module().structures(archives, {}) if forces.is_small(m))
    from_qm9 = list(qm9.structures(archives, numbers, [0, None]))
    shaken = {molecule.id for molecule in from_qm9[1::2]}
    from_qm9 = apart(from_qm9, [*small["val"], *small["test"]])
    of_ccd = apart(small["train"], qm9.structures(archives, {"train": 0}, [0, None]))[: numbers["ccd"]]
    chosen = [placed(molecule, molecule.id in shaken) for molecule in from_qm9]
    return chosen + [placed(molecule, shaken=True) for molecule in of_ccd]


def apart(molecules: Iterable[Structure], held_out: Iterable[Structure]) -> list[Structure]:
    """Without those of train that have the constitution of one held out."""
    molecules, held_out = list(molecules), list(held_out)
    shared = {_formula(m) for m in molecules} & {_formula(m) for m in held_out}  # bonds of the others do not matter
    taken = {_constitution(m) for m in held_out if _formula(m) in shared}
    return [
        m
        for m in molecules
        if m.groups["split"] != "train" or _formula(m) not in shared or _constitution(m) not in taken
    ]


def _formula(molecule: Structure) -> bytes:
    return np.sort(molecule.node_type).tobytes()


def _constitution(molecule: Structure) -> str:
    graph = bonded(molecule)
    return "" if graph is None else constitution(graph)


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
