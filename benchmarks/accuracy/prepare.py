"""Arrays for the comparison of accuracy, out of built corpora: what every model reads, edges included, made once.

    python benchmarks/accuracy/prepare.py [--corpora corpora/full] [--out corpora/accuracy]

Energies are less the energy of each element, fitted by least squares to the training molecules. Beside the arrays of a
corpus lies a JSON with the errors of the trivial predictors on its test molecules.
"""
# Shapes: n molecules, N nodes of all, E edges of all, Z elements.

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.tokens.batch import collate, with_neighbors

CUTOFF = 5.0  # Å
CHUNK = 500  # molecules whose neighbours are listed at a time
COUNTS = {  # molecules: the first of every split
    "qm9": {"train": 10_000, "val": 1_000, "test": 3_000},
    "forces": {"train": 2_000, "val": 300, "test": 1_000},
}

Array = NDArray[Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("corpora/full"))
    parser.add_argument("--out", type=Path, default=Path("corpora/accuracy"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in COUNTS:
        try:
            prepare(args.corpora / name, args.out)
        except InputError as error:
            print(f"prepare: {error}", file=sys.stderr)
            return 2
    return 0


def prepare(corpus: Path, out: Path) -> None:
    """Writes `out`/NAME.npz and NAME.json of one corpus; files that are there are made anew."""
    name = corpus.name
    splits = {}
    for split, count in COUNTS[name].items():
        source = Corpus.open(corpus, split)
        splits[split] = arrays(source[index] for index in range(min(count, len(source))))
    baselines = with_references(splits)
    flat = {f"{split}/{key}": np.ascontiguousarray(value) for split, of in splits.items() for key, value in of.items()}
    np.savez(out / f"{name}.npz", allow_pickle=False, **flat)
    counts = {split: len(of["num_nodes"]) for split, of in splits.items()}
    about = {"counts": counts, "cutoff": CUTOFF, "baselines": baselines}
    (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{name}: {counts} in {out / name}.npz")


def arrays(structures: Iterator[Structure]) -> dict[str, Array]:
    """One split: molecules one after the other, nodes of an edge counted within its molecule.

    node_type [N], positions [N, 3] Å, num_nodes [n], edge_index [2, E] (source j, destination i, sorted by i),
    num_edges [n], and of the labels, as far as there are: gap [n] eV, energy [n] eV (QM9: U0), forces [N, 3] eV/Å.
    """
    of: list[Structure] = list(structures)
    num_nodes = np.array([s.num_nodes for s in of])
    pieces, num_edges = [], []
    for begin in range(0, len(of), CHUNK):
        batch = with_neighbors(collate(of[begin : begin + CHUNK]), CUTOFF)
        assert batch.edge_index is not None
        graph_E = batch.graph_index[batch.edge_index[1]].numpy()
        start = np.cumsum(batch.num_nodes_B.numpy()) - batch.num_nodes_B.numpy()
        pieces.append(batch.edge_index.numpy() - start[graph_E])
        num_edges.append(np.bincount(graph_E, minlength=batch.num_structures))
    energies = [s.scalars.get("u0", s.energy) for s in of]
    found = {
        "node_type": np.concatenate([s.node_type for s in of]).astype(np.int64),
        "positions": np.concatenate([s.positions for s in of]).astype(np.float32),
        "num_nodes": num_nodes.astype(np.int64),
        "edge_index": np.concatenate(pieces, axis=1).astype(np.int16),
        "num_edges": np.concatenate(num_edges).astype(np.int64),
        "energy": np.array(energies, dtype=np.float64),
    }
    if "gap" in of[0].scalars:
        found["gap"] = np.array([s.scalars["gap"] for s in of], dtype=np.float64)
    forces = [s.forces for s in of if s.forces is not None]
    if forces:
        found["forces"] = np.concatenate(forces).astype(np.float32)
    return found


def with_references(splits: dict[str, dict[str, Array]]) -> dict[str, dict[str, float]]:
    """Takes the elements' energies off in place; label -> MAE (eV, eV/Å) of trivial predictors on the test molecules.

    The mean predictor of an energy is that of what is left once the elements are off; the linear one is fitted to the
    number of atoms of each element and a constant.
    """
    counts = {split: composition(of) for split, of in splits.items()}
    elements_Z = np.linalg.lstsq(counts["train"], splits["train"]["energy"], rcond=None)[0]
    for split, of in splits.items():
        of["energy"] = of["energy"] - counts[split] @ elements_Z
    found = {}
    for label in ("energy", "gap"):
        if label in splits["train"]:
            train, test = splits["train"][label], splits["test"][label]
            linear = np.linalg.lstsq(_affine(counts["train"]), train, rcond=None)[0]
            found[label] = {
                "mean predictor": _mae(test, train.mean()),
                "linear in composition": _mae(test, _affine(counts["test"]) @ linear),
            }
    if "forces" in splits["test"]:
        found["forces"] = {"zero forces": _mae(splits["test"]["forces"], 0.0)}
    return found


def composition(of: dict[str, Array]) -> Array:
    """[n, Z] atoms of each atomic number."""
    molecule_N = np.repeat(np.arange(len(of["num_nodes"])), of["num_nodes"])
    counts = np.zeros((len(of["num_nodes"]), 119))
    np.add.at(counts, (molecule_N, of["node_type"]), 1.0)
    return counts


def _affine(counts: Array) -> Array:
    return np.column_stack([counts, np.ones(len(counts))])


def _mae(true: Array, predicted: Array | float) -> float:
    return float(np.abs(true - predicted).mean())


if __name__ == "__main__":
    sys.exit(main())
