"""The hundred questions of hand_written.yaml, with the structures that they are about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase.build import bulk
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy.optimize import brentq
from scipy.spatial.distance import cdist

from moiety.bridge.evaluate import Exam
from moiety.bridge.facts import Fact
from moiety.bridge.rows import Row
from moiety.data.structure import Structure

FILE = Path(__file__).with_name("hand_written.yaml")
SEED = 1


def hand_written() -> Exam:
    """All questions, by class; the name of the fact is the class."""
    structures, rows = [], []
    for kind, entries in yaml.safe_load(FILE.read_text()).items():
        for entry in entries:
            fact = Fact("by hand", kind, entry["answer"], {})
            rows.append(Row(len(structures), entry["answer"], entry["ask"], (len(structures),), fact=fact))
            structures.append(built(entry))
    return Exam(structures, rows, np.zeros(len(rows), dtype=bool))


def built(entry: Mapping[str, Any]) -> Structure:
    """The structure of an entry, which says it by `smiles`, `crystal` or `pair`."""
    if "smiles" in entry:
        return molecule(entry["smiles"])
    if "crystal" in entry:
        name, lattice, edge = entry["crystal"]
        atoms = bulk(name, lattice, a=edge)
        return Structure(
            atoms.numbers, atoms.positions, domain="crystal", cell=atoms.cell.array, pbc=np.ones(3, dtype=bool)
        )
    first, second, distance = entry["pair"]
    return beside(molecule(first), molecule(second), distance)


def molecule(smiles: str) -> Structure:
    """In a conformer of RDKit's."""
    graph = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(graph, randomSeed=SEED)
    AllChem.MMFFOptimizeMolecule(graph)
    return Structure(
        np.array([atom.GetAtomicNum() for atom in graph.GetAtoms()]), graph.GetConformer().GetPositions(), text=[smiles]
    )


def beside(first: Structure, second: Structure, distance: float) -> Structure:
    """Two molecules side by side along x, their closest atoms at a distance (Å)."""
    one, two = (own.positions - own.positions.mean(0) for own in (first, second))

    along = np.array([1.0, 0.0, 0.0])

    def excess(shift: float) -> float:
        return float(cdist(one, two + shift * along).min()) - distance

    shift = brentq(excess, np.ptp(one[:, 0]) / 2, 50.0)
    return Structure(
        np.concatenate([first.node_type, second.node_type]),
        np.concatenate([one, two + shift * along]),
        domain="complex",
    )
