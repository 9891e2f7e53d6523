"""Neighbour lists agree with ASE's, whatever is periodic, and refuse what would end the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list as ase_neighbors

from moiety.data.convert import from_object
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.tokens.batch import collate, with_neighbors

CORPORA = Path(__file__).parent / "data/corpora"
SYSTEMS = {
    "molecule": molecule("C2H6CHOH"),
    "primitive cell": bulk("Cu"),
    "slab without a third vector": fcc111("Pt", (2, 2, 3), vacuum=None, periodic=False),
    "slab with vacuum": fcc111("Pt", (2, 2, 3), vacuum=8.0),
    "wire": Atoms("C3", [[0, 0, 0], [1.5, 0, 0], [3.0, 0.4, 0]], cell=[4.2, 0, 0], pbc=[True, False, False]),
}


def lengths(structures: list[Structure]) -> list[np.ndarray]:
    """Sorted edge lengths of each structure."""
    batch = with_neighbors(collate(structures), 5.0)
    assert batch.edge_index is not None and batch.edge_shift is not None
    source, destination = batch.edge_index
    assert (destination.diff() >= 0).all(), "edges are sorted by destination"
    vectors = batch.positions[source] + batch.edge_shift - batch.positions[destination]
    graph = batch.graph_index[destination].numpy()
    distance = vectors.norm(dim=-1).numpy()
    return [np.sort(distance[graph == index]) for index in range(len(structures))]


def test_lists_agree_with_ase() -> None:
    found = lengths([from_object(atoms) for atoms in SYSTEMS.values()])
    for (name, atoms), distances in zip(SYSTEMS.items(), found, strict=True):
        expected = np.sort(ase_neighbors("d", atoms, 5.0))
        assert len(distances) == len(expected), name
        assert np.allclose(distances, expected, atol=1e-5), name


def test_residues_reach_twice_as_far_and_meet_atoms_half_way() -> None:
    protein = Corpus.open(CORPORA / "proteins", split="train")[0]
    gap = np.linalg.norm(protein.positions[:, None] - protein.positions, axis=-1)
    assert len(lengths([protein])[0]) == (gap < 10).sum() - protein.num_nodes
    carbon_and_alanine = [6, 119]
    for distance, edges in ((7.4, 2), (7.6, 0)):
        pair = Structure(np.array(carbon_and_alanine), np.array([[0, 0, 0], [distance, 0, 0]]))
        assert len(lengths([pair])[0]) == edges


def test_stored_edge_counts_are_those_of_the_model() -> None:
    for name in ("qm9", "crystals", "proteins"):
        corpus = Corpus.open(CORPORA / name, split="train")
        counts = [len(d) for d in lengths(corpus.read(range(10)))]
        assert counts == corpus.num_edges[np.arange(10)].tolist()


def test_a_vast_or_infinite_structure_is_refused() -> None:
    extractor = MoietyFeatureExtractor()
    for x in (5e3, np.inf):
        with pytest.raises(ValueError, match="units"):
            extractor([molecule("H2O"), Atoms("CO", [[0, 0, 0], [x, 0, 0]])])
