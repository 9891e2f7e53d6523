"""The same comparison on a CUDA device: precision, compilation, utilisation, memory, and where the time goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peers import tables
from peers.crew import Asked, Cost, Crew, in_turns, machine
from peers.models import MOIETY_SHAPES, build
from peers.worker import Request
from rich.console import Console

from moiety.errors import InputError
from moiety.training.plan import activation_bytes

PEAKS = {  # FLOP/s of dense bf16 products, from the makers' data sheets, by a part of the device's name
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip
CASES = {"128 molecules": "molecules 128", "2,000 atoms": "dense 2000"}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "bf16, compiled": {"bf16": True, "compile": True},
}
ROUNDS, WARM = 10, 3
FIRST_BATCH, LARGEST_BATCH = 128, 2**17  # molecules


def run(names: list[str], num_parameters: int, out: Path) -> int:
    """Measures on device 0, prints the tables, writes the JSON.

    Raises:
        InputError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; without --device it runs on the CPU")
    load = os.getloadavg()[0]
    with Crew(names, num_parameters, "cuda") as crew:
        device = torch.cuda.get_device_name()
        results = measure(crew) | {"device": device, "broken": crew.broken}
        results["machine"] = machine(crew.introductions) | {"load": [load, os.getloadavg()[0]]}
    results["planned"] = planned(results["steps"], num_parameters)
    for found in sheets(results):
        found.show(Console())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(crew: Mapping[str, Asked]) -> dict[str, Any]:
    """Direct steps of every case and mode, their FLOPs, the largest batches, and profiles of the last case."""
    steps = {
        label: {
            mode: in_turns(crew, Request(case, "direct", warm=WARM, **options), ROUNDS)
            for mode, options in MODES.items()
        }
        for label, case in CASES.items()
    }
    flops = {
        label: {name: worker.ask(Request(case, "direct", want="flops")) for name, worker in crew.items()}
        for label, case in CASES.items()
    }
    batches = {name: largest(fits(worker), FIRST_BATCH, LARGEST_BATCH) for name, worker in crew.items()}
    last = list(CASES.values())[-1]
    profiles = {
        name: worker.ask(Request(last, "direct", warm=1, bf16=True, want="profile")) for name, worker in crew.items()
    }
    return {"steps": steps, "flops": flops, "batches": batches, "profiles": profiles}


def fits(worker: Asked) -> Callable[[int], bool]:
    return lambda size: "error" not in worker.ask(Request(f"molecules {size}", "direct", bf16=True))


def largest(fit: Callable[[int], bool], first: int, limit: int) -> int:
    """The largest size that fits, to an eighth: doubling from `first`, then halving the gap; 0 if `first` does not."""
    if not fit(first):
        return 0
    low, high = first, 2 * first
    while high <= limit and fit(high):
        low, high = high, 2 * high
    if high > limit:
        return low
    while high - low > low // 8:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def utilisation(flops: float, seconds: float, device: str) -> float | None:
    """Share of the device's dense bf16 peak; None where the device is not in the list."""
    peak = next((rate for name, rate in PEAKS.items() if name in device), None)
    return flops / seconds / peak if peak else None


def planned(steps: Mapping[str, Mapping[str, tables.Costs]], num_parameters: int) -> dict[str, Cost]:
    """What `training/plan.py` foresees for the activations of the last case in fp32, beside what was measured."""
    costs = list(steps.values())[-1]["fp32"]
    found = {}
    for name in MOIETY_SHAPES.keys() & costs.keys():
        if "error" not in (cost := costs[name]):
            shape = build(name, num_parameters).trunk.config
            found[name] = {
                "planned": activation_bytes(shape, cost["nodes"], cost["edges"], gathers=True),
                "measured": cost["rise"],
            }
    return found


def sheets(results: Mapping[str, Any]) -> list[tables.Sheet]:
    columns = {f"{label}, {mode}": (label, mode) for label, modes in results["steps"].items() for mode in modes}
    groups = {column: results["steps"][label][mode] for column, (label, mode) in columns.items()}
    device = results["device"]

    def milliseconds(costs: tables.Costs, model: str) -> str | None:
        cost = costs.get(model, {})
        return f"{1000 * cost['seconds']:.2f}" if "seconds" in cost else None

    def gibibytes(costs: tables.Costs, model: str) -> str | None:
        return f"{costs[model]['peak'] / 2**30:.2f}" if "peak" in costs.get(model, {}) else None

    used: dict[str, tables.Costs] = {}
    for column, (label, mode) in columns.items():
        if "bf16" in mode:
            used[column] = {
                name: {"share": utilisation(results["flops"][label][name]["flops"], cost["seconds"], device)}
                for name, cost in groups[column].items()
                if "seconds" in cost and "flops" in results["flops"][label].get(name, {})
            }
    found = [
        tables.sheet(f"Direct step, ms, {device}", groups, milliseconds),
        tables.sheet("Peak memory of that step, GiB", groups, gibibytes),
        tables.sheet("Share of the device's bf16 peak (matrix products counted)", used, _percent),
    ]
    for name, why in results["broken"].items():
        found[0].notes.append(f"{name} could not be built: {why}")
    batches = [[name, f"{size:,}" if size else f"below {FIRST_BATCH}"] for name, size in results["batches"].items()]
    found.append(tables.Sheet("Largest batch, bf16", ["model", "molecules"], batches))
    rows = [
        [name, f"{cost['planned'] / 2**30:.2f}", f"{cost['measured'] / 2**30:.2f}"]
        for name, cost in results.get("planned", {}).items()
    ]
    found.append(tables.Sheet("Activations, fp32, GiB", ["model", "planned", "measured"], rows))
    for name, answer in results["profiles"].items():
        rows = [[row["name"], str(row["calls"]), f"{row['share']:.1%}"] for row in answer.get("profile", [])]
        found.append(tables.Sheet(f"Where {name}'s time goes, bf16", ["operation", "calls", "share"], rows))
    return found


def _percent(costs: tables.Costs, model: str) -> str | None:
    share = costs.get(model, {}).get("share")
    return f"{share:.1%}" if share is not None else None
