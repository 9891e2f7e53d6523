"""Where a parameter's fp32 weight and AdamW moments lie on this rank, for every ZeRO stage.

DeepSpeed flattens parameters into long tensors and deals those to the ranks, differently at each stage. Named pieces of
parameters are what all stages have in common: a checkpoint made of them loads at any stage on any number of ranks, and
writing it needs no communication.
"""
# Shapes: all tensors here are flat.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """A piece of a flattened parameter."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter, and the place in a tensor of the optimizer where its fp32 values are."""

    span: Span
    master: int  # index in master_weights(engine)
    offset: int


def master_weights(engine: Any) -> list[Tensor]:
    """The fp32 tensors that the optimizer updates on this rank: whole parameters, or this rank's flat partitions."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if partitions is not None:
        return list(partitions)
    return [weight for group in engine.optimizer.param_groups for weight in group["params"]]


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of everything that is trained, also where ZeRO-3 has taken the weights away."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named}


def local_fragments(engine: Any) -> list[Fragment]:
    """What this rank's optimizer holds, in the order of the model's parameters."""
    place = {id(weight): index for index, weight in enumerate(master_weights(engine))}
    fragments = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):  # ZeRO-3: every rank has an equal part, the last ones padded
            group, offset, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
            start = length * distributed.get_rank()
            length = min(length, parameter.ds_numel - start)
            if length > 0:
                fragments.append(Fragment(Span(name, start, length), group, offset))
        elif not hasattr(parameter, "_hp_mapping"):  # no ZeRO: the parameter itself
            fragments.append(Fragment(Span(name, 0, parameter.numel()), place[id(parameter)], 0))
        elif (mapping := parameter._hp_mapping) is not None:  # ZeRO-1 and 2; None: another rank has all of it
            of_parameter, of_partition = mapping.lp_fragment_address, mapping.hp_fragment_address
            span = Span(name, of_parameter.start, of_parameter.numel)
            fragments.append(Fragment(span, mapping.param_group_index, of_partition.start))
    return fragments


def own_share(engine: Any, fragments: Sequence[Fragment]) -> list[Fragment]:
    """Of fragments that every rank holds (no ZeRO), the part that this rank writes; all of them under ZeRO."""
    if engine.zero_optimization_stage() > 0:
        return list(fragments)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    total = sum(fragment.span.length for fragment in fragments)
    first, last = total * rank // world, total * (rank + 1) // world
    share, before = [], 0
    for fragment in fragments:
        span = fragment.span
        low, high = max(first - before, 0), min(last - before, span.length)
        if low < high:
            piece = Span(span.name, span.start + low, high - low)
            share.append(Fragment(piece, fragment.master, fragment.offset + low))
        before += span.length
    return share


def optimizer_state(engine: Any) -> list[dict[str, Tensor]]:
    """AdamW's state of each master weight, made where the optimizer has not taken a step yet."""
    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    states = []
    for master in master_weights(engine):
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state |= {moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS}
        states.append(state)
    return states


def publish_masters(engine: Any) -> None:
    """Brings fp32 masters that were written to into the weights that the forward pass uses, on all ranks."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        zero = engine.optimizer
        for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            weights.data.copy_(master.data)
        for number, flat in enumerate(zero.fp16_partitioned_groups_flat):
            parts = zero.unflatten(flat, zero.fp16_partitioned_groups[number])
            for part, values in zip(zero.fp16_partitioned_groups[number], parts, strict=True):
                part.data = values.data
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
