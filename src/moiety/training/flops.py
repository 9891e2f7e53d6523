"""How much work a step is, in floating-point operations, and how much of a device's rate it comes to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moiety.models.blocks_moiety import DegreeLinear, LocalAttention


@dataclass(frozen=True)
class Work:
    """What training costs, and the rate at which the devices of a run could do it."""

    per_node: float  # FLOPs
    per_edge: float
    matrix_rate: float  # FLOP/s of large matrix products, on all devices together

    @classmethod
    def of(cls, model: nn.Module, precision: str, world_size: int) -> Work:
        """Of a model, with this process's device measured and the others taken to be like it."""
        per_node, per_edge = training_flops(model, 1, 0), training_flops(model, 0, 1)
        return cls(per_node, per_edge, world_size * matrix_rate(precision))

    def utilization(self, nodes: float, edges: float, seconds: float) -> float:
        """MFU: operations that the model needs (none twice, as activations that are computed again), over the rate."""
        return (self.per_node * nodes + self.per_edge * edges) / seconds / self.matrix_rate


def training_flops(model: nn.Module, nodes: float, edges: float) -> float:
    """Forward and backward of one micro-batch: three times the forward's matrix products.

    Six times with exact forces: the energy's derivative costs one more forward, and both are gone back through.

    A Linear costs 2 * rows * in * out, with 2l + 1 rows a node at degree l, one row an edge for the maps of radial
    features, one row a node elsewhere. Aggregation over edges adds three products of M * D per edge and block.
    """
    flops = 0.0
    seen: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, DegreeLinear):
            for degree, linear in enumerate(module.degrees):
                flops += _linear_flops(linear, nodes * (2 * degree + 1))
                seen.add(linear)
        elif isinstance(module, LocalAttention):
            flops += _linear_flops(module.filter, edges)
            seen |= {module.filter, module.frames}  # frames are not counted: some edges have them
            per_channel = 2 * edges * (module.lmax + 1) ** 2
            flops += per_channel * (module.filter.out_features + 2 * module.width)  # angles; built and moved
    others = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in seen]
    passes = 6 if getattr(model, "derives", False) else 3
    return passes * (flops + sum(_linear_flops(linear, nodes) for linear in others))


def matrix_rate(precision: str) -> float:
    """FLOP/s of a large matrix product."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rng = torch.Generator().manual_seed(0)  # the run's own random numbers stay what they are
    a = torch.randn(size, size, generator=rng).to("cuda" if on_gpu else "cpu", dtype)
    return 2 * size**3 / fastest(lambda: a @ a)


def fastest(work: Callable[[], Tensor], times: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that starts the libraries."""
    float(work().view(-1)[0])
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        float(work().view(-1)[0])  # waits for the result
        best = min(best, time.perf_counter() - start)
    return best


def _linear_flops(linear: nn.Module, rows: float) -> float:
    return 2 * rows * linear.in_features * linear.out_features  # type: ignore[operator]
