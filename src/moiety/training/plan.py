"""What a configuration will cost, before anything starts: parameters, memory per rank, FLOPs, time.

Memory of the training state is exact for AdamW in fp32 with averaged weights (bf16 here means bf16 matrix products; the
weights stay fp32). Activations are worked out for the fullest of some micro-batches that are looked at; time is an
estimate, good to a factor of about 1.5.
"""
# Shapes: N nodes, E edges, M = (lmax + 1)^2 components, C channels, D edge channels.

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moiety.errors import InputError
from moiety.models.blocks_moiety import DegreeLinear, LocalAttention
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.tokens.batch import collate, with_neighbors
from moiety.training.config import PretrainConfig
from moiety.training.mixture import Mixture

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 8, 64)
LOOKED_AT = 16  # micro-batches of each source
PROGRAM = 585 * 2**20  # bytes of a CPU process with torch, DeepSpeed and transformers, before it trains (measured)
STEP = 1.4  # what a step takes at its peak, in activations that it keeps (measured, see benchmarks/planned_memory.py)
SUSTAINED = 0.6  # share of the machine's matrix-product rate that a step reaches (measured on a CPU core)


@dataclass(frozen=True)
class Plan:
    """The figures behind `--plan`; `print_plan` shows them."""

    parameters: int
    state_bytes: dict[tuple[int, int], float]  # (ZeRO stage, world size) -> training state of one rank
    activation_bytes: float  # of one micro-batch at its budget
    nodes_per_step: float
    edges_per_step: float
    flops_per_step: float
    flops_per_s: float  # sustained, of this process's device
    steps: int

    def peak_bytes(self, stage: int, world_size: int) -> float:
        """What one rank holds at most, the whole process; on a GPU, where this has not been measured, of its memory."""
        program = 0 if torch.cuda.is_available() else PROGRAM
        return program + self.state_bytes[stage, world_size] + STEP * self.activation_bytes

    @property
    def seconds(self) -> float:
        """For all steps on this one device."""
        return self.steps * self.flops_per_step / self.flops_per_s


def make_plan(config: PretrainConfig, mixture: Mixture | None, flops_per_s: float | None = None) -> Plan:
    """Works a configuration out on the meta device.

    Args:
        config: the run.
        mixture: its opened corpora; None where they are not built, then micro-batches count as full.
        flops_per_s: sustained rate; measured on this machine when not given.
    """
    shape = config.model_config()
    with torch.device("meta"):
        model = MoietyForPreTraining(shape)
    nodes, edges = _per_micro_batch(config, mixture)
    fullest = _fullest(config, mixture, shape.cutoff)
    parameters = sum(p.numel() for p in model.parameters())
    return Plan(
        parameters=parameters,
        state_bytes={
            (stage, world): state_bytes(parameters, stage, world, config.optimizer.ema > 0)
            for stage in STAGES
            for world in WORLD_SIZES
        },
        activation_bytes=activation_bytes(shape, *fullest, gathers=torch.cuda.is_available()),
        nodes_per_step=nodes * config.data.micro_batches,
        edges_per_step=edges * config.data.micro_batches,
        flops_per_step=config.data.micro_batches * training_flops(model, nodes, edges),
        flops_per_s=flops_per_s or SUSTAINED * measure_flops_per_s(),
        steps=config.training.steps,
    )


def _fullest(config: PretrainConfig, mixture: Mixture | None, cutoff: float) -> tuple[int, int]:
    """Nodes of a micro-batch at its budget, and places in the largest table of neighbours: equally many for each node.

    Crystals and proteins have nodes of few and of many neighbours, so that there are several times as many places as
    edges; without corpora to look at, as many.
    """
    places = config.data.edge_budget
    for source in mixture.sources if mixture is not None else ():
        for position in range(min(LOOKED_AT, source.num_batches)):
            batch = with_neighbors(collate(source.corpus.read(source.batch(position)[1])), cutoff)
            assert batch.edge_index is not None
            neighbors_N = torch.bincount(batch.edge_index[1], minlength=len(batch.node_type))
            places = max(places, len(batch.node_type) * int(neighbors_N.max()))
    return config.data.node_budget, places


def state_bytes(parameters: int, stage: int, world_size: int, ema: bool) -> float:
    """Bytes of weights, gradients, AdamW moments and averages on one rank.

    ZeRO-1 shards the moments, the averages and an fp32 master copy; ZeRO-2 the gradients too; ZeRO-3 everything.
    """
    weights = gradients = average = 4.0 * parameters
    moments = 8.0 * parameters
    master = weights if stage in (1, 2) else 0.0
    sharded = moments + (average if ema else 0.0) + master
    whole = weights + gradients
    if stage >= 2:
        sharded, whole = sharded + gradients, whole - gradients
    if stage == 3:
        sharded, whole = sharded + weights, whole - weights
    return sharded + whole if stage == 0 else sharded / world_size + whole


def activation_bytes(config: MoietyConfig, nodes: int, edges: int, gathers: bool) -> float:
    """fp32 tensors that one micro-batch keeps for its backward pass; the coefficients are fitted to counts of them.

    Args:
        config: shape of the trunk.
        nodes: of the micro-batch.
        edges: places in its table of neighbours: as many as edges where all nodes have the same number of them.
        gathers: whether the neighbours' features are gathered (GPU, compiled) or multiplied sparsely (CPU).
    """
    steerable = nodes * (config.lmax + 1) ** 2 * config.hidden_size
    of_edge = 3.1 + (config.lmax + 1) ** 2 * gathers
    per_block = 9.5 * steerable + 15 * nodes * config.hidden_size + of_edge * edges * config.edge_channels
    num_global = config.num_layers // config.global_every if config.global_every else 0
    return 4.0 * (config.num_layers * per_block + num_global * 2.8 * steerable)


def training_flops(model: nn.Module, nodes: float, edges: float) -> float:
    """Forward and backward of one micro-batch: three times the forward's matrix products.

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
            seen.add(module.filter)
            per_channel = 2 * edges * (module.lmax + 1) ** 2
            flops += per_channel * (module.filter.out_features + 2 * module.width)  # angles; built and moved
    others = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in seen]
    return 3 * (flops + sum(_linear_flops(linear, nodes) for linear in others))


def measure_flops_per_s() -> float:
    """fp32 matrix-product rate of this process (device 0 where there is a GPU), FLOP/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 768
    a = torch.randn(size, size, device=device)
    float((a @ a)[0, 0])  # the first one starts the libraries
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the result
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def print_plan(config: PretrainConfig) -> None:
    """Prints the plan on stdout."""
    console = Console(highlight=False)
    try:
        mixture = Mixture.open(config.data)
    except InputError as error:
        mixture = None
        console.print(f"[yellow]no corpora yet, counting full micro-batches:[/yellow] {error}", soft_wrap=True)
    plan = make_plan(config, mixture)
    console.print(f"parameters        {plan.parameters:,}")
    console.print(f"one step          {plan.nodes_per_step:,.0f} nodes, {plan.edges_per_step:,.0f} edges")
    console.print(f"FLOPs per step    {plan.flops_per_step:.2e}")
    console.print(f"activations       {_size(plan.activation_bytes)} of the fullest micro-batch")
    rate = f"{plan.flops_per_s / 1e9:,.0f} GFLOP/s sustained"
    console.print(f"time, one device  {_duration(plan.seconds)} for {plan.steps:,} steps at {rate}")
    table = Table(
        "ZeRO", *(f"{world} ranks" for world in WORLD_SIZES), title="one rank: training state, peak with a step"
    )
    for stage in STAGES:
        cells = ((plan.state_bytes[stage, world], plan.peak_bytes(stage, world)) for world in WORLD_SIZES)
        table.add_row(str(stage), *(f"{_size(state)}, {_size(peak)}" for state, peak in cells))
    console.print(table)
    if mixture is not None:
        _print_sources(console, config, mixture)


def _print_sources(console: Console, config: PretrainConfig, mixture: Mixture) -> None:
    columns = ("structures", "nodes", "micro-batches", "steps an epoch", "epochs", "of work", "of structures", "unused")
    table = Table("corpus", "domain", *columns, title="data")
    shares = zip(mixture.sources, mixture.shares, mixture.structure_shares, strict=True)
    for source, share, drawn in shares:
        steps = source.num_batches / (share * config.data.micro_batches)
        row = (len(source.corpus), int(source.corpus.num_nodes.sum()), source.num_batches, round(steps))
        percent = (f"{value:.1%}" for value in (share, drawn, 1 - source.budget_used))
        epochs = f"{config.training.steps / steps:.1f}"
        table.add_row(source.name, source.corpus.domain, *(f"{n:,}" for n in row), epochs, *percent)
    console.print(table)


def _per_micro_batch(config: PretrainConfig, mixture: Mixture | None) -> tuple[float, float]:
    """Mean nodes and edges of a micro-batch, over sources by weight."""
    if mixture is None:
        return float(config.data.node_budget), float(config.data.edge_budget)
    nodes = edges = 0.0
    for source, share in zip(mixture.sources, mixture.shares, strict=True):
        nodes += float(share) / source.num_batches * int(source.corpus.num_nodes.sum())
        edges += float(share) / source.num_batches * int(source.corpus.num_edges.sum())
    return nodes, edges


def _linear_flops(linear: nn.Module, rows: float) -> float:
    return 2 * rows * linear.in_features * linear.out_features  # type: ignore[operator]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
