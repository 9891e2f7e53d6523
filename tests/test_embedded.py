"""Labels of any shape, teachers and their memory, and the promises of the domains beyond molecules and proteins."""

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
from ase.data import covalent_radii
from ase.data.vdw import vdw_radii

from moiety.data import teachers
from moiety.data.build import load_recipe
from moiety.data.shards import Corpus, write_corpus
from moiety.data.structure import Structure
from moiety.data.teachers import GFN2xTB, Labeller, Labels, SevenNet0
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import POINT, ROLE_ID

SAMPLES = Path(__file__).parent / "data" / "corpora"


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


def test_sevennet_forces_and_stress_are_slopes_of_its_energy():
    pytest.importorskip("sevenn")
    teacher = SevenNet0()
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


# flows


def grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(64) * 2 * np.pi / 64
    x, y = np.meshgrid(axis, axis)
    return x, y


def test_a_taylor_green_vortex_decays_as_the_equation_says():
    module, wave, viscosity = load_recipe("flows").module(), 3, 0.02
    x, y = grid()
    vorticity = 2 * wave * np.cos(wave * x) * np.cos(wave * y)
    later = np.fft.irfft2(module.advance(np.fft.rfft2(vorticity), viscosity, 1.0))
    assert later == pytest.approx(vorticity * np.exp(-2 * wave**2 * viscosity), abs=1e-12)
    points = module.scattered(np.random.default_rng(0))
    px, py = wave * points.T
    expected = np.stack([-np.cos(px) * np.sin(py), np.sin(px) * np.cos(py)], axis=-1)
    assert module.velocity_at(np.fft.rfft2(vorticity), points) == pytest.approx(expected, abs=1e-12)


def test_the_flow_carries_vorticity_along():
    """To first order in a small wave on a shear flow u = cos y: dw/dt = -cos y dw/dx - v d(shear)/dy, v of the wave."""
    module, small, wave, duration = load_recipe("flows").module(), 1e-5, 4, 1e-3
    x, y = grid()
    shear, ripple = np.sin(y), small * np.cos(wave * x)  # of u = cos y, and a wave that has v = -small/wave sin(wave x)
    change = np.fft.irfft2(module.advance(np.fft.rfft2(shear + ripple), 0.0, duration)) - shear - ripple
    rise = np.fft.irfft2(-1j * module.WAVE_X * module.INVERSE * np.fft.rfft2(ripple))
    expected = (np.cos(y) * wave * small * np.sin(wave * x) - rise * np.cos(y)) * duration
    assert change == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())


def test_time_steps_are_of_fourth_order_and_an_inviscid_flow_keeps_its_energy(monkeypatch: pytest.MonkeyPatch):
    module = load_recipe("flows").module()
    start = module.random_vorticity(np.random.default_rng(1))

    def at(step: float) -> np.ndarray:
        monkeypatch.setattr(module, "STEP", step)
        return module.advance(start, 1e-3, 0.4)

    best = at(0.0025)
    errors = [np.abs(at(step) - best).max() for step in (0.04, 0.02)]
    assert 12 < errors[0] / errors[1] < 20

    def energy(vorticity: np.ndarray) -> float:
        return float(np.mean(sum(component**2 for component in module.velocity(vorticity))))

    assert energy(start) == pytest.approx(1.0)
    assert energy(module.advance(start, 0.0, 0.4)) == pytest.approx(1.0, rel=1e-4)


def test_points_of_a_flow_are_spaced_for_the_neighbour_list_and_carry_velocities():
    corpus = Corpus.open(SAMPLES / "flows")
    for flow in corpus:
        assert (flow.node_type == POINT).all() and flow.pbc.tolist() == [True, True, False]
        now, later = flow.node_tensors["velocity"], flow.node_tensors["next_velocity"]
        assert now.shape == later.shape == (flow.num_nodes, 3)
        assert not now[:, 2].any() and 0.2 < np.sqrt((now**2).sum(axis=1).mean()) < 1.5
        assert np.abs(later - now).max() > 1e-3
    assert 10 < corpus.num_edges.sum() / corpus.num_nodes.sum() < 22


# surfaces


def test_a_binding_atom_stands_one_bond_from_the_nearest_metal_and_the_rest_above_it():
    module = load_recipe("surfaces").module()
    slab = module._slab("Pt", "fcc111")
    top = slab.positions[slab.positions[:, 2].argmax()]
    place = module.binding_place(slab, top[:2], 6)
    assert place == pytest.approx([*top[:2], top[2] + covalent_radii[6] + covalent_radii[78]])
    for name in module.MOLECULES:
        guest = module.upright(name)
        assert guest.get_chemical_symbols()[0] == module.MOLECULES[name]
        assert guest.positions[0] == pytest.approx([0, 0, 0])
        assert guest.positions[1:, 2].min() > -0.05 or name == "CH3"


def test_no_metal_stands_in_two_splits_and_every_lattice_is_held_out():
    module = load_recipe("surfaces").module()
    lattices = module.lattice_of()
    assert set(module.HELD_OUT) <= set(lattices)
    for split in ("val", "test"):
        assert {lattices[metal] for metal, where in module.HELD_OUT.items() if where == split} == {"fcc", "bcc", "hcp"}


def test_adsorbates_stand_on_their_slab_with_labels_of_a_named_teacher():
    corpus = Corpus.open(SAMPLES / "surfaces")
    assert corpus.manifest["theory"] == "SevenNet-0 (teacher model, not DFT)"
    for surface in corpus:
        guest = surface.role == ROLE_ID["adsorbate"]
        height = surface.positions[guest, 2].min() - surface.positions[~guest, 2].max()
        assert guest.any() and -0.2 < height < 3.0
        assert surface.theory == corpus.manifest["theory"] and surface.stress is None
        assert np.abs(surface.forces.sum(axis=0)).max() < 1e-3
        assert np.linalg.norm(surface.forces, axis=1).max() < 20.0
        assert -12 < surface.scalars["adsorption_energy"] < 15 and np.isfinite(surface.energy)
    assert set(corpus.groups("rattled")) == {"yes", "no"}


def test_an_adsorption_energy_is_the_difference_it_claims_to_be(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sevenn")
    module = load_recipe("surfaces").module()
    (sample,) = (s for s in Corpus.open(SAMPLES / "surfaces") if s.id == "Mg-hcp0001-ontop-CO")
    with Labeller(SevenNet0()) as labeller:
        references = module.atomic_references(labeller)
        again = module._structure("Mg", "hcp0001", "ontop", "CO")
        assert module._label(again, labeller, references)
        far = replace(again, positions=again.positions + np.outer(again.role == ROLE_ID["adsorbate"], [0, 0, 5.0]))
        energy = labeller(far).energy
    assert again.positions == pytest.approx(sample.positions, abs=1e-9)
    assert again.scalars["adsorption_energy"] == pytest.approx(sample.scalars["adsorption_energy"], abs=1e-3)
    slab = again.energy - again.scalars["adsorption_energy"] - references[6] - references[8]
    assert energy - slab == pytest.approx(references[6] + references[8], abs=0.1)  # CO far away is CO


# interactions


def test_the_closest_atoms_of_a_pair_are_as_far_apart_as_said():
    module = load_recipe("interactions").module()
    first, second = (water(id=name, groups={"split": "train"}) for name in "AB")
    for contact in module.CONTACTS:
        pair = module.placed(first, second, contact)
        radii = vdw_radii[pair.node_type]
        distance = np.linalg.norm(pair.positions[:3, None] - pair.positions[None, 3:], axis=-1)
        assert (distance / (radii[:3, None] + radii[3:])).min() == pytest.approx(contact, abs=1e-3)


def test_interactions_vanish_with_the_distance_and_forces_balance():
    corpus = Corpus.open(SAMPLES / "interactions")
    mean = {}
    for pair in corpus:
        assert np.abs(pair.forces.sum(axis=0)).max() < 1e-8 and pair.theory == "GFN2-xTB"
        assert set(pair.chain) == {"A", "B"} and pair.spin == 1
        mean.setdefault(pair.scalars["contact"], []).append(abs(pair.scalars["interaction_energy"]))
    assert np.mean(mean[1.6]) < 0.5 * np.mean(mean[1.0]) < 0.1  # eV
    for split in ("train", "val", "test"):
        own = Corpus.open(SAMPLES / "interactions", split)
        others = [s for s in corpus if s.groups["split"] != split]
        assert not {*own.groups("first"), *own.groups("second")} & {
            s.groups[key] for s in others for key in ("first", "second")
        }


def test_pairs_come_once_each_and_share_no_molecule_as_long_as_they_can():
    module = load_recipe("interactions").module()
    for size in range(9):
        pairs = [tuple(sorted(pair)) for pair in module.pairs(size)]
        assert len(pairs) == len(set(pairs)) == size * (size - 1) // 2
        disjoint = [member for pair in pairs[: size // 2] for member in pair]
        assert len(set(disjoint)) == len(disjoint)


def test_a_molecule_under_two_names_belongs_to_the_first_split_that_has_it():
    module = load_recipe("interactions").module()
    other = water(id="WAT", groups={"split": "test"})
    other.positions = other.positions[:, ::-1] * 1.01
    methane = Structure(
        np.array([6, 1, 1, 1, 1]), 0.63 * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    )
    methane.groups = {"split": "test"}
    apart = Structure(np.array([1, 1, 1, 1]), np.array([[0, 0, 0], [0.74, 0, 0], [5, 0, 0], [5.74, 0, 0]]))
    apart.groups = {"split": "val"}
    found = module.distinct([other, water(id="HOH", groups={"split": "train"}), methane, apart])
    assert [m.id for m in found["train"]] == ["HOH"] and found["val"] == [] and found["test"] == [methane]


# crystals


def test_a_rattled_copy_is_the_same_every_time_and_belongs_to_its_crystal():
    module = load_recipe("crystals").module()
    crystal = next(iter(Corpus.open(SAMPLES / "crystals")))
    copy, again, other = (module.rattled(crystal, number) for number in (1, 1, 2))
    assert np.array_equal(copy.positions, again.positions) and not np.allclose(copy.positions, other.positions)
    strain = np.linalg.solve(crystal.cell, copy.cell) - np.eye(3)
    assert 0.003 < np.abs(strain).max() <= 0.03 and strain == pytest.approx(strain.T, abs=1e-12)
    moved = copy.positions - crystal.positions @ (np.eye(3) + strain)
    assert 0.02 < moved.std() < 0.1
    assert copy.groups["split"] == crystal.groups["split"] and copy.groups["origin"] == "rattled"
    assert copy.groups["parent"] == crystal.id and len({crystal.id, copy.id, other.id}) == 3


def test_a_crystal_written_with_fewer_digits_is_of_the_same_family():
    module = load_recipe("crystals").module()
    corners = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    exact = module._crystal("a", [29] * 4, corners * 3.6, 3.6 * np.eye(3), [])
    blurred = module._crystal("b", [29] * 4, corners * 3.6 + 0.02 * np.eye(4, 3), 3.6 * np.eye(3), [])
    for crystal in (exact, blurred):
        module._classify(crystal)
    assert exact.groups["prototype"] != blurred.groups["prototype"]
    assert exact.groups["family"] == blurred.groups["family"] == "A_cF4"


def test_crystals_carry_labels_of_a_named_teacher():
    corpus = Corpus.open(SAMPLES / "crystals")
    labelled = [crystal for crystal in corpus if crystal.energy is not None]
    assert len(labelled) > 0.95 * len(corpus)
    for crystal in labelled:
        assert crystal.theory == corpus.manifest["theory"] == "SevenNet-0 (teacher model, not DFT)"
        assert crystal.stress == pytest.approx(crystal.stress.T)
        assert np.abs(crystal.forces.sum(axis=0)).max() < 1e-3


def test_without_the_teacher_crystals_are_built_without_labels_and_say_so(monkeypatch: pytest.MonkeyPatch):
    module = load_recipe("crystals").module()
    assert module.notes({}, {}) == [] or not teachers.available(SevenNet0())
    monkeypatch.setattr(module, "available", lambda teacher: False)
    (note,) = module.notes({}, {})
    assert note.startswith("built without labels: SevenNet-0") and "moiety[labels]" in note


# complexes


def test_a_ligand_lies_in_its_pocket_and_is_bonded_to_nothing_of_it():
    for found in Corpus.open(SAMPLES / "complexes"):
        ligand, heavy = found.role == ROLE_ID["ligand"], found.node_type > 1
        assert (found.role[~ligand] == ROLE_ID["protein"]).all() and 6 <= (ligand & heavy).sum() <= 80
        distance = np.linalg.norm(found.positions[ligand & heavy, None] - found.positions[~ligand & heavy], axis=-1)
        assert 1.9 <= distance.min() <= 4.5
        assert found.chain.count("ligand") == ligand.sum() and found.text == [found.groups["ligand"]]


def test_additives_and_residues_are_no_ligands():
    import gemmi

    module = load_recipe("complexes").module()
    verdicts = {}
    for name, size in (("ATP", 31), ("GOL", 6), ("CLR", 28), ("HSD", 10), ("ALA", 10), ("DA", 20), ("ACY", 4)):
        residue = gemmi.Residue()
        residue.name = name
        for _ in range(size):
            atom = gemmi.Atom()
            atom.element = gemmi.Element("C")
            residue.add_atom(atom)
        verdicts[name] = module.is_ligand(residue)
    assert verdicts.pop("ATP") and len(verdicts) == 6 and not any(verdicts.values())


def test_a_ligand_in_one_site_of_several_chains_comes_once():
    module = load_recipe("complexes").module()
    site = "GSGKTTLLNALAGRLDPDYV"
    assert module.is_same(site, "A" + site) and not module.is_same(site, "GPGVGKTLFALDRIEELTYW")
    seen = [(c.groups["ligand"], c.groups["pocket"]) for c in Corpus.open(SAMPLES / "complexes")]
    assert {c.groups["ligand_kind"] for c in Corpus.open(SAMPLES / "complexes")} >= {"nucleotide", "small-molecule"}
    pairs = [(a, b) for place, a in enumerate(seen) for b in seen[:place] if a[0] == b[0]]
    assert pairs and not any(module.is_same(a[1], b[1]) for a, b in pairs)
