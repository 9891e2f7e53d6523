"""What the text bridge knows of structures, beside everything that could say as much without reading them.

    make bridge                                             one seed, four arms
    python benchmarks/bridge.py --seeds 0,1,2 --arms all    the table of docs/bridge.md
    python benchmarks/bridge.py --show                      what is there by now; trains nothing

Every arm is trained by the same stages with the same steps (finetune/configs/bridge_*.yaml) and then asked, a process
an arm, as many at a time as there are cores. The language model, which is new, is shared. It is small: what is tested
is the mechanism.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from asked.examiner import Findings, examine
from paired.runs import call, side_by_side
from peers.crew import ROOT, machine
from peers.tables import Sheet, around_marks, fill
from rich.console import Console

from moiety.errors import InputError

PAGE = ROOT / "docs/bridge.md"
RESULTS = ROOT / "benchmarks/results/bridge.json"
STAGES = ("align", "numbers", "generate", "instruct", "search", "calibrate")
ANSWERING = ("align", "generate", "instruct", "calibrate")  # of who is asked for no numbers, and not to search
LANGUAGE = "language"


@dataclass(frozen=True)
class Arm:
    """What is changed in every stage, what in one, and which stages it has.

    Who sees no structure has none to align.
    """

    name: str
    changes: tuple[str, ...] = ()
    of_stage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stages: tuple[str, ...] = ANSWERING


# Who sees nothing has nothing to point at. What is read in tokens alone takes a bridge that goes on learning.
UNTAUGHT = {
    stage: (
        "objectives={answering: {}, deciding: {weight: 0.3}}",
        f"trained=[bridge, speech, {of_language}]",
    )
    for stage, of_language in (("generate", "language"), ("instruct", "lora"))
}
ARMS = {
    "bridge": Arm("the bridge", stages=STAGES),
    "blind": Arm("blind, retrained", ("sees=nothing",), UNTAUGHT, ANSWERING[1:]),
    "composition": Arm("composition only, retrained", ("sees=composition",)),
    "string": Arm("text string only, retrained", ("sees=string",), stages=ANSWERING[1:]),
    "random": Arm("random tower", of_stage={"align": ("random_tower=true", "trained=[bridge, numbers]")}),
    "untaught": Arm("not taught to point", of_stage=UNTAUGHT),
    "projector": Arm("MLP projector", of_stage={"align": ("bridge={kind: mlp}",)}),
}
HEADLINE = ("bridge", "blind", "composition", "string")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        around_marks(PAGE)
        jobs = [(name, seed) for seed in args.seeds for name in args.arms]
        if args.examine:
            for job in jobs:
                findings(*job, args.out)
            return 0
        if not args.show:
            train_language(args.out)
            side_by_side(lambda job: train_arm(*job, args.out), jobs, "training and asking")
        found = {job: examined for job in jobs if (examined := findings(*job, args.out)) is not None}
    except InputError as error:
        print(f"bridge.py: {error}", file=sys.stderr)
        return 2
    sheets = tables(found)
    for one in sheets:
        one.show(Console())
    write(found, sheets)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="tables of what is there")
    parser.add_argument("--examine", action="store_true", help="ask what is trained, and draw no table")
    parser.add_argument("--arms", type=arms, default=HEADLINE, help="names with commas between, or all")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bridge", help="folder of the runs")
    return parser.parse_args(argv)


def arms(text: str) -> list[str]:
    names = list(ARMS) if text == "all" else text.split(",")
    if unknown := set(names) - ARMS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(ARMS)}")
    return names


def train_language(out: Path) -> None:
    """Once for all."""
    if not (out / LANGUAGE / "export/config.json").is_file():
        config = ROOT / f"finetune/configs/bridge_{LANGUAGE}.yaml"
        words = ["--config", str(config), "--out", out / LANGUAGE]
        call(LANGUAGE, "finetune/bridge.py", *words, ranks=min(2, os.cpu_count() or 1))  # a micro-batch each


def train_arm(name: str, seed: int, out: Path) -> None:
    """Stage after stage, and the questions."""
    arm, start = ARMS[name], ["start=''", f"language={out / LANGUAGE / 'export'}"]
    for stage in arm.stages:
        folder = out / f"{name}-{seed}" / stage
        if not (folder / "export/config.json").is_file():
            config = ROOT / f"finetune/configs/bridge_{stage}.yaml"
            words = [*arm.changes, *arm.of_stage.get(stage, ()), *start]
            words += [f"training.seed={seed}", f"data.seed={seed}"]
            call(folder.name, "finetune/bridge.py", "--config", str(config), *words, "--out", folder)
        start = [f"start={folder / 'export'}"]
    call(name, "benchmarks/bridge.py", "--examine", "--arms", name, "--seeds", str(seed), "--out", out)


CLASSES = {
    "A": "A composition",
    "B": "B bonds",
    "C": "C geometry",
    "T": "two compared",
    "N": "number asked",
    "X": "unfitting",
}
OF_BRIDGE = (
    "in the words of training", "in other words", "combinations kept back", "majority", "nearest neighbour",
    "encoder + probe", "shuffled, same domain", "shuffled, same composition",
)  # fmt: skip
BY_HAND = "by hand"


def findings(name: str, seed: int, out: Path) -> Findings | None:
    """What an arm knows, asked once; None of one that is not trained."""
    folder = out / f"{name}-{seed}"
    if not (folder / STAGES[-1] / "export/config.json").is_file():
        return None
    sees = next((change.partition("=")[2] for change in ARMS[name].changes if change.startswith("sees=")), "all")
    return examine(folder, sees, name == "bridge", folder.parent / LANGUAGE / "export")


def tables(found: Mapping[tuple[str, int], Findings]) -> list[Sheet]:
    """Right answers by class, those of class C by fact, and everything else that was measured."""
    seeds = sorted({seed for _, seed in found})
    conditions = [("bridge", name) for name in OF_BRIDGE]
    conditions.insert(2, ("bridge", f"written {BY_HAND}"))
    conditions += [(arm, OF_BRIDGE[0]) for arm in ARMS if arm != "bridge"]
    keys = sorted({key for one in found.values() for shares in one.shares.values() for key in shares})
    of_class = [key for key in CLASSES if key in keys]
    facts = [key for key in keys if key.startswith("C:") and BY_HAND not in key]
    sheets = []
    for title, columns, names in (
        ("Right answers, %", of_class, [CLASSES[key] for key in of_class]),
        ("Right answers of class C by fact, %", facts, [key[2:].replace("_", " ") for key in facts]),
    ):
        rows = []
        for arm, condition in conditions:
            shares = [found[arm, seed].shares.get(condition) for seed in seeds if (arm, seed) in found]
            if any(shares):
                label = (
                    f"{ARMS[arm].name}, {condition}"
                    if condition in (*OF_BRIDGE[:3], f"written {BY_HAND}")
                    else condition
                )
                label = label if arm == "bridge" else ARMS[arm].name
                rows.append([label, *(cell([own[key] for own in shares if own and key in own]) for key in columns)])
        sheets.append(Sheet(title, ["", *names], rows))
    others = [found["bridge", seed].numbers for seed in seeds if ("bridge", seed) in found]
    names = list(dict.fromkeys(name for one in others for name in one))
    rows = [[name, spread([one[name] for one in others if name in one])] for name in names]
    sheets.append(Sheet("Of the bridge", ["", "measured"], rows))
    return sheets


def cell(shares: Sequence[Any]) -> str:
    """Mean over seeds in %; of one seed with the bootstrap interval."""
    if not shares:
        return "–"
    values = [100 * share[0] for share in shares]
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    low, high = shares[0][1]
    return f"{values[0]:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" + (f" ± {np.std(values, ddof=1):.1g}" if len(values) > 1 else "")


def write(found: Mapping[tuple[str, int], Findings], sheets: Sequence[Sheet]) -> None:
    """The figures, and the tables of the page."""
    where = machine({})
    seeds = sorted({seed for _, seed in found})
    results = {f"{name}-{seed}": vars(one) for (name, seed), one in found.items()}
    RESULTS.write_text(json.dumps({"machine": where, "findings": results}, indent=1) + "\n")
    head = f"Measured on {where['date']}, commit {where['commit']}, seeds {', '.join(map(str, seeds))}."
    fill(PAGE, "\n\n".join([head, *(one.markdown() for one in sheets)]))


if __name__ == "__main__":
    sys.exit(main())
