"""What the embedded corpora promise, beyond the tests of their readers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from ase.data.vdw import vdw_radii

from moiety.data import teachers
from moiety.data.build import load_recipe
from moiety.data.conformers import lowest_conformer
from moiety.data.convert import to_ase, to_biotite, to_pyg, to_pymatgen
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.teachers import Labeller, SevenNet0
from moiety.data.validate import check
from moiety.errors import InputError
from moiety.models.conversion_moiety import to_fields
from moiety.models.vocabulary_moiety import POINT, ROLE_ID
from moiety.objectives.types import MaskedTypes, MaskedTypesConfig
from moiety.tokens.batch import collate

SAMPLES = Path(__file__).parent / "data" / "corpora"


def water(**fields) -> Structure:
    positions = [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]]
    return Structure(np.array([8, 1, 1]), np.array(positions), **fields)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))


# polarizabilities


def test_polarizabilities_go_with_those_of_qm9():
    """GFN2-xTB has a minimal basis, in which hydrogen has next to none: a third too small, in much the same order."""
    alpha = {s.id: (s.scalars["alpha"], s.groups["split"]) for s in Corpus.open(SAMPLES / "qm9")}
    corpus = Corpus.open(SAMPLES / "polarizabilities")
    pairs = [(alpha[s.id][0], np.trace(s.tensors["polarizability"]) / 3) for s in corpus]
    assert len(pairs) == 64 and np.corrcoef(np.transpose(pairs))[0, 1] > 0.85
    assert all(alpha[s.id][1] == s.groups["split"] and s.theory == "GFN2-xTB" for s in corpus)
    assert all(np.linalg.eigvalsh(s.tensors["polarizability"]).min() > 0 and s.dipole.shape == (3,) for s in corpus)


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
        assert np.array_equal(flow.node_tensors["velocity_change"], later - now)
        assert np.array_equal(flow.node_vectors[:, 0], now) and not flow.node_vectors[:, 1:].any()
    assert 10 < corpus.num_edges.sum() / corpus.num_nodes.sum() < 22


def test_a_flow_with_vectors_is_no_protein(tmp_path: Path):
    flow = Corpus.open(SAMPLES / "flows")[0]
    assert check(flow) is None and not flow.is_residue.any()
    fields, batch = to_fields(flow), collate([flow])
    assert fields["domain"] == "field" and np.array_equal(fields["node_vectors"], flow.node_vectors)
    assert batch.node_vectors[:, 0].numpy() == pytest.approx(flow.node_tensors["velocity"])
    hidden = MaskedTypes(MaskedTypesConfig(share=1.0)).corrupt(batch, torch.Generator().manual_seed(0))
    assert (hidden.node_type == POINT).all() and torch.equal(hidden.node_vectors, batch.node_vectors)
    for convert in (to_ase, to_biotite, to_pymatgen, to_pyg):
        with pytest.raises(InputError, match="points of a field"):
            convert(flow)


# freesolv


def test_a_conformer_is_the_same_every_time_and_has_its_hydrogens():
    from rdkit import Chem

    molecules = [lowest_conformer(Chem.MolFromSmiles("OCCCO"), tries=5) for _ in range(2)]
    assert molecules[0].GetNumAtoms() == 13 and molecules[0].GetNumConformers() == 1
    assert np.array_equal(*(molecule.GetConformer().GetPositions() for molecule in molecules))


def test_molecules_of_a_scaffold_share_a_split_and_polar_ones_hydrate():
    corpus = Corpus.open(SAMPLES / "freesolv")
    splits: dict[str, set[str]] = {}
    for molecule in corpus:
        splits.setdefault(molecule.groups["scaffold"], set()).add(molecule.groups["split"])
        alkane = set(molecule.node_type.tolist()) == {1, 6} and "=" not in molecule.id and "c" not in molecule.id
        assert not alkane or "#" in molecule.id or molecule.scalars["hydration_free_energy"] > 0
    assert all(len(found) == 1 for found in splits.values())
    errors = [s.scalars["hydration_free_energy"] - s.scalars["hydration_free_energy_gaff"] for s in corpus]
    assert np.abs(errors).mean() == pytest.approx(1.1, abs=0.4)


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


def test_s22_has_two_molecules_a_complex_and_a_teacher_that_is_close():
    corpus = Corpus.open(SAMPLES / "s22")
    energies = np.array([[s.scalars[f"interaction_energy{end}"] for end in ("", "_gfn2")] for s in corpus])
    assert len(corpus) == 22 and (energies < 0).all()
    assert np.abs(energies[:, 0] - energies[:, 1]).mean() == pytest.approx(0.034, abs=2e-3)  # eV
    module = load_recipe("s22").module()
    for pair in corpus:
        first, second = module.molecules(pair)
        assert first.num_nodes + second.num_nodes == pair.num_nodes and set(pair.chain) == {"A", "B"}
        distance = np.linalg.norm(first.positions[:, None] - second.positions, axis=-1)
        bond = covalent_radii[first.node_type][:, None] + covalent_radii[second.node_type]
        assert (distance > 1.4 * bond).all(), "no bond leads from the one to the other"


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


# proteins


def test_helices_turn_and_strands_stretch():
    """CA to the third CA on is 5.0 Å in an alpha helix and 10 Å in a strand (Kabsch and Sander 1983)."""
    distances: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for chain in Corpus.open(SAMPLES / "proteins"):
        states = chain.node_scalars["secondary_structure"]
        assert set(states) <= {0.0, 1.0, 2.0}
        steps = np.linalg.norm(chain.positions[3:] - chain.positions[:-3], axis=1)
        for state in distances:
            same = np.lib.stride_tricks.sliding_window_view(states == state, 4).all(axis=1)
            distances[state] += steps[same].tolist()
    helix, strand, coil = (np.median(distances[state]) for state in (0, 1, 2))
    assert helix == pytest.approx(5.1, abs=0.2) and strand == pytest.approx(10.0, abs=0.5) and helix < coil < strand


def test_a_chain_that_is_cut_has_the_secondary_structure_of_its_pieces():
    """Two halves far from each other: no bond, no hydrogen and no helix leads from the one to the other."""
    pytest.importorskip("mdtraj")
    module = load_recipe("proteins").module()
    for chain in Corpus.open(SAMPLES / "proteins"):
        whole = module.secondary_structure(chain)
        assert np.array_equal(whole, chain.node_scalars["secondary_structure"])
        half = chain.num_nodes // 2
        pieces = [_residues(chain, slice(half)), _residues(chain, slice(half, None))]
        apart = replace(chain, positions=chain.positions + np.where(np.arange(chain.num_nodes) < half, 0, 500)[:, None])
        expected = np.concatenate([module.secondary_structure(piece) for piece in pieces])
        assert np.array_equal(module.secondary_structure(apart), expected)
        jump = replace(chain, residue_index=chain.residue_index + 7 * (np.arange(chain.num_nodes) >= half))
        assert (module.secondary_structure(jump) != whole).mean() < 0.1
        bare = replace(chain, node_vectors=chain.node_vectors.copy())
        bare.node_vectors[half, 2] = 0  # as readers mark an oxygen that is not there
        assert np.flatnonzero(np.isnan(module.secondary_structure(bare))).tolist() == [half]


def _residues(chain: Structure, span: slice) -> Structure:
    names = ("node_type", "positions", "node_vectors", "residue_index")
    return replace(chain, **{name: getattr(chain, name)[span] for name in names})


def test_without_mdtraj_proteins_are_built_without_secondary_structure_and_say_so(monkeypatch: pytest.MonkeyPatch):
    module = load_recipe("proteins").module()
    monkeypatch.setattr(module, "has_dssp", lambda: False)
    (note,) = module.notes({}, {})
    assert note.startswith("built without secondary structure: DSSP needs mdtraj") and "moiety[labels]" in note
    chain = next(iter(Corpus.open(SAMPLES / "proteins")))
    monkeypatch.setattr(module, "unlabelled", lambda archives, options: iter([replace(chain, node_scalars={})]))
    (bare,) = module.structures({}, {})
    assert bare.node_scalars == {}


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
        module.classify(crystal)
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
