"""Plants 500 disguised copies among 20,000 structures, looks for them, and says what was found and what else rang.

    moiety data build qm9; moiety data build ccd; moiety data build crystals
    python benchmarks/leak_guard.py [--corpora corpora/tiny] [--show]

A planted copy counts as found when the scan names its original; any other finding of a duplicate is an alarm, printed
with --show, for a person to judge: the corpora hold true relatives of their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from moiety.data.leak import DUPLICATES, load, plant, scan
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
MAX_SITES = 40  # of a crystal that is repeated


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON object; exit 1 where a copy was missed or 20 or more alarms rang."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("corpora/tiny"))
    parser.add_argument("--show", action="store_true", help="print what was missed, and every alarm, on stderr")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(SEED)
    train, test = _halves(args.corpora, rng)
    origin, planted = _plant(train, rng)
    test += planted

    start = time.perf_counter()
    report = scan(train, test)
    seconds = time.perf_counter() - start

    duplicates = [leak for leak in report.leaks if leak.kind in DUPLICATES]
    kind_of = {leak.test: leak.kind for leak in duplicates if origin.get(leak.test, (None,))[0] == leak.train}
    alarms = [leak for leak in duplicates if leak.test not in kind_of]
    missed = [identity for identity in origin if identity not in kind_of]
    for line in (*missed, *alarms) if args.show else ():
        print(line, file=sys.stderr)
    result = {
        "structures": len(train) + len(test),
        "planted": len(planted),
        "found": len(kind_of),
        "found_by": dict(Counter(f"{origin[identity][1]}: {kind}" for identity, kind in kind_of.items())),
        "alarms": len(alarms),
        "counts": report.counts(),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(json.dumps(result, indent=2))
    return int(bool(missed) or len(alarms) >= 20)


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
