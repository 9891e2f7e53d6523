"""The Chemical Component Dictionary from the biotite wheel (BinaryCIF, read as data).

Components that are obsolete, have more than 100 atoms, hold an atom that is no element (X; D is read as H), or have no
complete pose are left out. The ideal pose is preferred (computed, relaxed); where it is incomplete the experimental
(model) pose stands in, and groups["pose"] says which it was. Hydrogens are those of the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
from biotite.structure.io.pdbx import BinaryCIFCategory, BinaryCIFFile

from moiety.data.download import Archive
from moiety.data.splits import select, shuffled
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import ELEMENT_ID

MAX_ATOMS = 100
MEMBER = "biotite/structure/info/components.bcif"
POSES = {"ideal": "pdbx_model_Cartn_{}_ideal", "model": "model_Cartn_{}"}  # in order of preference
NUMBERS = {symbol.upper(): number for symbol, number in ELEMENT_ID.items()} | {"D": 1}


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields components in a hashed order: every prefix is a fair sample."""
    block = BinaryCIFFile.read(io.BytesIO(archives["biotite"].read(MEMBER))).block
    components, atoms = block["chem_comp"], block["chem_comp_atom"]
    fields = {name: components[name].as_array(str) for name in ("id", "name", "pdbx_synonyms", "pdbx_initial_date")}
    poses = {pose: _pose(atoms, columns) for pose, columns in POSES.items()}
    numbers = np.array([NUMBERS.get(symbol, 0) for symbol in atoms["type_symbol"].as_array(str)])
    charges = atoms["charge"].as_array(int, masked_value=0)

    usable = _usable(components, atoms, numbers, poses)
    row_of = {name: row for row, name in enumerate(fields["id"])}
    names = sorted(usable)
    order = [names[index] for index in shuffled(names, salt="ccd")]
    splits = [_split(fields["pdbx_initial_date"][row_of[name]]) for name in order]
    for index in select(splits, options):
        name = order[index]
        row, (span, pose) = row_of[name], usable[name]
        charge = int(charges[span].sum())
        yield Structure(
            node_type=numbers[span],
            positions=poses[pose][span],
            domain="molecule",
            id=name,
            source="ccd",
            charge=charge,
            spin=1 + int(numbers[span].sum() - charge) % 2,  # the lowest that the number of electrons allows
            text=_names(fields["name"][row], fields["pdbx_synonyms"][row]),
            groups={"split": splits[index], "date": fields["pdbx_initial_date"][row], "pose": pose},
        )


def _pose(atoms: BinaryCIFCategory, columns: str) -> Array:
    """[n, 3] Å, nan where the file has no coordinate."""
    xyz = [atoms[columns.format(axis)].as_array(float, masked_value=np.nan) for axis in "xyz"]
    return np.stack(xyz, axis=-1)


def _usable(
    components: BinaryCIFCategory, atoms: BinaryCIFCategory, numbers: Array, poses: Mapping[str, Array]
) -> dict[str, tuple[slice, str]]:
    """Component -> its rows in the table of atoms, and the pose to take."""
    released = components["pdbx_release_status"].as_array(str) != "OBS"
    current = set(components["id"].as_array(str)[released])
    owner = atoms["comp_id"].as_array(str)
    bounds = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1], True])
    found = {}
    for start, stop in pairwise(bounds.tolist()):
        span = slice(start, stop)
        if owner[start] not in current or stop - start > MAX_ATOMS or not numbers[span].all():
            continue
        pose = next((name for name, xyz in poses.items() if _is_complete(xyz[span])), None)
        if pose is not None:
            found[str(owner[start])] = (span, pose)
    return found


def _is_complete(xyz: Array) -> bool:
    """Every atom has its own place (a missing pose is sometimes printed as zeros)."""
    return bool(np.isfinite(xyz).all()) and len(np.unique(xyz, axis=0)) == len(xyz)


def _split(date: str) -> str:
    year = int(date[:4])
    return "train" if year <= 2022 else "val" if year == 2023 else "test"


def _names(name: str, synonyms: str) -> list[str]:
    names = [name, *synonyms.split(";")]
    return [" ".join(text.split()) for text in names if text.strip() not in ("", "?", ".")]
