"""Symmetry in float64, of every output, with random weights everywhere and random adapters on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moiety.adapters.adapter import AdapterSettings, add_adapter
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import neighbor_list, pack, to_tensors
from moiety.models.geometry_moiety import (
    Layout,
    frame_basis,
    molecule_of,
    radial_basis,
    softmax_per_graph,
    symmetric_basis,
)
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.vocabulary_moiety import COVALENT_RADII, ROLE_ID

CORPORA = Path(__file__).parent / "data/corpora"
KINDS = ("molecule", "crystal", "protein", "complex")
TASKS = {kind: {"kind": kind} for kind in ("mean", "sum", "average", "dipole_norm", "tensor", "node", "vector")}
TASKS["classes"] = {"kind": "classes", "classes": ["helix", "strand", "coil"]}  # type: ignore[dict-item]
Outputs = dict[str, Tensor]


def structure(kind: str) -> Structure:
    if kind == "molecule":
        return Corpus.open(CORPORA / "qm9", split="train")[3]
    if kind == "crystal":
        crystals = Corpus.open(CORPORA / "crystals", split="train")
        return crystals[int(np.argmin(np.abs(np.asarray(crystals.num_nodes) - 6)))]
    protein = Corpus.open(CORPORA / "proteins", split="train")[0]
    if kind == "protein":
        return protein
    ligand = structure("molecule")
    beside = ligand.positions - ligand.positions.mean(0) + protein.positions[10] + np.array([3.0, 2.0, 4.0])
    assert protein.node_vectors is not None
    return Structure(
        node_type=np.concatenate([protein.node_type, ligand.node_type]),
        positions=np.concatenate([protein.positions, beside]),
        node_vectors=np.concatenate([protein.node_vectors, np.zeros((ligand.num_nodes, 4, 3))]),
        role=np.repeat([ROLE_ID["protein"], ROLE_ID["ligand"]], [protein.num_nodes, ligand.num_nodes]),
        domain="complex",
        charge=1,
        spin=2,
    )


def randomize(model: Any) -> Any:
    """No parameter keeps the zero it starts from, or the part behind it would not be tested."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(
    scope="module", params=[(1, "lora"), (2, "lora"), (2, "dora"), (2, "ia3")], ids="lmax{0[0]}-{0[1]}".format
)
def models(request: pytest.FixtureRequest) -> list[nn.Module]:
    """A pretraining model, and a prediction model with an adapter on every linear map of its trunk."""
    lmax, kind = request.param
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=32, num_layers=2, num_heads=2, edge_channels=16, lmax=lmax, tasks=TASKS)
    adapted = add_adapter(randomize(MoietyForPrediction(config)), AdapterSettings(rank=4), kind)
    return [randomize(model.double()) for model in (MoietyForPreTraining(config), adapted)]


def outputs(models: list[nn.Module], structures: list[Structure], dtype: torch.dtype = torch.float64) -> Outputs:
    arrays = pack([vars(s) for s in structures])
    edge_index, edge_shift = neighbor_list(
        *(arrays[name] for name in ("positions", "node_type", "graph_index", "cell", "pbc")), cutoff=5.0
    )
    inputs = to_tensors(arrays | {"edge_index": edge_index, "edge_shift": edge_shift}, dtype)
    inputs["noise_level"] = torch.full((len(structures),), 0.07, dtype=dtype)
    pretraining, prediction = models
    with torch.no_grad():
        a, b = pretraining(**inputs, hint_positions=inputs["positions"]), prediction(**inputs)
    flat = {"noise": a.noise, "type_logits": a.type_logits, "strain": a.strain, "features": b.node_features}
    return flat | {"graph": b.graph_features} | b.predictions


def assert_equal(found: Outputs, expected: Outputs, tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        error = float((found[name] - value).abs().max() / value.abs().max())
        assert error < tolerance, f"{name}: {error:.1e}"


def wigner(rotation: Tensor, lmax: int) -> Tensor:
    """[M, M] action of an orthogonal matrix on the steerable features."""
    blocks = [torch.ones(1, 1, dtype=rotation.dtype), rotation]
    if lmax == 2:
        basis = symmetric_basis(rotation)
        blocks.append(torch.einsum("sab,ac,bd,tcd->st", basis, rotation, rotation, basis))
    return torch.block_diag(*blocks)


def orthogonal(reflect: bool) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))
    return q * (np.sign(np.linalg.det(q)) * (-1 if reflect else 1))


def transformed(s: Structure, matrix: np.ndarray) -> Structure:
    vectors = None if s.node_vectors is None else s.node_vectors @ matrix.T
    cell = None if s.cell is None else s.cell @ matrix.T
    return changed(s, positions=s.positions @ matrix.T, node_vectors=vectors, cell=cell)


def changed(s: Structure, **fields: object) -> Structure:
    return Structure(**(vars(s) | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_turn_with_the_structure(models: list[nn.Module], kind: str, reflect: bool) -> None:
    s, matrix = structure(kind), orthogonal(reflect)
    rotation = torch.tensor(matrix)
    expected = outputs(models, [s])
    lmax = {4: 1, 9: 2}[expected["features"].shape[1]]
    for name in ("noise", "vector"):
        expected[name] = expected[name] @ rotation.T
    for name in ("strain", "tensor"):
        expected[name] = rotation @ expected[name] @ rotation.T
    expected["features"] = torch.einsum("mk,nkc->nmc", wigner(rotation, lmax), expected["features"])
    assert_equal(outputs(models, [transformed(s, matrix)]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_ignore_where_the_structure_stands(models: list[nn.Module], kind: str) -> None:
    s = structure(kind)
    assert_equal(
        outputs(models, [changed(s, positions=s.positions + np.array([3.0, -40.0, 11.0]))]), outputs(models, [s])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_follow_the_order_of_the_nodes(models: list[nn.Module], kind: str) -> None:
    s = structure(kind)
    order = np.random.default_rng(3).permutation(s.num_nodes)
    per_node = {
        n: v[order] for n in ("node_type", "positions", "node_vectors", "role") if (v := vars(s)[n]) is not None
    }
    expected = outputs(models, [s])
    for name in ("noise", "type_logits", "features", "node", "vector", "classes"):
        expected[name] = expected[name][torch.tensor(order)]
    assert_equal(outputs(models, [changed(s, **per_node)]), expected)


def test_a_supercell_says_the_same_of_every_copy(models: list[nn.Module]) -> None:
    s = structure("crystal")
    assert s.cell is not None
    images = np.array([[i, j, k] for i in range(2) for j in range(1) for k in range(3)])
    positions = np.concatenate([s.positions + image @ s.cell for image in images])
    cell = np.diag([2, 1, 3]) @ s.cell
    large = changed(s, node_type=np.tile(s.node_type, 6), positions=positions, cell=cell, role=None, node_vectors=None)
    expected = outputs(models, [s])
    for name in ("noise", "type_logits", "features", "node", "vector", "classes"):
        expected[name] = torch.cat([expected[name]] * 6)
    for name in ("sum", "tensor"):
        expected[name] = 6 * expected[name]
    found = outputs(models, [large])
    expected["dipole_norm"] = found["dipole_norm"]  # a periodic system has no dipole moment of its own
    assert_equal(found, expected)


def test_another_choice_of_the_cell_changes_nothing(models: list[nn.Module]) -> None:
    s = structure("crystal")
    assert s.cell is not None
    skewed = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]]) @ s.cell
    wrapped = s.positions + np.random.default_rng(0).integers(-2, 3, (s.num_nodes, 3)) @ s.cell
    expected = outputs(models, [s])
    found = outputs(models, [changed(s, cell=skewed, positions=wrapped)])
    expected["dipole_norm"] = found["dipole_norm"]
    assert_equal(found, expected)


def test_a_batch_says_what_its_structures_say_alone(models: list[nn.Module]) -> None:
    structures = [structure(kind) for kind in (*KINDS, "molecule")]
    alone = [outputs(models, [s]) for s in structures]
    assert_equal(outputs(models, structures), {name: torch.cat([o[name] for o in alone]) for name in alone[0]})


def test_single_precision_is_equivariant_to_its_rounding(models: list[nn.Module]) -> None:
    s, matrix = structure("molecule"), orthogonal(False)
    singles = [model.float() for model in models]
    found = outputs(singles, [transformed(s, matrix)], torch.float32)["noise"]
    expected = outputs(singles, [s], torch.float32)["noise"] @ torch.tensor(matrix, dtype=torch.float32).T
    for model in models:
        model.double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def outputs_at(models: list[nn.Module], distance: float) -> Outputs:
    chain = np.array([[0.0, 0, 0], [1.2, 0.3, 0], [1.2 + distance, 0.3, 0], [2.2 + distance, 1.0, 0.5]])
    return outputs(models, [Structure(node_type=np.array([6, 8, 7, 1]), positions=chain)])


def test_nothing_jumps_when_a_neighbour_crosses_the_cutoff(models: list[nn.Module]) -> None:
    step = 1e-6
    inside, outside = outputs_at(models, 5.0 - step), outputs_at(models, 5.0 + step)
    before = outputs_at(models, 5.0 - 3 * step)
    for name in inside:
        slope = float((inside[name] - before[name]).abs().max())  # change over the same distance without a crossing
        assert float((outside[name] - inside[name]).abs().max()) < 2 * slope + 1e-12, name


def test_far_apart_fragments_do_not_see_each_other(models: list[nn.Module]) -> None:
    s, t = structure("molecule"), structure("protein")
    empty = np.zeros((s.num_nodes, 4, 3))
    both = changed(
        t,
        node_type=np.concatenate([s.node_type, t.node_type]),
        positions=np.concatenate([s.positions, t.positions - t.positions.mean(0) + [200.0, 0, 0]]),
        node_vectors=np.concatenate([empty, t.node_vectors]),
        role=None,
    )
    same = {"domain": "protein", "role": None, "charge": 0, "spin": 1}
    energies = [outputs(models, [changed(x, **same)])["sum"] for x in (s, t, both)]
    assert abs(float(energies[2] - energies[0] - energies[1])) < 1e-9 * abs(float(energies[2]))


@pytest.fixture(scope="module")
def pair() -> Structure:
    """Two molecules 3 Å apart, their atoms mixed."""
    s = structure("molecule")
    turned = s.positions @ orthogonal(False).T
    beside = turned + np.array([s.positions[:, 0].max() - turned[:, 0].min() + 3.0, 0, 0])
    order = np.random.default_rng(5).permutation(2 * s.num_nodes)
    return Structure(np.tile(s.node_type, 2)[order], np.concatenate([s.positions, beside])[order])


@pytest.fixture(scope="module")
def interaction() -> Callable[..., Tensor]:
    """What a head of kind "interaction" says of structures, and one of kind "sum" with the same weights."""
    torch.manual_seed(0)
    tasks = {"sum": {"kind": "sum"}, "interaction": {"kind": "interaction"}}
    config = MoietyConfig(hidden_size=32, num_layers=2, num_heads=2, edge_channels=16, tasks=tasks)
    models = [randomize(model(config).double()) for model in (MoietyForPreTraining, MoietyForPrediction)]
    models[1].heads["interaction"].load_state_dict(models[1].heads["sum"].state_dict())
    return lambda *structures, kind="interaction": outputs(models, list(structures))[kind]


def test_an_interaction_is_what_molecules_have_beyond_each_alone(pair: Structure, interaction: Callable[..., Tensor]):
    s = structure("molecule")
    whole, alone = interaction(pair, kind="sum"), interaction(s, kind="sum")
    found = interaction(pair, s, structure("crystal"), structure("protein"), pair)
    assert abs(float(found[0])) > 1e-4
    assert found[[0, 4]].numpy() == pytest.approx((whole - 2 * alone).repeat(2).numpy(), rel=1e-9)
    assert abs(float(found[1])) < 1e-12 * abs(float(alone)) and found[2:4].isnan().all()


@pytest.mark.parametrize("name", ["interactions", "s22"])
def test_a_pair_is_two_molecules(name: str):
    corpus = Corpus.open(CORPORA / name, split="test")
    for s in corpus.read(range(len(corpus)), whole=True):
        edge_index = torch.cartesian_prod(*[torch.arange(s.num_nodes)] * 2).T
        lengths = torch.cdist(*[torch.tensor(s.positions)] * 2).flatten()
        first = molecule_of(edge_index, lengths, torch.tensor(COVALENT_RADII)[torch.tensor(s.node_type)])
        assert first.tolist() == [s.chain.index(chain) for chain in s.chain]  # type: ignore[union-attr]


def test_an_interaction_has_the_symmetries_of_a_number(pair: Structure, interaction: Callable[..., Tensor]):
    order = np.random.default_rng(6).permutation(pair.num_nodes)
    moved = changed(pair, positions=pair.positions + np.array([5.0, -7.0, 20.0]))
    mixed = changed(pair, node_type=pair.node_type[order], positions=pair.positions[order])
    same = [moved, mixed, *(transformed(pair, orthogonal(reflect)) for reflect in (False, True))]
    assert interaction(*same).numpy() == pytest.approx(float(interaction(pair)), rel=1e-9)


def test_gathering_and_sparse_products_agree(models: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    structures = [structure("crystal"), structure("molecule")]
    expected = outputs(models, structures)
    monkeypatch.setattr("moiety.models.geometry_moiety.available", lambda device: False)
    assert_equal(outputs(models, structures), expected)


def test_a_broken_symmetry_would_be_noticed(models: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def lopsided(unit: Tensor, lmax: int, right: Callable[[Tensor, int], Tensor]) -> Tensor:
        return right(unit * unit.new_tensor([1.0, 1.0, 1.01]), lmax)

    from moiety.models.geometry_moiety import spherical_harmonics

    monkeypatch.setattr(
        "moiety.models.geometry_moiety.spherical_harmonics", lambda u, lmax: lopsided(u, lmax, spherical_harmonics)
    )
    with pytest.raises(AssertionError):
        test_outputs_turn_with_the_structure(models, "molecule", reflect=False)


def test_an_intensive_scalar_counts_what_comes_twice_once(models: list[nn.Module]):
    atoms = structure("molecule")
    apart = atoms.positions + np.array([100.0, 0.0, 0.0])
    twice = Structure(node_type=np.tile(atoms.node_type, 2), positions=np.concatenate([atoms.positions, apart]))
    one, two = (outputs(models, [s])["mean"] for s in (atoms, twice))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=0)


def test_softmax_per_graph_is_the_softmax_of_each_structure():
    logits, sizes = 300 * torch.randn(9, 2, dtype=torch.float64), [4, 1, 4]
    expected = torch.cat([part.softmax(0) for part in logits.split(sizes)])
    of_node = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    torch.testing.assert_close(softmax_per_graph(logits, of_node, 3), expected)


def test_frames_are_the_distances_between_backbones():
    chain = structure("complex")  # the ligand has no backbone
    assert chain.node_vectors is not None
    positions, vectors = (torch.from_numpy(a) for a in (chain.positions, chain.node_vectors))
    edge_index = torch.tensor([[5, 60, len(positions) - 1], [3, 4, 4]])
    graph_index = torch.zeros(len(positions), dtype=torch.long)
    framed = Layout.build(edge_index, graph_index, vectors, 1, num_weights=2).framed
    assert framed is not None and framed.tolist() == [0, 1]
    there, here = edge_index[:, framed]
    found = frame_basis(positions[there] - positions[here], vectors, edge_index[:, framed], cutoff=10.0, num_radial=3)
    for row, i, j in zip(found, there, here, strict=True):
        apart = torch.cdist(positions[j] + vectors[j], positions[i] + vectors[i]).flatten()
        torch.testing.assert_close(row, radial_basis(apart / 10.0, 3).flatten())
    without = Layout.build(edge_index[:, 2:], graph_index, vectors, 1, num_weights=2)
    assert without.framed is None
