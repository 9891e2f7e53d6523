"""Molecules of QM9 with the dipole and polarizability that GFN2-xTB gives them, as tensors.

QM9 itself has their norms and traces alone, which do not turn with the molecule. Splits are those of QM9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moiety.data.build import load_recipe
from moiety.data.download import Archive
from moiety.data.splits import portion
from moiety.data.structure import Structure
from moiety.data.teachers import GFN2xTBResponse, Labeller


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each reads qm9, and labels its share of the molecules."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields the first `options[split]` molecules of each split of qm9."""
    molecules = list(load_recipe("qm9").module().structures(archives, options, [0, None]))
    with Labeller(GFN2xTBResponse()) as labeller:
        chosen = portion([bare(molecule) for molecule in molecules], part, options.get("parts", 1))
        yield from labeller.applied(chosen)


def bare(molecule: Structure) -> Structure:
    """The molecule without the labels of qm9, which are of another level of theory."""
    return Structure(
        node_type=molecule.node_type,
        positions=molecule.positions,
        domain="molecule",
        id=molecule.id,
        source="polarizabilities",
        text=molecule.text,
        groups={"split": molecule.groups["split"]},
    )
