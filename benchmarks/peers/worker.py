"""One model in a process of its own: reads requests as JSON lines, takes steps, answers with what they cost.

    PYTHONPATH=benchmarks python -m peers.worker NAME NUM_PARAMETERS cpu|cuda

The first line it writes introduces the model; each further one answers a request `{"case": ..., "task": ...}` (see
`Request`) with seconds and bytes, or with {"error": ...}. A request that fails leaves the worker alive.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from peers.models import Moiety, PeerModel, build, count_parameters
from peers.systems import Batch, batch_of, structures_of
from torch import Tensor

TASKS = ("energy", "direct", "conservative")
PACKAGES = (
    "torch", "ase", "vesin", "moiety", "transformers", "torchmd-net", "warp-lang", "torch-geometric", "mace-torch",
    "e3nn", "fairchem-core",
)  # fmt: skip
MOST_OF_MEMORY = 0.8  # share of what is free when the worker starts: beyond it a step fails, not the machine


@dataclass(frozen=True)
class Request:
    """One measured step.

    Attributes:
        case: see `structures_of`.
        task: "energy" (no gradients), "direct" (the vector, and the backward pass of a loss on it) or "conservative"
            (energy, forces as its derivative, and the backward pass of a loss on both).
        warm: steps that go before and are not measured.
        with_global: False takes the attention over whole structures out of Moiety, its width left as it is.
        bf16: matrix products in bfloat16.
        compile: through torch.compile; of the direct task only, since it cannot be differentiated twice.
        want: "cost", or "flops" or "profile" in its place.
    """

    case: str
    task: str
    warm: int = 0
    with_global: bool = True
    bf16: bool = False
    compile: bool = False
    want: str = "cost"


class Bench:
    """The model, and the structures of the last case."""

    def __init__(self, model: PeerModel, device: str):
        self.model, self.device = model.to(device), device
        self.compiled: Callable[[Batch], Tensor] | None = None  # torch.compile takes seconds to import
        self.case: tuple[str, Batch] | None = None

    def answer(self, request: Request) -> dict[str, Any]:
        if request.task not in TASKS:
            raise ValueError(f"task {request.task!r} is not one of {', '.join(TASKS)}")
        batch = self._batch(request.case)
        if isinstance(self.model, Moiety):
            self.model.use_global(request.with_global)
        self.model.train(request.task != "energy")
        size = {"nodes": len(batch.positions), "edges": batch.edge_index.shape[1]}
        for _ in range(request.warm):
            self._step(request, batch)
        if request.want == "flops":
            return size | {"flops": self._flops(request, batch)}
        if request.want == "profile":
            return size | {"profile": self._profile(request, batch)}
        measure = cost_on_gpu if self.device == "cuda" else cost_on_cpu
        return size | measure(lambda: self._step(request, batch))

    def forget(self) -> None:
        """Lets go of gradients and structures, after a step that failed too."""
        self.case = None
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, case: str) -> Batch:
        if self.case is None or self.case[0] != case:
            self.case = None  # the old one goes before the new one comes
            self.case = case, batch_of(structures_of(case)).to(self.device)
        return self.case[1]

    def _step(self, request: Request, batch: Batch) -> None:
        if request.compile and self.compiled is None:
            self.compiled = torch.compile(self.model.vector, dynamic=False)
        vector = self.compiled if request.compile and self.compiled else self.model.vector
        with torch.autocast(self.device, torch.bfloat16, enabled=request.bf16):
            loss = loss_of(self.model, batch, request.task, vector)
        if loss is not None:
            self.model.zero_grad(set_to_none=True)
            loss.backward()

    def _flops(self, request: Request, batch: Batch) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self._step(request, batch)
        return counter.get_total_flops()

    def _profile(self, request: Request, batch: Batch) -> list[dict[str, Any]]:
        """The operations that take most time: name, calls, share of all."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        with profile(activities=kinds) as profiler:
            self._step(request, batch)
            if self.device == "cuda":
                torch.cuda.synchronize()
        spent = f"self_{'device' if self.device == 'cuda' else 'cpu'}_time_total"
        rows = [(getattr(row, spent), row.key, row.count) for row in profiler.key_averages()]
        total = sum(row[0] for row in rows) or 1.0
        return [
            {"name": name, "calls": calls, "share": seconds / total}
            for seconds, name, calls in sorted(rows, reverse=True)[:15]
        ]


def loss_of(model: PeerModel, batch: Batch, task: str, vector: Callable[[Batch], Tensor]) -> Tensor | None:
    """What a training step on random targets differentiates; None where nothing is trained."""
    if task == "energy":
        with torch.no_grad():
            model.energy(batch, batch.positions, batch.edge_shift)
        return None
    target_N3 = torch.sin(torch.arange(3.0 * len(batch.positions), device=batch.positions.device)).view(-1, 3)
    if task == "direct":
        return (vector(batch) - target_N3).square().mean()
    positions = batch.positions.clone().requires_grad_()
    energy_B = model.energy(batch, positions, batch.edge_shift)
    (slope_N3,) = torch.autograd.grad(energy_B.sum(), positions, create_graph=True)
    return (slope_N3 + target_N3).square().mean() + energy_B.square().mean()


def cost_on_cpu(step: Callable[[], None]) -> dict[str, float]:
    """CPU seconds of this process, and the bytes it held at most, in all and beyond what it held before."""
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak": status("VmHWM"), "rise": status("VmHWM") - before}


def cost_on_gpu(step: Callable[[], None]) -> dict[str, float]:
    """Seconds between two events of the device, and the bytes it held at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"seconds": start.elapsed_time(end) / 1000, "peak": peak, "rise": peak - before}


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def limit_memory() -> None:
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    most = int(MOST_OF_MEMORY * 1024 * int(free.split()[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def serve(name: str, num_parameters: int, device: str, requests: TextIO, answers: TextIO) -> None:
    """Answers until there are no more requests."""

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        torch.manual_seed(0)
        bench = Bench(build(name, num_parameters), device)
    except Exception as error:  # a package that is missing or broken is told, not died of
        say({"error": told(error)})
        return
    introduction: dict[str, Any] = {"parameters": count_parameters(bench.model), "versions": versions()}
    say(introduction | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {}))
    for line in requests:
        try:
            say(bench.answer(Request(**json.loads(line))))
        except Exception as error:
            problem = told(error)
            del error  # holds the tensors of the step
            bench.forget()
            say({"error": problem})


def told(error: Exception) -> str:
    """One line of an error."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def main() -> int:
    warnings.filterwarnings("ignore")
    name, num_parameters, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages greet on stdout
    if device == "cpu":
        limit_memory()
        torch.set_num_threads(1)
    serve(name, int(num_parameters), device, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
