"""What an objective hides can be recovered, scores what it should, and leaks nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import MASK, RESIDUE_MASK
from moiety.objectives import Objective, build_objectives
from moiety.objectives.base import remove_mean
from moiety.objectives.blocks import blocks_of
from moiety.objectives.dens import FORCES
from moiety.objectives.regression import Classification, Regression
from moiety.tokens.batch import Batch, collate
from moiety.tokens.labels import Label

CORPORA = Path(__file__).parent / "data/corpora"


def batch_of(*names: str, count: int = 12) -> Batch:
    return collate([s for name in names for s in Corpus.open(CORPORA / name, split="train").read(range(count))])


def objective(name: str, **options: float) -> Objective:
    return build_objectives({name: options})[0]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean_loss(objective: Objective, output: SimpleNamespace, batch: Batch) -> float:
    return float(objective.loss_sum(output, batch).sum() / objective.scored(batch).sum())


def test_noise_is_recovered_by_a_model_that_knows_it() -> None:
    clean = batch_of("qm9", "proteins")
    task = objective("coordinates")
    noisy = task.corrupt(clean, rng())
    sigma = (noisy.positions - clean.positions).norm() / noisy.node_targets["noise"].norm()
    assert 0.01 < sigma < 0.3
    assert mean_loss(task, SimpleNamespace(noise=noisy.node_targets["noise"]), noisy) == 0


def test_predicting_no_noise_scores_one_whatever_the_size() -> None:
    task = objective("coordinates")
    for num_nodes in (2, 3, 20):
        structures = [
            Structure(np.full(num_nodes, 6), np.random.default_rng(i).normal(size=(num_nodes, 3))) for i in range(4000)
        ]
        noisy = task.corrupt(collate(structures), rng())
        assert mean_loss(task, SimpleNamespace(noise=torch.zeros_like(noisy.positions)), noisy) == pytest.approx(
            1, abs=0.04
        )


def test_the_centre_of_mass_does_not_move() -> None:
    clean = batch_of("qm9")
    moved = objective("coordinates").corrupt(clean, rng()).positions - clean.positions
    centre = torch.zeros(clean.num_structures, 3).index_add(0, clean.graph_index, moved)
    assert centre.abs().max() < 1e-4


def test_the_noise_level_is_hidden_in_the_share_asked_for() -> None:
    clean = collate([Structure(np.array([6, 8]), np.eye(2, 3)) for _ in range(5000)])
    hidden = objective("coordinates", hide_sigma=0.2).corrupt(clean, rng()).noise_level.isnan()  # type: ignore[union-attr]
    assert float(hidden.float().mean()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("name", ["coordinates", "blocks"])
def test_clean_structures_stay_as_they_are_and_are_not_told_so(name: str) -> None:
    zigzag = np.array([[1.3 * i, 0.8 * (i % 2), 0.0] for i in range(6)])
    clean, task = collate([Structure(np.full(6, 6), zigzag)] * 4000), objective(name, clean=0.5, hide_sigma=0.2)
    noisy = task.corrupt(clean, rng())
    moved = (noisy.positions - clean.positions).view(-1, 18).abs().amax(-1) > 1e-3
    assert float(moved.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(task.scored(noisy) > 0, moved)
    assert noisy.noise_level is not None and noisy.noise_level[~moved].isnan().all()
    assert float(noisy.noise_level.isnan().float().mean()) == pytest.approx(0.7, abs=0.03)


def test_a_lone_atom_is_not_scored() -> None:
    task = objective("coordinates")
    noisy = task.corrupt(
        collate([Structure(np.array([29]), np.zeros((1, 3))), Structure(np.array([1, 1]), np.eye(2, 3))]), rng()
    )
    assert task.scored(noisy).tolist() == [0, 1]


def test_hydrogens_of_a_hidden_atom_are_taken_away() -> None:
    clean = batch_of("qm9", count=40)
    spoiled = objective("types", share=0.5).corrupt(clean, rng())
    hidden = spoiled.node_targets["types"] >= 0
    assert (
        hidden.any() and (spoiled.node_type[hidden] == MASK).all() and (spoiled.node_targets["types"][hidden] > 1).all()
    )
    apart = spoiled.positions.double() + 1e3 * spoiled.graph_index[:, None]
    hydrogen = apart[spoiled.node_type == 1]
    assert torch.cdist(hydrogen, apart[hidden], compute_mode="donot_use_mm_for_euclid_dist").min() > 1.35
    assert len(spoiled.node_type) < len(clean.node_type)
    assert len(spoiled.node_targets["types"]) == len(spoiled.node_type)


def test_a_hidden_residue_keeps_its_size_and_its_place() -> None:
    clean = batch_of("proteins", count=4)
    spoiled = objective("types", share=0.3).corrupt(clean, rng())
    hidden = spoiled.node_targets["types"] >= 0
    assert (spoiled.node_type[hidden] == RESIDUE_MASK).all()
    assert torch.equal(spoiled.positions, clean.positions) and torch.equal(spoiled.node_vectors, clean.node_vectors)


def test_of_a_chain_any_share_is_hidden_up_to_all_of_it() -> None:
    chains = collate(Corpus.open(CORPORA / "proteins", split="train").read(range(6)) * 8)
    hidden = objective("types", share=0.2).corrupt(chains, rng()).node_targets["types"] >= 0
    share_B = torch.zeros(48).index_add(0, chains.graph_index, hidden.float()) / chains.num_nodes_B
    assert share_B.min() < 0.35 and share_B.max() > 0.9 and share_B.mean() == pytest.approx(0.6, abs=0.08)


def test_atoms_are_never_hidden_whole() -> None:
    alone = collate([Structure(np.array([29]), np.zeros((1, 3))) for _ in range(50)])
    assert (objective("types", share=0.9).corrupt(alone, rng()).node_targets["types"] == -1).all()


def test_a_strain_turns_the_clean_cell_into_the_strained_one() -> None:
    clean = batch_of("crystals", "qm9")
    task = objective("cell")
    strained = task.corrupt(clean, rng())
    periodic = clean.pbc.all(-1)
    assert task.scored(strained).tolist() == periodic.float().tolist()
    assert torch.equal(strained.positions[~periodic[clean.graph_index]], clean.positions[~periodic[clean.graph_index]])
    strain = torch.linalg.solve(clean.cell[periodic], strained.cell[periodic]) - torch.eye(3)
    target = strained.targets["strain"][periodic]
    sigma = (strain * target).sum((1, 2)) / target.square().sum((1, 2))
    assert ((sigma > 0.0099) & (sigma < 0.0301)).all()
    assert torch.allclose(strain, sigma[:, None, None] * target, atol=1e-5)
    assert mean_loss(task, SimpleNamespace(strain=strained.targets["strain"]), strained) == 0


def test_fractional_coordinates_survive_a_strain() -> None:
    clean = batch_of("crystals")
    strained = objective("cell").corrupt(clean, rng())
    fractional = [
        torch.linalg.solve(b.cell[b.graph_index].transpose(1, 2), b.positions[..., None]) for b in (clean, strained)
    ]
    assert torch.allclose(*fractional, atol=1e-4)


def test_the_trivial_loss_of_types_is_their_entropy() -> None:
    types = torch.tensor([1, 1, 1, 6, 6, 8, 8])
    assert objective("types").trivial_loss(types) == pytest.approx(np.log(2))


def test_missing_labels_are_not_scored() -> None:
    structures = [Structure(np.array([6]), np.zeros((1, 3)), scalars=labels) for labels in ({"gap": 3.0}, {"u0": 1.0})]
    task = Regression("gap", Label("gap"), std=2.0)
    batch = collate(structures, labels=task.labels)
    assert task.scored(batch).tolist() == [1, 0]
    loss = task.loss_sum(SimpleNamespace(predictions={"gap": torch.tensor([3.0, 7.0])}), batch)
    assert loss.tolist() == [0, 0]


def two_molecules(**labels: Any) -> list[Structure]:
    """Two atoms with the labels, and one atom without."""
    return [
        Structure(np.array([6, 8]), np.eye(2, 3), **labels),
        Structure(np.array([1]), np.zeros((1, 3))),
    ]


def test_labels_of_nodes_and_tensors_are_scored_where_they_are() -> None:
    forces = np.arange(6.0).reshape(2, 3)
    alpha = np.diag([1.0, 2.0, 3.0])
    structures = two_molecules(forces=forces, tensors={"alpha": alpha}, node_scalars={"charge": [0.5, -0.5]})
    tasks = [
        Regression("forces", Label("forces", (3,), per_node=True), std=2.0),
        Regression("alpha", Label("alpha", (3, 3)), std=1.0),
        Regression("charge", Label("charge", per_node=True), std=1.0),
    ]
    batch = collate(structures, labels=[label for task in tasks for label in task.labels])
    said = {
        "forces": torch.tensor(np.vstack([forces + 4.0, [[9.0, 9.0, 9.0]]])),
        "alpha": torch.tensor(np.stack([alpha + 1.0, alpha])),
        "charge": torch.tensor([0.5, 0.5, 7.0]),
    }
    scored = [task.scored(batch).tolist() for task in tasks]
    assert scored == [[2, 0], [1, 0], [2, 0]]
    losses = [task.loss_sum(SimpleNamespace(predictions=said), batch) for task in tasks]
    # Huber, the error less half the elbow: 2 spreads at two nodes, 1 in a matrix, 1 at one of two nodes
    assert [loss[0].item() for loss in losses] == pytest.approx([2 * 1.95, 0.95, 0.95])
    assert all(loss[1] == 0 for loss in losses)


def test_classes_are_learned_by_their_number() -> None:
    structures = two_molecules(node_scalars={"fold": [2.0, np.nan]})
    task = Classification("fold", Label("fold", per_node=True))
    batch = collate(structures, labels=task.labels)
    logits = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert task.scored(batch).tolist() == [1, 0]
    loss_B = task.loss_sum(SimpleNamespace(predictions={"fold": logits}), batch)
    assert loss_B.tolist() == pytest.approx([float(-logits[0].log_softmax(-1)[2]), 0.0])


def test_a_number_and_a_vector_of_the_same_name_are_two_labels() -> None:
    structure = Structure(np.array([6]), np.zeros((1, 3)), dipole=np.array([0.0, 0.0, 1.0]), scalars={"dipole": 4.8})
    assert Label("dipole").of(structure) == 4.8
    assert Label("dipole", (3,)).values([structure]).tolist() == [[0.0, 0.0, 1.0]]


def test_an_unknown_objective_or_option_is_named() -> None:
    with pytest.raises(InputError, match="colour"):
        build_objectives({"colour": {}})
    with pytest.raises(InputError, match="sigma_mux"):
        build_objectives({"coordinates": {"sigma_mux": 1.0}})


def blocks(structure: Structure, residues: float = 6.0) -> list[int]:
    return blocks_of(collate([structure]), residues, rng()).tolist()


def test_blocks_are_cut_at_the_bonds_that_turn() -> None:
    assert sorted(Counter(blocks(conformer("c1ccccc1-c1ccccc1"))).values()) == [11, 11]
    ethanol = conformer("CCO")  # CH3, CH2, OH
    assert sorted(Counter(blocks(ethanol)).values()) == [2, 3, 4]
    assert len(set(blocks(conformer("c1ccccc1")))) == 1
    crystal = Corpus.open(CORPORA / "crystals", split="train").read([0])[0]
    assert len(set(blocks(crystal))) == crystal.num_nodes


def test_stretches_of_residues_follow_the_chain() -> None:
    chain = Corpus.open(CORPORA / "proteins", split="train").read([0])[0]
    found = blocks(chain)
    assert found == sorted(found) and 3 < chain.num_nodes / len(set(found)) < 12


def conformer(smiles: str) -> Structure:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Structure(np.array(numbers), molecule.GetConformer().GetPositions())


def test_blocks_keep_their_shape_and_the_noise_is_their_motion() -> None:
    clean = batch_of("qm9", "ccd", "proteins", "crystals").map(double)
    task = objective("blocks", sigma_min=1e-4, sigma_max=1e-4)
    noisy = task.corrupt(clean, rng())
    moved = (noisy.positions - clean.positions) / 1e-4
    noise = noisy.node_targets["noise"]
    assert float((moved - noise).abs().max()) < 1e-2  # to first order
    block = torch.from_numpy(blocks_of(clean, 6.0, rng()))
    together = (block[:, None] == block[None, :]).nonzero().T
    before, after = ((b.positions[together[0]] - b.positions[together[1]]).norm(dim=1) for b in (clean, noisy))
    assert torch.allclose(before, after, atol=1e-9)
    lengths = [b.node_vectors.norm(dim=-1) for b in (clean, noisy)]
    assert torch.allclose(*lengths, atol=1e-9) and not torch.equal(clean.node_vectors, noisy.node_vectors)
    scored = task.scored(noisy).bool()
    assert scored.any()
    assert mean_loss(task, SimpleNamespace(noise=noise), noisy) == 0
    assert mean_loss(task, SimpleNamespace(noise=torch.zeros_like(noise)), noisy) == pytest.approx(1, abs=1e-6)


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_blocks_do_not_move_or_turn_the_whole() -> None:
    clean = batch_of("ccd").map(double)
    noise = objective("blocks").corrupt(clean, rng()).node_targets["noise"]
    arm = remove_mean(clean.positions, clean)
    for values in (noise, torch.linalg.cross(arm, noise)):
        total = torch.zeros(clean.num_structures, 3).double().index_add(0, clean.graph_index, values)
        assert total.abs().max() < 1e-6


def test_a_hint_is_a_nearly_clean_copy() -> None:
    clean = batch_of("qm9", count=40)
    noisy = objective("self_conditioned", hide_hint=0.25).corrupt(clean, rng())
    assert noisy.hint_positions is not None
    hidden = noisy.hint_positions.isnan().any(-1)
    assert 0.05 < float(hidden.float().mean()) < 0.5
    assert float((noisy.hint_positions - clean.positions)[~hidden].std()) < 0.01
    assert torch.equal(objective("coordinates").corrupt(clean, rng()).positions, noisy.positions)


def test_forces_go_in_where_the_noise_is_asked_and_are_asked_elsewhere() -> None:
    forces = np.random.default_rng(0).normal(size=(6, 3))
    labelled = [Structure(np.full(6, 6), 3 * np.eye(6, 3), forces=forces) for _ in range(400)]
    clean = collate([*labelled, Structure(np.full(6, 6), 3 * np.eye(6, 3))], labels=(FORCES,))
    task = objective("dens", force_unit=2.0)
    noisy = task.corrupt(clean, rng())
    moved = (noisy.positions != clean.positions).any(-1)
    labelled_nodes = clean.graph_index < 400
    assert float(moved[labelled_nodes].float().mean()) == pytest.approx(0.25, abs=0.04)
    assert moved[~labelled_nodes].all()
    half = torch.from_numpy(forces / 2).float().repeat(400, 1)
    of_moved, asked = moved[labelled_nodes], noisy.node_targets["noise"][labelled_nodes]
    told = noisy.node_vectors[labelled_nodes, 0]
    assert torch.allclose(told[of_moved], half[of_moved]) and not told[~of_moved].any()
    assert torch.allclose(asked[~of_moved], half[~of_moved])
    assert float(asked[of_moved].std()) == pytest.approx(1, abs=0.1)
    assert mean_loss(task, SimpleNamespace(noise=noisy.node_targets["noise"]), noisy) == 0
    assert task.scored(noisy).tolist() == [1] * 401


def test_a_recipe_displaces_once() -> None:
    with pytest.raises(InputError, match="coordinates and blocks"):
        build_objectives({"coordinates": {}, "types": {}, "blocks": {}})
