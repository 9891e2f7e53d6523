"""The subject's training without the engine: what the engine must agree with, and what it is measured against.

python plain.py --config CONFIG --out OUT --loop ddp|deepspeed [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.tokens.batch import Batch
from moiety.training.config import OptimizerConfig, PretrainConfig, load_config
from moiety.training.engine import adamw, apply_step, set_lr, start_distributed, start_engine
from moiety.training.flops import Work
from moiety.training.loop import count_scored, learning_rate, start_state, step_loss
from moiety.training.mixture import Mixture
from moiety.training.stream import Prepared, own_seed
from moiety.training.window import StepSums, Window


class Ddp:
    """torch's DistributedDataParallel and AdamW, with the verbs of an engine."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig) -> None:
        self.module = model
        self.device = torch.device("cpu")
        self.optimizer = adamw(model, optimizer)
        self._wrapped = DistributedDataParallel(model)
        self._clip = optimizer.grad_clip

    def __call__(self, **inputs: Tensor) -> Any:
        return self._wrapped(**inputs)

    def until_last(self, last: bool) -> Any:
        """Gradients travel with the last micro-batch of a step."""
        return nullcontext() if last else self._wrapped.no_sync()

    def step(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)


def ddp_step(engine: Ddp, batches: Mapping[int, Batch], losses: Any) -> float:
    for place, (number, batch) in enumerate(batches.items()):
        with engine.until_last(place + 1 == len(batches)):
            losses(number, engine(**batch.inputs()), batch).backward()
    return engine.step()


def deepspeed_step(engine: Any, batches: Mapping[int, Batch], losses: Any, grad_clip: float) -> float:
    norm = 0.0
    for number, batch in batches.items():
        engine.backward(losses(number, engine(**batch.inputs()), batch), scale_wrt_gas=False)
        _, norm = apply_step(engine, grad_clip)
    return norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--loop", choices=("ddp", "deepspeed"), required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    config = load_config(PretrainConfig, args.config, args.overrides)
    mixture, objectives = Mixture.open(config.data), build_objectives(config.objectives)
    rank, world = start_distributed()
    torch.manual_seed(config.training.seed)
    model = MoietyForPreTraining(config.model_config())
    per_step = config.data.micro_batches
    engine: Any = (
        Ddp(model, config.optimizer)
        if args.loop == "ddp"
        else start_engine(model, config.optimizer, config.training, per_step)
    )
    state = start_state()
    work = Work.of(model, config.training.precision, world)
    window = Window(objectives, work, lambda phase: None)
    prepared = Prepared(mixture, objectives, model.config.cutoff, config.training.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for step in range(config.training.steps):
        first = step * per_step
        mine = range(first + rank, first + per_step, world)
        with window.timed("data"):
            batches = {number: prepared[number] for number in mine}
        lr = learning_rate(step, config.training.steps, config.optimizer)
        set_lr(engine, lr)
        sums = StepSums(len(objectives), first, per_step, engine.device)
        scored_O = count_scored(objectives, list(batches.values()))

        def losses(number: int, output: Any, batch: Batch, scored_O: Tensor = scored_O, sums: StepSums = sums) -> Any:
            torch.manual_seed(own_seed(config.training.seed, number))
            return step_loss(objectives, output, batch, scored_O, sums) * world

        if args.loop == "ddp":
            norm = ddp_step(engine, batches, losses)
        else:
            norm = deepspeed_step(engine, batches, losses, config.optimizer.grad_clip)
        state["step"], state["elapsed_s"] = step + 1, time.perf_counter() - started
        state["samples"] = mixture.digest(state["samples"], first, first + per_step)
        if (step + 1) % config.training.log_every == 0:
            distributed.all_reduce(sums.flat)
            window.add(sums, norm)
            if rank == 0:
                with (args.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(window.record(state, lr, 0)) + "\n")
            window = Window(objectives, work, lambda phase: None)


if __name__ == "__main__":
    main()
