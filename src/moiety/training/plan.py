"""What a configuration will cost, before anything starts: parameters, memory per rank, FLOPs, time.

Memory of the training state is exact for AdamW in fp32 with averaged weights (bf16 here means bf16 matrix products; the
weights stay fp32). Activations are worked out for the fullest of some micro-batches that are looked at; time is an
estimate. benchmarks/planned.py has both beside what runs take; on a GPU neither has been measured.
"""
# Shapes: N nodes, E edges, M = (lmax + 1)^2 components, C channels, D edge channels.

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.tokens.batch import collate, with_neighbors
from moiety.training.config import PretrainConfig
from moiety.training.flops import fastest, matrix_rate, training_flops
from moiety.training.mixture import Mixture, Source

STRATEGIES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # in launch/ds
WORLD_SIZES = (1, 8, 64)
LOOKED_AT = 16  # micro-batches of each source
PROGRAM = 585 * 2**20  # bytes of a CPU process with torch, DeepSpeed and transformers, before it trains (measured)
STEP = 1.4  # what a step takes at its peak, in activations that it keeps (measured)
WIDTH = 120  # of what is printed to a file
BUCKETS = 2 * 50_000_000  # numbers in the buffers through which gradients and weights travel, in the JSONs of launch/ds
LIVE = 1_000_000_000  # weights that ZeRO-3 keeps gathered at most, DeepSpeed's stage3_max_live_parameters
MATRIX, MEMORY = 1.2, 25  # a step's time in that of its matrix products and of a copy of its activations (measured)
AGAIN = 4 / 3  # of that where activations are computed again


class StateBytes(NamedTuple):
    """Weights, gradients, moments and averages of one rank: on its device, and moved out to its host."""

    device: float
    host: float


class Speed(NamedTuple):
    """Of one process: a large matrix product, and bytes read and written by a copy."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Plan:
    """The figures behind `--plan`; `print_plan` shows them."""

    parameters: int
    state_bytes: dict[tuple[str, int], StateBytes]  # by strategy and world size
    activation_bytes: float  # of one micro-batch at its budget
    structures_per_step: float | None  # None where there are no corpora to count them in
    nodes_per_step: float
    edges_per_step: float
    flops_per_step: float
    seconds_per_step: float  # on this one device
    seconds_per_epoch: list[float]  # of each corpus by itself
    steps: int

    def peak_bytes(self, strategy: str, world_size: int) -> float:
        """What one rank holds at most: of its GPU's memory, or the whole process, with its host part, on a CPU."""
        state = self.state_bytes[strategy, world_size]
        outside = 0.0 if torch.cuda.is_available() else PROGRAM + state.host
        numbers = 0.0
        if strategy != "zero0":
            numbers += min(2 * self.parameters, BUCKETS)
        if strategy.startswith("zero3"):  # and more copies of its share (measured)
            numbers += min(self.parameters, LIVE) + 3 * self.parameters / world_size
        return outside + state.device + 4 * numbers + STEP * self.activation_bytes


def make_plan(
    config: PretrainConfig,
    mixture: Mixture | None,
    speed: Speed | None = None,
    world_sizes: Sequence[int] = WORLD_SIZES,
) -> Plan:
    """Works a configuration out on the meta device.

    Args:
        config: the run.
        mixture: its opened corpora; None where they are not built, then micro-batches count as full.
        speed: of this process; measured when not given.
        world_sizes: numbers of ranks.
    """
    shape = config.model_config()
    with torch.device("meta"):
        model = MoietyForPreTraining(shape)
    nodes, edges = _per_micro_batch(config, mixture)
    fullest = _fullest(config, mixture, shape.cutoff)
    parameters = sum(p.numel() for p in model.parameters())
    speed = speed or measure_speed(config.training.precision)
    again, gathers = config.training.checkpoint_activations, torch.cuda.is_available()

    def seconds(nodes: float, edges: float) -> float:
        kept = activation_bytes(shape, nodes, edges, gathers)
        once = MATRIX * training_flops(model, nodes, edges) / speed.flops_per_s + MEMORY * kept / speed.bytes_per_s
        return once * AGAIN if again else once

    return Plan(
        parameters=parameters,
        state_bytes={
            (strategy, world): state_bytes(parameters, strategy, world, config.optimizer.ema > 0)
            for strategy in STRATEGIES
            for world in world_sizes
        },
        activation_bytes=activation_bytes(shape, *fullest, gathers, again),
        structures_per_step=config.data.micro_batches * _structures(mixture) if mixture is not None else None,
        nodes_per_step=nodes * config.data.micro_batches,
        edges_per_step=edges * config.data.micro_batches,
        flops_per_step=config.data.micro_batches * training_flops(model, nodes, edges),
        seconds_per_step=config.data.micro_batches * seconds(nodes, edges),
        seconds_per_epoch=[seconds(*_totals(source)) for source in mixture.sources] if mixture is not None else [],
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


def state_bytes(parameters: int, strategy: str, world_size: int, ema: bool) -> StateBytes:
    """Bytes of weights, gradients, AdamW moments and averages on one rank.

    ZeRO-1 shards the moments, the averages and an fp32 master copy; ZeRO-2 the gradients too; ZeRO-3 everything.
    What is sharded can lie in the memory of the host.
    """
    stage, offload = int(strategy[4]), strategy.endswith("_offload")
    weights = gradients = average = 4.0 * parameters
    moments = 8.0 * parameters
    master = weights if stage in (1, 2) else 0.0
    sharded = moments + (average if ema else 0.0) + master
    whole = weights + gradients
    if stage >= 2:
        sharded, whole = sharded + gradients, whole - gradients
    if stage == 3:
        sharded, whole = sharded + weights, whole - weights
    if stage > 0:
        sharded /= world_size
    return StateBytes(whole, sharded) if offload else StateBytes(whole + sharded, 0.0)


def activation_bytes(config: MoietyConfig, nodes: float, edges: float, gathers: bool, again: bool = False) -> float:
    """fp32 tensors that one micro-batch keeps for its backward pass; the coefficients are fitted to counts of them.

    Args:
        config: shape of the trunk.
        nodes: of the micro-batch.
        edges: places in its table of neighbours: as many as edges where all nodes have the same number of them.
        gathers: whether the neighbours' features are gathered (GPU, compiled) or multiplied sparsely (CPU).
        again: whether each block keeps what enters it only, and computes its inside again (activation checkpointing).
    """
    steerable = nodes * (config.lmax + 1) ** 2 * config.hidden_size
    of_edge = 3.1 + (config.lmax + 1) ** 2 * gathers
    per_block = 9.5 * steerable + 15 * nodes * config.hidden_size + of_edge * edges * config.edge_channels
    num_global = config.num_layers // config.global_every if config.global_every else 0
    if again:
        return 4.0 * (config.num_layers * steerable + 2 * per_block + (2.8 * steerable if num_global else 0.0))
    return 4.0 * (config.num_layers * per_block + num_global * 2.8 * steerable)


def measure_speed(precision: str) -> Speed:
    """Of this process, on its GPU where there is one, with matrix products in a `training.precision`.

    On a CPU with one thread: a second one makes matrix products faster, and steps hardly.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Speed(matrix_rate(precision), _copy_rate())
    finally:
        torch.set_num_threads(threads)


def _copy_rate() -> float:
    """Bytes/s read and written."""
    on_gpu = torch.cuda.is_available()
    a = torch.ones((256 if on_gpu else 32) * 2**20, device="cuda" if on_gpu else "cpu")
    b = torch.empty_like(a)
    return 2 * a.element_size() * a.numel() / fastest(lambda: b.copy_(a))


def print_plan(config: PretrainConfig) -> None:
    """Prints the plan on stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        mixture = Mixture.open(config.data)
    except InputError as error:
        mixture = None
        console.print(f"[yellow]no corpora yet, counting full micro-batches:[/yellow] {error}", soft_wrap=True)
    plan = make_plan(config, mixture)
    console.print(f"parameters        {plan.parameters:,}")
    structures = "" if plan.structures_per_step is None else f"{plan.structures_per_step:,.0f} structures, "
    console.print(f"one step          {structures}{plan.nodes_per_step:,.0f} nodes, {plan.edges_per_step:,.0f} edges")
    console.print(f"FLOPs per step    {plan.flops_per_step:.2e}")
    console.print(f"activations       {_size(plan.activation_bytes)} of the fullest micro-batch")
    console.print(f"speed, one device {_throughput(plan)}")
    console.print(f"time, one device  {_duration(plan.steps * plan.seconds_per_step)} for {plan.steps:,} steps")
    console.print(_memory_table(plan))
    if mixture is not None:
        _print_sources(console, config, mixture, plan)


def _throughput(plan: Plan) -> str:
    structures = (
        f"{plan.structures_per_step / plan.seconds_per_step:,.0f} structures/s, " if plan.structures_per_step else ""
    )
    return f"{structures}{plan.nodes_per_step / plan.seconds_per_step:,.0f} nodes/s"


def _memory_table(plan: Plan) -> Table:
    title = "one rank: training state (+ moved to the host), peak with a step"
    table = Table("ds", *(f"{world} ranks" for world in WORLD_SIZES), title=title)
    for strategy in STRATEGIES:
        cells = []
        for world in WORLD_SIZES:
            state = plan.state_bytes[strategy, world]
            host = f" + {_size(state.host)}" if state.host else ""
            cells.append(f"{_size(state.device)}{host}, {_size(plan.peak_bytes(strategy, world))}")
        table.add_row(strategy, *cells)
    return table


def _print_sources(console: Console, config: PretrainConfig, mixture: Mixture, plan: Plan) -> None:
    columns = ("structures", "micro-batches", "steps an epoch", "an epoch alone", "epochs")
    table = Table("corpus", "domain", *columns, "of work", "of structures", "unused", title="data")
    shares = zip(mixture.sources, mixture.shares, mixture.structure_shares, plan.seconds_per_epoch, strict=True)
    for source, share, drawn, seconds in shares:
        steps = source.num_batches / (share * config.data.micro_batches)
        row = (len(source.corpus), source.num_batches, round(steps))
        epochs = f"{config.training.steps / steps:.1f}"
        percent = (f"{value:.1%}" for value in (share, drawn, 1 - source.budget_used))
        alone = _duration(seconds)  # on one device
        table.add_row(source.name, source.corpus.domain, *(f"{n:,}" for n in row), alone, epochs, *percent)
    console.print(table)


def _per_micro_batch(config: PretrainConfig, mixture: Mixture | None) -> tuple[float, float]:
    """Mean nodes and edges of a micro-batch, over sources by weight."""
    if mixture is None:
        return float(config.data.node_budget), float(config.data.edge_budget)
    nodes = edges = 0.0
    for source, share in zip(mixture.sources, mixture.shares, strict=True):
        of_nodes, of_edges = _totals(source)
        nodes += float(share) / source.num_batches * of_nodes
        edges += float(share) / source.num_batches * of_edges
    return nodes, edges


def _structures(mixture: Mixture) -> float:
    """Mean number in a micro-batch, over sources by weight."""
    shares = zip(mixture.sources, mixture.shares, strict=True)
    return sum(float(share) / source.num_batches * len(source.corpus) for source, share in shares)


def _totals(source: Source) -> tuple[float, float]:
    """Nodes and edges of a corpus."""
    return float(source.corpus.num_nodes.sum()), float(source.corpus.num_edges.sum())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
