"""Training steps of Moiety, plain and with `training.compile`, in turns.

    python benchmarks/compiled.py [--model moiety-l1] [--device cpu|cuda] [--parameters 3000000]

The best step of each counts, in CPU seconds of one thread or in seconds of the device; what compiling took is told too.
Writes benchmarks/results/compiled.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import tables
from peers.crew import ROOT, machine
from peers.models import MOIETY_SHAPES, build
from peers.systems import batch_of, structures_of
from peers.worker import cost_on_cpu, cost_on_gpu
from rich.console import Console

from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction
from moiety.training.compiled import compile_model

TASKS = {"direct": "vector", "conservative": "energy"}  # kind of the head
CASES = ("molecules 8", "molecules 12", "molecules 32", "silicon")
ROUNDS = 6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MOIETY_SHAPES, default="moiety-l1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parameters", type=int, default=3_000_000)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/compiled.json")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    shape = build(args.model, args.parameters).trunk.config
    found = {task: measure(shape, task, args.cases, args.device) for task in TASKS}
    rows = [
        [task, case, f"{1000 * cost['plain']:.1f}", f"{1000 * cost['compiled']:.1f}", f"{cost['ratio']:.2f}"]
        for task, of in found.items()
        for case, cost in of["cases"].items()
    ]
    notes = [f"{task}: compiling took {of['compiling']:.0f} s" for task, of in found.items()]
    columns = ["step", "case", "plain, ms", "compiled, ms", "ratio"]
    tables.Sheet(f"Training steps of {args.model}, {args.device}", columns, rows, notes).show(Console())
    where = machine({}) | {"load": [load, os.getloadavg()[0]], "device": args.device, "torch": torch.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": where, "model": args.model, "steps": found}, indent=1) + "\n")
    return 0


def measure(shape: MoietyConfig, task: str, cases: list[str], device: str) -> dict[str, Any]:
    """Seconds of the best plain and compiled steps of every case, and of all first compiled steps together."""
    models = {}
    for name in ("plain", "compiled"):
        torch.manual_seed(0)
        config = MoietyConfig(**{**shape.to_diff_dict(), "tasks": {task: {"kind": TASKS[task]}}})
        models[name] = MoietyForPrediction(config).to(device).train()
    compile_model(models["compiled"])
    cost = cost_on_gpu if device == "cuda" else cost_on_cpu
    found: dict[str, Any] = {"compiling": 0.0, "cases": {}}
    for case in cases:
        batch = batch_of(structures_of(case)).to(device)
        inputs = vars(batch)
        began = time.perf_counter()
        train(models["compiled"], task, inputs)
        found["compiling"] += time.perf_counter() - began
        best = dict.fromkeys(models, float("inf"))
        for _ in range(ROUNDS):
            for name, model in models.items():
                seconds = cost(partial(train, model, task, inputs))["seconds"]
                best[name] = min(best[name], seconds)
        found["cases"][case] = best | {"ratio": best["compiled"] / best["plain"]}
        print(f"{task}, {case}: {found['cases'][case]['ratio']:.2f}", file=sys.stderr, flush=True)
    return found


def train(model: MoietyForPrediction, task: str, inputs: dict[str, Any]) -> None:
    """One step on random targets, but for the optimizer."""
    predictions = model(**inputs).predictions
    assert predictions
    target_N3 = torch.sin(torch.arange(3.0 * len(inputs["positions"]), device=inputs["positions"].device)).view(-1, 3)
    loss = (predictions["forces" if task == "conservative" else task] - target_N3).square().mean()
    if task == "conservative":
        loss = loss + predictions[task].square().mean()
    model.zero_grad(set_to_none=True)
    loss.backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
