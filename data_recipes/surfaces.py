"""Adsorbates on the low-index faces of metals: ideal slabs of ASE, labelled by a teacher model (SevenNet-0).

Slabs have three layers of 2 x 2 cells at the measured lattice constants; nothing is relaxed. The binding atom stands
over a named site at the height where its nearest metal atom is one sum of covalent radii away, the rest of the molecule
points away from the metal; every second structure is rattled. What the teacher finds absurd is left out.

The adsorption energy is E(slab + adsorbate) - E(the same slab without it) - sum of atomic references, which are fixed
by the teacher's energies of H2, H2O, CO, N2 and H2S, as in the Open Catalyst project: H = H2 / 2, O = H2O - H2, ...
"""
# Shapes: N atoms, S atoms of the slab.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
from ase import Atoms
from ase import build as ase_build
from ase.data import covalent_radii

from moiety.data.download import Archive
from moiety.data.splits import place, portion, select, shuffled
from moiety.data.structure import Array, Structure
from moiety.data.teachers import Labeller, SevenNet0
from moiety.models.vocabulary_moiety import ROLE_ID

METALS = {  # lattice -> metals
    "fcc": "Al Ca Ni Cu Sr Rh Pd Ag Ir Pt Au Pb",
    "bcc": "V Cr Fe Nb Mo Ta W",
    "hcp": "Mg Sc Ti Co Zn Zr Ru Hf Re",
}
HELD_OUT = {"Cu": "test", "Ir": "test", "Mo": "test", "Zr": "test", "Au": "val", "V": "val", "Co": "val"}
FACES = {"fcc": ("fcc111", "fcc100"), "bcc": ("bcc110", "bcc100"), "hcp": ("hcp0001",)}
MOLECULES = {"OH": "O", "CO": "C", "NO": "N", "CN": "C", "CH": "C", "CH3": "C", "NH": "N", "NH2": "N", "NH3": "N"}
MOLECULES |= {"H2O": "O", "SH": "S"}  # name in ase.build.molecule -> binding element
ATOMS = ("H", "C", "N", "O", "S")
SIZE, VACUUM = (2, 2, 3), 8.0  # Å on either side
RATTLE = 0.08  # Å, standard deviation
MAX_FORCE = 20.0  # eV/Å
HEIGHTS = (0.1, 3.0)  # Å, of the binding atom over the top layer
BOX = 12.0  # Å, of the molecules that fix the references


def parts(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[int]:
    """As many as the profile says: each labels its share of the candidates."""
    return list(range(options.get("parts", 1)))


def structures(archives: Mapping[str, Archive], options: Mapping[str, int], part: int) -> Iterator[Structure]:
    """Yields, metal after metal, `options["of_metal"]` of its combinations of face, adsorbate and site."""
    candidates = [
        candidate
        for metal in sorted(lattice_of())
        for candidate in _first(list(_combinations(metal)), options["of_metal"])
    ]
    splits = [HELD_OUT.get(metal, "train") for metal, *_ in candidates]
    chosen = [candidates[index] for index in select(splits, options)]
    with Labeller(SevenNet0()) as labeller:
        references = atomic_references(labeller)
        for metal, face, site, adsorbate in portion(chosen, part, options.get("parts", 1)):
            structure = _structure(metal, face, site, adsorbate)
            if _label(structure, labeller, references):
                yield structure


def lattice_of() -> dict[str, str]:
    """Metal -> fcc, bcc or hcp."""
    return {metal: lattice for lattice, metals in METALS.items() for metal in metals.split()}


def _combinations(metal: str) -> Iterator[tuple[str, str, str, str]]:
    for face in FACES[lattice_of()[metal]]:
        for site in _slab(metal, face).info["adsorbate_info"]["sites"]:
            for adsorbate in (*ATOMS, *MOLECULES):
                yield metal, face, site, adsorbate


def _first(candidates: list[tuple[str, str, str, str]], count: int) -> list[tuple[str, str, str, str]]:
    order = shuffled(("/".join(candidate) for candidate in candidates), salt="surfaces")
    return [candidates[index] for index in order[:count]]


@cache
def _slab(metal: str, face: str) -> Atoms:
    return getattr(ase_build, face)(metal, size=SIZE, vacuum=VACUUM)


def _structure(metal: str, face: str, site: str, adsorbate: str) -> Structure:
    """The slab with its adsorbate; half of them, by a hash of the name, are rattled."""
    slab = _slab(metal, face)
    guest = upright(adsorbate)
    info = slab.info["adsorbate_info"]
    over = np.array(info["sites"][site]) @ info["cell"] + slab.positions[slab.positions[:, 2].argmax(), :2]
    positions = np.vstack([slab.positions, guest.positions + binding_place(slab, over, guest.numbers[0])])
    name = f"{metal}-{face}-{site}-{adsorbate}"
    where = place(name, "surfaces:rattle")
    if where < 0.5:
        positions += np.random.default_rng(int(where * 2**53)).normal(0, RATTLE, positions.shape)
    return Structure(
        node_type=np.concatenate([slab.numbers, guest.numbers]),
        positions=positions,
        domain="surface",
        id=name,
        source="surfaces",
        cell=np.array(slab.cell),
        pbc=np.array([True, True, False]),
        role=np.repeat([ROLE_ID["slab"], ROLE_ID["adsorbate"]], [len(slab), len(guest)]),
        text=[f"{adsorbate} at the {site} site of {metal}({face.lstrip('fcbhp')})"],
        groups={
            "split": HELD_OUT.get(metal, "train"),
            "metal": metal,
            "adsorbate": adsorbate,
            "rattled": "yes" if where < 0.5 else "no",
        },
    )


@cache
def upright(adsorbate: str) -> Atoms:
    """The adsorbate with its binding atom first, at the origin, and the rest of it above."""
    if adsorbate in ATOMS:
        return Atoms(adsorbate)
    molecule = ase_build.molecule(adsorbate)
    binding = molecule.get_chemical_symbols().index(MOLECULES[adsorbate])
    molecule.positions -= molecule.positions[binding]
    rest = [index for index in range(len(molecule)) if index != binding]
    upward = molecule.positions[rest].mean(axis=0)
    if np.linalg.norm(upward) > 0.05:  # a flat CH3 has no upward: its plane stays parallel to the surface
        molecule.rotate(upward, (0, 0, 1))
    else:
        normal = np.cross(molecule.positions[rest[0]], molecule.positions[rest[1]])
        molecule.rotate(normal, (0, 0, 1))
    return molecule[[binding, *rest]]


def binding_place(slab: Atoms, over: Array, number: int) -> Array:
    """[3] Å over the point [2]: the nearest metal atom, images included, is one sum of covalent radii away."""
    top = slab.positions[:, 2].max()
    shifts = np.array([(i, j, 0) for i in (-1, 0, 1) for j in (-1, 0, 1)]) @ np.array(slab.cell)
    images = (slab.positions[:, None] + shifts).reshape(-1, 3)
    reach = covalent_radii[number] + covalent_radii[slab.numbers[0]]
    square = reach**2 - ((images[:, :2] - over) ** 2).sum(axis=1)
    heights = images[square > 0, 2] + np.sqrt(square[square > 0])
    return np.array([*over, max(heights.max(initial=top), top + HEIGHTS[0] + RATTLE)])


def atomic_references(labeller: Labeller) -> dict[int, float]:
    """Atomic number -> eV, from the teacher's energies of H2, H2O, CO, N2 and H2S in their measured geometries."""
    energy = {}
    for name in ("H2", "H2O", "CO", "N2", "SH2"):
        molecule = ase_build.molecule(name)
        box = Structure(molecule.numbers, molecule.positions, cell=BOX * np.eye(3), pbc=np.ones(3, bool))
        energy[name] = labeller(box).energy
    oxygen = energy["H2O"] - energy["H2"]
    carbon, sulfur = energy["CO"] - oxygen, energy["SH2"] - energy["H2"]
    return {1: energy["H2"] / 2, 6: carbon, 7: energy["N2"] / 2, 8: oxygen, 16: sulfur}


def _label(structure: Structure, labeller: Labeller, references: Mapping[int, float]) -> bool:
    """Adds the labels; False where the geometry is absurd: atoms that collide, an adsorbate inside the slab or away."""
    assert structure.role is not None
    guest = structure.role == ROLE_ID["adsorbate"]
    height = structure.positions[guest, 2].min() - structure.positions[~guest, 2].max()
    if not HEIGHTS[0] - 3 * RATTLE <= height <= HEIGHTS[1]:
        return False
    labels = labeller(structure)
    if np.linalg.norm(labels.forces, axis=1).max() > MAX_FORCE:
        return False
    bare = Structure(structure.node_type[~guest], structure.positions[~guest], cell=structure.cell, pbc=structure.pbc)
    gas = sum(references[number] for number in structure.node_type[guest].tolist())
    structure.energy, structure.forces, structure.theory = labels.energy, labels.forces, labeller.teacher.theory
    structure.scalars["adsorption_energy"] = labels.energy - labeller(bare).energy - gas
    return True
