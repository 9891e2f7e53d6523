"""Crystals: real cells of three collections, and the AFLOW prototypes with elements of the same group put in.

A substituted crystal is a guess, not a measurement: the prototype's fractional coordinates, other elements of the same
groups of the periodic table, and the cell scaled isotropically by the cube root of (sum of cubed covalent radii, new /
old), so that lengths suit the new elements. Angles and axis ratios stay those of the prototype; nothing is relaxed.

In a fifth of these all atoms stand at points of symmetry, where forces vanish. In a rattled copy they do not: its cell
is strained and its atoms are displaced at random, by amounts that depend on its name alone.

Where the extra `labels` is installed a teacher model (SevenNet-0) gives energy, forces and stress of all of them.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
from ase.data import covalent_radii
from ase.geometry import cellpar_to_cell
from pymatgen.core import Structure as Crystal

from moiety.data.download import Archive
from moiety.data.prototypes import prototype
from moiety.data.splits import place, portion, select, shuffled, split_of
from moiety.data.structure import Array, Structure
from moiety.data.teachers import Labeller, SevenNet0, available
from moiety.models.vocabulary_moiety import ELEMENT_ID, ELEMENTS

# Elements that stand in for each other. Noble gases, and what is too radioactive to have a solid of its own, do not.
FAMILIES = [
    "H", "Li Na K Rb Cs", "Be Mg Ca Sr Ba", "Sc Y La Ce Pr Nd Sm Eu Gd Tb Dy Ho Er Tm Yb Lu", "Ti Zr Hf", "V Nb Ta",
    "Cr Mo W", "Mn Re", "Fe Ru Os", "Co Rh Ir", "Ni Pd Pt", "Cu Ag Au", "Zn Cd Hg", "B Al Ga In Tl", "C Si Ge Sn Pb",
    "N P As Sb Bi", "O S Se Te", "F Cl Br I", "Th U",
]  # fmt: skip
SUBSTITUTES = {
    ELEMENT_ID[symbol]: [ELEMENT_ID[other] for other in row.split()] for row in FAMILIES for symbol in row.split()
}
MIN_CONTACT = 0.7  # of the sum of covalent radii: closer atoms are a bad guess
MIN_VOLUME = 5.0  # Å^3 an atom (diamond has 5.7): light elements in a high-pressure prototype are another
MAX_FORCE = 50.0  # eV/Å: beyond, the teacher extrapolates, and the structure stays without labels
FAMILY_TOLERANCE = 0.1  # Å: descriptions of one structure with and without its last digits are one family
RATTLE = 0.05  # Å, standard deviation of each coordinate
MAX_STRAIN = 0.03
SEED = 20261122


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each repeats the search for prototypes, and labels its share."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields real and substituted crystals in a hashed order, at most `options["variants"]` of a prototype.

    Each is followed by `options["rattled"]` copies that are strained and rattled.
    """
    chosen = portion(unlabelled(archives, options), part, options.get("parts", 1))
    if not available(SevenNet0()):
        yield from chosen
        return
    with Labeller(SevenNet0()) as labeller:
        for crystal in labeller.applied(chosen):
            if crystal.forces is not None and np.linalg.norm(crystal.forces, axis=1).max() > MAX_FORCE:
                crystal.energy = crystal.forces = crystal.stress = None
                crystal.theory = ""
            yield crystal


def unlabelled(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[Structure]:
    """The crystals of all parts, before the teacher sees them."""
    aflow = list(aflow_prototypes(archives["pymatgen"]))
    real = [*aflow, *_dcdft(archives["ase"])]
    if "libncrystal-data" in archives:
        real += _ncrystal(archives["libncrystal-data"])
    for crystal in real:
        classify(crystal)
    crystals = real + [variant for crystal in aflow for variant in substituted(crystal, options.get("variants", 0))]
    crystals = [crystals[index] for index in shuffled((crystal.id for crystal in crystals), salt="crystals")]
    copies = [(crystal, copy) for crystal in crystals for copy in range(1 + options.get("rattled", 0))]
    chosen = select([crystal.groups["split"] for crystal, _ in copies], options)
    return [rattled(crystal, copy) if copy else crystal for crystal, copy in map(copies.__getitem__, chosen)]


def notes(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """Whether the labels are there."""
    teacher = SevenNet0()
    if available(teacher):
        return []
    return [f"built without labels: {teacher.theory} needs {teacher.package} (pip install 'moiety[labels]')"]


def aflow_prototypes(archive: Archive) -> Iterator[Structure]:
    entries = json.loads(gzip.decompress(archive.read("pymatgen/analysis/prototypes/aflow_prototypes.json.gz")))
    for index, entry in enumerate(entries):
        sites = entry["snl"]["sites"]
        names = [entry["tags"][key] for key in ("mineral", "strukturbericht") if entry["tags"][key] not in ("", "None")]
        yield _crystal(
            f"aflow:{index}:{entry['tags']['aflow']}",
            [ELEMENT_ID[site["species"][0]["element"]] for site in sites],
            [site["xyz"] for site in sites],
            entry["snl"]["lattice"]["matrix"],
            names,
        )


def _dcdft(archive: Archive) -> Iterator[Structure]:
    for entry in json.loads(archive.read("ase/collections/dcdft.json")).values():
        if isinstance(entry, dict) and "numbers" in entry:
            name = entry["key_value_pairs"]["name"]
            yield _crystal(f"dcdft:{name}", entry["numbers"], entry["positions"], entry["cell"], [name])


def _ncrystal(archive: Archive) -> Iterator[Structure]:
    for path, stream in archive.members():
        crystal = _ncmat(path.rsplit("/", 1)[-1].removesuffix(".ncmat"), stream.read().decode())
        if crystal is not None:
            yield crystal


def _ncmat(name: str, text: str) -> Structure | None:
    """One NCMAT file: sections that open with @NAME. None for those without a crystal (liquids, gases, plastics)."""
    sections: dict[str, list[list[str]]] = {}
    lines: list[list[str]] = []
    for line in text.splitlines()[1:]:
        words = line.split("#")[0].split()
        if words and words[0].startswith("@"):
            lines = sections.setdefault(words[0], [])
        elif words:
            lines.append(words)
    if "@ATOMPOSITIONS" not in sections or "@ATOMDB" in sections:  # @ATOMDB redefines elements: alloys, placeholders
        return None
    cell = {key: values for key, *values in sections["@CELL"]}
    if "cubic" in cell:
        lengths, angles = [float(cell["cubic"][0])] * 3, [90.0] * 3
    else:
        lengths, angles = [], [float(value) for value in cell["angles"]]
        for value in cell["lengths"]:
            lengths.append(lengths[-1] if value == "!!" else float(value))  # !! repeats the one before
    cell_33 = cellpar_to_cell([*lengths, *angles])
    fractions = np.array([[float(Fraction(value)) for value in words[1:4]] for words in sections["@ATOMPOSITIONS"]])
    numbers = [ELEMENT_ID["H" if words[0] == "D" else words[0]] for words in sections["@ATOMPOSITIONS"]]
    return _crystal(f"ncrystal:{name}", numbers, fractions @ cell_33, cell_33, name.split("_")[2:])


def _crystal(identity: str, numbers: list[int], positions: Array, cell: Array, names: list[str]) -> Structure:
    cell = np.asarray(cell, dtype=np.float64)
    if np.linalg.det(cell) < 0:
        cell = -cell  # the same lattice, right-handed
    return Structure(
        node_type=np.array(numbers),
        positions=positions,
        domain="crystal",
        id=identity,
        source="crystals",
        cell=cell,
        pbc=np.ones(3, dtype=bool),
        text=names,
        groups={"origin": identity.split(":")[0]},
    )


def classify(crystal: Structure) -> None:
    """Adds the prototype in AFLOW's notation (found from the symmetry, whatever the source says) and the split.

    The split goes by formula and Pearson symbol alone, with a generous tolerance: mirror images and close relatives of
    a prototype stay together.
    """
    family = "_".join(prototype(crystal, FAMILY_TOLERANCE).split("_")[:2])
    split = split_of(family, salt="crystals")
    crystal.groups |= {"prototype": prototype(crystal), "family": family, "split": split}


def rattled(crystal: Structure, copy: int) -> Structure:
    """A strained copy (each component of the strain up to MAX_STRAIN) whose atoms are displaced by RATTLE."""
    assert crystal.cell is not None
    name = f"{crystal.id}:rattled{copy}"
    rng = np.random.default_rng(int(place(name, "crystals:rattled") * 2**53))
    strain = rng.uniform(-MAX_STRAIN, MAX_STRAIN, (3, 3))
    deformation = np.eye(3) + (strain + strain.T) / 2
    return Structure(
        node_type=crystal.node_type,
        positions=crystal.positions @ deformation + rng.normal(0, RATTLE, crystal.positions.shape),
        domain="crystal",
        id=name,
        source="crystals",
        cell=crystal.cell @ deformation,
        pbc=np.ones(3, dtype=bool),
        text=crystal.text,
        groups=crystal.groups | {"origin": "rattled", "parent": crystal.id},
    )


def substituted(crystal: Structure, variants: int) -> Iterator[Structure]:
    """At most `variants` of the crystal's substitutions, drawn without repetition; distinct elements stay distinct."""
    elements = sorted(set(crystal.node_type.tolist()))
    rng = random.Random(f"{SEED}:{crystal.id}")
    seen = {tuple(elements)}
    for _ in range(4 * variants):
        drawn = tuple(rng.choice(SUBSTITUTES.get(element, [element])) for element in elements)
        if drawn in seen or len(set(drawn)) < len(drawn):
            continue
        seen.add(drawn)
        variant = _with_elements(crystal, dict(zip(elements, drawn, strict=True)))
        if _is_sensible(variant):
            yield variant
        if len(seen) > variants:
            return


def _with_elements(crystal: Structure, new: Mapping[int, int]) -> Structure:
    assert crystal.cell is not None
    node_type = np.array([new[element] for element in crystal.node_type.tolist()])
    scale = np.cbrt((covalent_radii[node_type] ** 3).sum() / (covalent_radii[crystal.node_type] ** 3).sum())
    return Structure(
        node_type=node_type,
        positions=crystal.positions * scale,
        domain="crystal",
        id=f"{crystal.id}:{'-'.join(ELEMENTS[number - 1] for number in new.values())}",
        source="crystals",
        cell=crystal.cell * scale,
        pbc=np.ones(3, dtype=bool),
        groups=crystal.groups | {"origin": "substituted"},
    )


def _is_sensible(crystal: Structure) -> bool:
    """Not denser than MIN_VOLUME allows, and no pair of atoms, images included, closer than MIN_CONTACT allows."""
    assert crystal.cell is not None
    if np.linalg.det(crystal.cell) < MIN_VOLUME * crystal.num_nodes:
        return False
    radii = covalent_radii[crystal.node_type]
    lattice = Crystal(crystal.cell, crystal.node_type.tolist(), crystal.positions, coords_are_cartesian=True)
    first, second, _, distance = lattice.get_neighbor_list(2 * MIN_CONTACT * float(radii.max()))
    return bool((distance >= MIN_CONTACT * (radii[first] + radii[second])).all())
