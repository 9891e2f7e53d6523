"""Plants 500 disguised copies among 20,000 structures, looks for them, and says what was found and what else rang.

    moiety data build qm9; moiety data build ccd; moiety data build crystals
    python benchmarks/leak_guard.py [--seed N] [--corpora corpora/tiny] [--show]

A planted copy counts as found when the scan names its original, or another structure that is the same as the original:
the corpora hold true relatives of their own. For that reason other findings of a duplicate are judged too. The judge
shares no code with the guard: molecules are the same when their bonds, by ASE's covalent radii, make isomorphic graphs
(networkx; stereo is not compared), crystals when ASE's SymmetryEquivalenceCheck says so at equal volume and their
volumes differ by less than a tenth (a measured and a computed lattice constant). What it does not confirm is a false
alarm.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import networkx
import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.utils.structure_comparator import SymmetryEquivalenceCheck

from moiety.data.leak import DUPLICATES, Leak, load, plant, scan
from moiety.data.structure import Structure

SEED = 20261122
TOTAL = 20_000
NUM_CCD = 7_000
NUM_CRYSTALS = 1_400
TRAIN = 0.6  # share of the structures
PLANTED = {  # disguise -> how many, of which corpora
    plant.moved: (80, ("qm9", "ccd")),
    plant.rattled: (80, ("qm9", "ccd")),
    plant.another_conformer: (100, ("qm9",)),
    plant.skewed: (80, ("crystals",)),
    plant.repeated: (80, ("crystals",)),
    plant.repeated_and_rattled: (80, ("crystals",)),
}
BONDED = 1.15  # sums of covalent radii
LARGEST_RATIO = 1.1  # of the volumes an atom of two crystals
MAX_SITES = 40  # of a crystal that is repeated


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON object; exit 1 where a copy was missed or 20 or more alarms were false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("corpora/tiny"))
    parser.add_argument("--seed", type=int, default=SEED, help="which structures are drawn, copied and disguised")
    parser.add_argument("--show", action="store_true", help="print all findings but the expected ones on stderr")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    train, test = _halves(args.corpora, rng)
    origin, planted = _plant(train, rng)
    test += planted

    start = time.perf_counter(), time.process_time()
    report = scan(train, test)
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]

    structures = {structure.id: structure for structure in (*train, *test)}
    duplicates = {leak.test: leak for leak in report.leaks if leak.kind in DUPLICATES}
    verdicts = {
        identity: _verdict(identity, duplicates.get(identity), origin, structures)
        for identity in (*origin, *(duplicates.keys() - origin.keys()))
    }
    for identity in sorted(verdicts) if args.show else ():
        if verdicts[identity] != "original":
            print(verdicts[identity], identity, duplicates.get(identity), file=sys.stderr)
    counts = Counter(verdicts.values())
    result = {
        "seed": args.seed,
        "structures": len(structures),
        "planted": len(planted),
        "found": counts["original"] + counts["twin"],
        "found_by_a_twin": counts["twin"],
        "found_by": dict(Counter(f"{origin[i][1]}: {duplicates[i].kind}" for i in origin if i in duplicates)),
        "true_elsewhere": counts["true"],
        "false": counts["false"],
        "counts": report.counts(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(json.dumps(result, indent=2))
    return int(result["found"] < len(planted) or result["false"] >= 20)


def _verdict(
    identity: str, leak: Leak | None, origin: dict[str, tuple[str, str]], structures: dict[str, Structure]
) -> str:
    """Of a planted copy: "original", "twin" (its original is in the training set again) or "missed"; else "true" or
    "false".
    """
    if identity not in origin:
        assert leak is not None  # only what rang is judged
        return "true" if same(structures[leak.train], structures[identity]) else "false"
    if leak is None:
        return "missed"
    original, _ = origin[identity]
    if leak.train == original:
        return "original"
    return "twin" if same(structures[leak.train], structures[original]) else "missed"


def same(first: Structure, second: Structure) -> bool:
    """One crystal, or one molecule but for its stereo and conformation, to a judge that is not the guard."""
    a, b = (Atoms(s.node_type, s.positions, cell=s.cell, pbc=s.pbc) for s in (first, second))
    if first.periodic and second.periodic:
        ratio = (a.cell.volume / len(a)) / (b.cell.volume / len(b))
        matcher = SymmetryEquivalenceCheck(to_primitive=True, scale_volume=True)
        return 1 / LARGEST_RATIO < ratio < LARGEST_RATIO and matcher.compare(a, b)
    if first.periodic != second.periodic:
        return False
    return networkx.is_isomorphic(_bonds(a), _bonds(b), node_match=lambda one, other: one == other)


def _bonds(molecule: Atoms) -> networkx.Graph:
    reach = [BONDED * radius for radius in natural_cutoffs(molecule)]
    graph = networkx.Graph()
    graph.add_nodes_from((place, {"element": number}) for place, number in enumerate(molecule.numbers.tolist()))
    graph.add_edges_from(zip(*neighbor_list("ij", molecule, reach), strict=True))
    return graph


def _halves(corpora: Path, rng: np.random.Generator) -> tuple[list[Structure], list[Structure]]:
    num_planted = sum(number for number, _ in PLANTED.values())
    sizes = {"ccd": NUM_CCD, "crystals": NUM_CRYSTALS, "qm9": TOTAL - num_planted - NUM_CCD - NUM_CRYSTALS}
    train: list[Structure] = []
    test: list[Structure] = []
    for name, size in sizes.items():
        structures, _ = load(str(corpora / name))
        drawn = [structures[place] for place in rng.permutation(len(structures))[:size]]
        for structure in drawn:
            structure.source = name
        cut = int(TRAIN * len(drawn))
        train += drawn[:cut]
        test += drawn[cut:]
    return train, test


def _plant(train: list[Structure], rng: np.random.Generator) -> tuple[dict[str, tuple[str, str]], list[Structure]]:
    """Copies of training structures that were not copied before, and of each: its original, its disguise."""
    origin: dict[str, tuple[str, str]] = {}
    planted: list[Structure] = []
    order = [train[place] for place in rng.permutation(len(train))]
    taken: set[str] = set()
    for disguise, (number, sources) in PLANTED.items():
        goal = len(planted) + number
        for original in order:
            if len(planted) == goal:
                break
            if original.source not in sources or original.id in taken or not _suits(original):
                continue
            copy = disguise(original, rng)
            if copy is None:
                continue
            taken.add(original.id)
            copy.id = f"planted:{original.id}"
            origin[copy.id] = (original.id, disguise.__name__)
            planted.append(copy)
        assert len(planted) == goal, f"too few structures for {disguise.__name__}"
    return origin, planted


def _suits(structure: Structure) -> bool:
    return structure.num_nodes <= MAX_SITES if structure.periodic else structure.num_nodes > 1


if __name__ == "__main__":
    sys.exit(main())
