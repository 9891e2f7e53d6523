"""Speed and memory of models of one size, Moiety's beside TorchMD-NET, TensorNet, ViSNet, MACE and eSEN.

    make bench                                                    everything, on a quiet core
    python benchmarks/speed.py --quick [--models moiety-l1,torchmd-et]      the first table, in two rounds
    make bench-gpu                                                on a CUDA device

Every model has 3 million random weights, its own process on one core, and the same edges, which are found before the
clock starts. Processes take their steps in turns and the best counts, in CPU seconds: quote ratios, not seconds.
Writes benchmarks/results/speed.json, speed_scaling.svg, and the tables of docs/speed.md (not with --quick or --models).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peers import gpu, tables
from peers.crew import Crew, check_names, growing, in_turns, machine
from peers.models import MOIETY_SHAPES
from peers.worker import TASKS, Request
from rich.console import Console

from moiety.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/speed.md"
NUM_PARAMETERS = 3_000_000
BARS = {"8 molecules": "molecules 8", "96-atom cell": "silicon"}
ATOMS = (20, 64, 216, 512, 2000, 20_000)
BATCHES = (1, 4, 16, 64, 128)
GLOBAL_NODES = (128, 512)
MOST_SECONDS = 120.0  # a longer step is not taken
ROUNDS, QUICK_ROUNDS, SCALING_ROUNDS, GLOBAL_ROUNDS = 6, 2, 3, 15


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        names = check_names(args.models)
        if args.device == "cuda":
            return gpu.run(names, NUM_PARAMETERS, args.out or ROOT / "benchmarks/results/speed_gpu.json")
        whole = not args.quick and not args.models
        if whole:
            tables.around_marks(PAGE)  # after the measurements would be late
        results = measure(names, args.quick)
    except InputError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 2
    for found in tables.sheets(results):
        found.show(Console())
    out = args.out or (ROOT / "benchmarks/results/speed.json" if whole else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        if not args.quick:
            tables.plot(results, out.with_name(f"{out.stem}_scaling.svg"))
    if whole:
        tables.fill(PAGE, tables.page(results))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[], help="some of them, with commas")
    parser.add_argument("--quick", action="store_true", help="two rounds of the first table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args(argv)


def measure(names: list[str], quick: bool) -> dict[str, Any]:
    """All that is asked for on the CPU."""
    load = [os.getloadavg()[0]]
    with Crew(names, NUM_PARAMETERS) as crew:
        told(f"{len(crew)} of {len(names)} models are built")
        results: dict[str, Any] = {"broken": crew.broken, "models": known(crew)}
        results["bars"] = {
            label: {task: steps(crew, Request(case, task), quick) for task in TASKS} for label, case in BARS.items()
        }
        if not quick:
            told("global attention")
            results["global"] = cost_of_global(crew)
    if not quick:
        for kind in ("dense", "sparse"):
            # the small ones warm the large ones up
            sizes = {n: Request(f"{kind} {n}", "energy", warm=int(n < 2000)) for n in ATOMS}
            results[kind] = one_by_one(crew, f"energy of {kind} boxes", sizes)
        sizes = {n: Request(f"molecules {n}", "direct", warm=1) for n in BATCHES}
        results["molecules"] = one_by_one(crew, "batches of molecules", sizes)
        told("memory")
        results["memory"] = memory(crew)
    return results | {"machine": machine(crew.introductions) | {"load": [*load, os.getloadavg()[0]]}}


def steps(crew: Crew, request: Request, quick: bool) -> dict[str, Any]:
    told(f"{request.case}, {request.task}")
    return in_turns(crew, request, QUICK_ROUNDS if quick else ROUNDS)  # the first of them warms up


def known(crew: Crew) -> dict[str, Any]:
    return {name: {"parameters": words["parameters"]} for name, words in crew.introductions.items() if name in crew}


def one_by_one(names: Iterable[str], what: str, cases: Mapping[int, Request]) -> dict[int, dict[str, Any]]:
    """Growing sizes, all of a model's in a process of its own: memory would not hold the large steps of all models."""
    found: dict[int, dict[str, Any]] = {size: {} for size in cases}
    for name in names:
        told(f"{what}, {name}")
        with Crew([name], NUM_PARAMETERS) as crew:
            for size, costs in growing(crew, cases, SCALING_ROUNDS, MOST_SECONDS).items():
                found[size].update(costs | crew.lost)
    return found


def cost_of_global(crew: Crew) -> dict[int, dict[str, Any]]:
    """The same model with its global attention and without, in turns."""
    workers = {name: crew[name] for name, shape in MOIETY_SHAPES.items() if shape["global_every"] and name in crew}
    found: dict[int, dict[str, Any]] = {}
    for nodes in GLOBAL_NODES:
        for task in ("energy", "direct"):
            costs: dict[str, Any] = {}
            for turn in range(GLOBAL_ROUNDS):
                for on in (True, False):
                    request = Request(f"dense {nodes}", task, warm=int(turn == 0), with_global=on)
                    key = "seconds" if on else "seconds_without"
                    for name, answer in in_turns(workers, request, 1).items():
                        cost = costs.setdefault(name, {})
                        if "error" in answer:
                            cost["error"] = answer["error"]
                        else:
                            cost[key] = min(cost.get(key, answer["seconds"]), answer["seconds"])
            found.setdefault(nodes, {})[task] = costs
    return found


def memory(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of the first large step of a fresh process: memory that a process once had is not given back."""
    found: dict[str, dict[str, Any]] = {}
    for task in ("energy", "direct"):
        for name in names:
            with Crew([name], NUM_PARAMETERS) as crew:
                in_turns(crew, Request("dense 20", task), 1)  # loads what is loaded at the first step
                found.setdefault(task, {}).update(in_turns(crew, Request("dense 2000", task), 1) | crew.lost)
    return found


def told(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
