"""Labels of any shape, teachers and their memory."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moiety.data import teachers
from moiety.data.shards import Corpus, write_corpus
from moiety.data.structure import Structure
from moiety.data.teachers import (
    CHGNetR2SCAN,
    GFN1xTB,
    GFN2xTB,
    GFN2xTBResponse,
    Labeller,
    Labels,
    NotConverged,
    SevenNet0,
)
from moiety.errors import InputError


def water(**fields) -> Structure:
    positions = [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]]
    return Structure(np.array([8, 1, 1]), np.array(positions), **fields)


# labels of any shape


def test_tensors_come_back_with_their_shapes_and_the_field_says_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    polarizability, velocity, hessian = rng.normal(size=(3, 3)), rng.normal(size=(3, 3)), rng.normal(size=(3, 2, 3, 3))
    full = water(id="full", tensors={"polarizability": polarizability, "quadrupole": np.float64(2.0)})
    full.node_tensors = {"velocity": velocity, "blocks": hessian}
    write_corpus([water(id="bare"), full], tmp_path / "corpus")
    bare, read = Corpus.open(tmp_path / "corpus")
    assert bare.tensors == {} and bare.node_tensors == {}
    assert np.array_equal(read.tensors["polarizability"], polarizability) and read.tensors["quadrupole"] == 2.0
    assert np.array_equal(read.node_tensors["velocity"], velocity)
    assert np.array_equal(read.node_tensors["blocks"], hessian)
    schema = pq.read_schema(next((tmp_path / "corpus").glob("*.parquet")))
    shapes = {name: schema.field(name).metadata[b"shape"] for name in ("tensor:polarizability", "node_tensor:blocks")}
    assert shapes == {"tensor:polarizability": b"[3, 3]", "node_tensor:blocks": b"[-1, 2, 3, 3]"}


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path):
    pair = [water(id=str(size), source="s", tensors={"alpha": np.zeros((size, size))}) for size in (3, 2)]
    with pytest.raises(InputError, match=r"s 2: tensor:alpha is \(2, 2\), others \(3, 3\)"):
        write_corpus(pair, tmp_path / "corpus")


def test_bad_tensors_are_rejected_with_a_code(tmp_path: Path):
    short = water(id="short", node_tensors={"velocity": np.zeros((2, 3))})
    broken = water(id="broken", tensors={"alpha": np.full((3, 3), np.nan)})
    manifest = write_corpus([short, broken, water(id="good")], tmp_path / "corpus")
    assert manifest["counts"] == {"in": 3, "ok": 1, "rejected": {"bad-label": 1, "wrong-shape": 1}}


# teachers


class Spring:
    """Pulls every atom to the origin; counts how often it is asked."""

    theory = "springs"
    package = "numpy"
    gives = Labels
    asked = 0

    def knows(self, structure: Structure) -> bool:
        return 2 not in structure.node_type

    def label(self, structure: Structure) -> Labels:
        self.asked += 1
        stress = np.eye(3) if structure.periodic else None
        return Labels(float((structure.positions**2).sum()), -2 * structure.positions, stress)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))


def test_a_label_is_computed_once_and_anything_the_teacher_sees_makes_another():
    periodic = {"cell": 5 * np.eye(3), "pbc": np.ones(3, bool)}
    different = [water(), water(charge=1), water(spin=3), water(**periodic), replace(water(), node_type=[16, 1, 1])]
    moved = water()
    moved.positions[0, 0] += 1e-9
    for _ in range(2):
        spring = Spring()
        with Labeller(spring) as labeller:
            found = [labeller(structure) for structure in [*different, moved]]
    assert spring.asked == 0  # the second time all of them are remembered
    assert found[0].energy == pytest.approx((water().positions ** 2).sum(), abs=1e-14)
    assert np.array_equal(found[0].forces, -2 * water().positions)
    assert found[0].stress is None and np.array_equal(found[3].stress, np.eye(3))
    with Labeller(Spring()) as labeller:
        assert len({labeller.key(structure) for structure in [*different, moved]}) == 6


def test_a_damaged_label_is_computed_again(tmp_path: Path):
    with Labeller(Spring()) as labeller:
        labeller(water())
        path = tmp_path / "cache" / "labels" / f"{labeller.name}.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("UPDATE labels SET data = zeroblob(80)")
    spring = Spring()
    with Labeller(spring) as labeller:
        assert labeller(water()).energy > 0 and spring.asked == 1


def label_many(numbers: range) -> None:
    with Labeller(Spring()) as labeller:
        for number in numbers:
            labeller(water(charge=number))


def test_two_processes_share_the_memory_of_a_teacher():
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(label_many, [range(150), range(100, 250)]))
    spring = Spring()
    with Labeller(spring) as labeller:
        for number in range(250):
            assert labeller(water(charge=number)).energy == pytest.approx((water().positions ** 2).sum())
    assert spring.asked == 0


def test_labels_are_filled_in_where_the_teacher_knows_the_elements():
    with Labeller(Spring()) as labeller:
        known, unknown = labeller.applied([water(), Structure(np.array([2]), np.zeros((1, 3)))])
    assert known.theory == "springs" and known.energy is not None and known.forces.shape == (3, 3)
    assert unknown.energy is None and unknown.theory == ""


def test_a_structure_without_an_answer_passes_without_labels(monkeypatch: pytest.MonkeyPatch):
    class Stubborn(Spring):
        def label(self, structure: Structure) -> Labels:
            if structure.id == "hard":
                raise NotConverged("SCF not converged in 250 cycles")
            return super().label(structure)

    with Labeller(Stubborn()) as labeller:
        hard, easy = labeller.applied([water(id="hard"), water(id="easy", charge=2)])
    assert hard.energy is None and not hard.theory and easy.energy is not None


def test_a_teacher_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(teachers, "version", missing)
    with pytest.raises(InputError, match=r"SevenNet-0 .* needs sevenn: pip install 'moiety\[labels\]'"):
        Labeller(SevenNet0())


def slope(teacher: teachers.Teacher, structure: Structure, node: int, axis: int, step: float) -> float:
    """-dE/dx by central differences."""
    energies = []
    for sign in (1, -1):
        moved = replace(structure, positions=structure.positions.copy())
        moved.positions[node, axis] += sign * step
        energies.append(teacher.label(moved).energy)
    return -(energies[0] - energies[1]) / (2 * step)


def test_gfn2_xtb_forces_are_the_slope_of_its_energy():
    pytest.importorskip("tblite")
    stretched = water()
    stretched.positions[1] *= 1.1
    labels = GFN2xTB().label(stretched)
    assert labels.forces[1, 1] == pytest.approx(slope(GFN2xTB(), stretched, 1, 1, 1e-3), abs=1e-3)
    assert np.abs(labels.forces.sum(axis=0)).max() < 1e-6
    assert -145 < labels.energy < -130  # eV, -5.07 Ha


def test_a_polarizability_is_the_slope_of_the_dipole_and_turns_with_the_molecule():
    pytest.importorskip("tblite")
    from scipy.spatial.transform import Rotation

    turn = Rotation.random(rng=0).as_matrix()
    labels = GFN2xTBResponse().label(water())
    turned = GFN2xTBResponse().label(replace(water(), positions=water().positions @ turn.T))
    assert labels.polarizability == pytest.approx(labels.polarizability.T)
    assert turned.polarizability == pytest.approx(turn @ labels.polarizability @ turn.T, abs=1e-3)
    assert turned.dipole == pytest.approx(turn @ labels.dipole, abs=1e-6)
    assert labels.dipole[:2] == pytest.approx(0, abs=1e-5) and -0.6 < labels.dipole[2] < -0.3  # e·Å, to the hydrogens
    assert (np.linalg.eigvalsh(labels.polarizability) > 0).all()
    assert labels.polarizability[0, 1:] == pytest.approx(0, abs=1e-3), "across the plane of the molecule"


def test_a_response_is_remembered_and_filled_in():
    pytest.importorskip("tblite")
    with Labeller(GFN2xTBResponse()) as labeller:
        (first,), (again,) = (list(labeller.applied([water()])) for _ in range(2))
        ion = next(labeller.applied([water(charge=1, spin=2)]))
    assert np.array_equal(first.tensors["polarizability"], again.tensors["polarizability"])
    assert np.array_equal(first.dipole, again.dipole) and first.theory == "GFN2-xTB" and first.energy is None
    assert ion.dipole is None and ion.theory == "", "the dipole of an ion depends on where one looks from"


def test_gfn1_xtb_forces_are_the_slope_of_its_energy_and_its_charges_make_its_dipole():
    pytest.importorskip("tblite")
    teacher = GFN1xTB()
    labels = teacher.label(water())
    assert labels.forces[0, 2] == pytest.approx(slope(teacher, water(), 0, 2, 1e-3), abs=1e-3)
    assert labels.charges.sum() == pytest.approx(0, abs=1e-6) and labels.charges[0] < 0 < labels.charges[1]
    assert labels.dipole == pytest.approx(labels.charges @ water().positions, abs=0.25), "and an atom has its own"
    assert not teacher.knows(water(charge=1)) and 5 < labels.gap < 20
    with Labeller(teacher) as labeller:
        (filled,) = labeller.applied([water()])
        (again,) = labeller.applied([water()])
    assert filled.theory == "GFN1-xTB" and np.array_equal(again.forces, labels.forces)
    assert again.scalars["dipole"] == pytest.approx(np.linalg.norm(labels.dipole) / 0.2081943)
    assert np.array_equal(again.node_scalars["mulliken"], labels.charges) and again.scalars["gap"] == labels.gap


def test_chgnet_has_no_answer_for_an_atom_alone():
    pytest.importorskip("chgnet")
    argon = Structure(np.array([18]), np.zeros((1, 3)))
    argon.cell, argon.pbc = 20 * np.eye(3), np.ones(3, bool)
    with pytest.raises(NotConverged, match="isolated atom"):
        CHGNetR2SCAN().label(argon)


@pytest.mark.parametrize(("teacher", "package"), [(SevenNet0(), "sevenn"), (CHGNetR2SCAN(), "chgnet")])
def test_forces_and_stress_of_crystals_are_slopes_of_the_energy(teacher: teachers.Teacher[Labels], package: str):
    pytest.importorskip(package)
    cell = np.array([[0, 1.9, 1.9], [1.9, 0, 1.9], [1.9, 1.9, 0]])  # fcc copper, 5 % too wide
    copper = Structure(np.array([29, 29]), np.array([[0, 0, 0], [2.0, 1.9, 0]]))
    copper.cell, copper.pbc = cell * [[1], [1], [2]], np.ones(3, bool)
    labels = teacher.label(copper)
    assert labels.forces[1, 0] == pytest.approx(slope(teacher, copper, 1, 0, 0.02), abs=5e-3)
    assert labels.stress is not None and np.allclose(labels.stress, labels.stress.T)
    energies = []
    for strain in (1e-2, -1e-2):
        scale = np.diag([1 + strain, 1, 1])
        energies.append(teacher.label(replace(copper, positions=copper.positions @ scale, cell=copper.cell @ scale)))
    expected = (energies[0].energy - energies[1].energy) / 2e-2 / abs(np.linalg.det(copper.cell))
    assert labels.stress[0, 0] == pytest.approx(expected, rel=0.05)
    assert np.trace(labels.stress) > 0  # wider than it wants to be: under tension
