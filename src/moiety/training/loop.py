"""The training loop: one function that reads top to bottom, for pretraining, fine-tuning and the bridge.

Three rules keep one process and many on the same path. Losses are normalised by counts over the whole optimizer step,
not by each rank's own. Randomness belongs to the micro-batch, not to the process. The autograd graph is the same on
every rank: every head runs on every structure, and a loss that does not apply enters with weight 0.
"""
# Shapes: B structures, O objectives.

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moiety.objectives import Objective
from moiety.tokens.batch import Batch
from moiety.training.compiled import compile_model
from moiety.training.config import OptimizerConfig, TrainingConfig
from moiety.training.engine import WeightAverage, apply_step, refuse_disagreement, set_lr, start_engine
from moiety.training.flops import Work
from moiety.training.mixture import Mixture
from moiety.training.run import Run
from moiety.training.signals import StopSignals
from moiety.training.spikes import SpikeDetector
from moiety.training.stream import MakeBatch, Prepared, Stream, own_seed
from moiety.training.validation import Validation
from moiety.training.watchdog import Watchdog
from moiety.training.window import StepSums, Window

MAX_SKIPPED_IN_A_ROW = 20


def fit(
    run: Run,
    model: nn.Module,
    mixture: Mixture,
    objectives: Sequence[Objective],
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    validation: Validation | None = None,
    make: MakeBatch | None = None,
) -> None:
    """Trains up to `training.steps` optimizer steps, from the newest checkpoint of the run if there is one.

    Afterwards the newest checkpoint holds the result, see `Run.weights`; with `validation`, which scores every
    checkpoint and may end the run before, its best weights are there too. `make` makes batches of structures, where
    they are more than structures with labels (moiety.bridge).

    Raises:
        InputError: the run directory belongs to other data or to another model.
        FloatingPointError: the loss or the gradient was not finite 20 steps in a row.
        SaveFailed: the last checkpoint could not be written.
        SystemExit: with 75 after SIGTERM or SIGUSR1, with 130 after Ctrl-C; a checkpoint was written first.
    """
    per_step = mixture.config.micro_batches
    work = Work.of(model, training.precision, run.world_size)
    engine = begin(run, model, mixture, optimizer, training)
    average = WeightAverage(engine, optimizer.ema)
    prepared = Prepared(mixture, objectives, engine.module.config.cutoff, training.seed, make)
    watch = Watchdog(run.path, run.rank, run.world_size, training.hang_timeout_s)
    with StopSignals() as stop, watch as watchdog, Stream(prepared, training.workers) as stream:
        state: dict[str, Any] = run.resume(engine, average, mixture.facts) or start_state()
        state["mixture"] = mixture.facts
        if validation is not None:
            validation.resume(state["step"])
        window = Window(objectives, work, watchdog.beat, state["window"])
        started = time.perf_counter() - state["elapsed_s"]
        engine.train()
        stream.start(range(state["step"] * per_step + run.rank, training.steps * per_step, run.world_size))

        for step in range(state["step"], training.steps):
            if validation is not None and validation.over:
                run.progress.note(f"validation has not been better since step {validation.best_step}: the run ends")
                break
            first = step * per_step
            mine = range(first + run.rank, first + per_step, run.world_size)
            with window.timed("data"):
                batches = {number: next(stream).to(engine.device) for number in mine}
            lr = learning_rate(step, training.steps, optimizer)
            set_lr(engine, lr)
            sums = StepSums(len(objectives), first, per_step, engine.device)
            applied, grad_norm = update_weights(engine, batches, objectives, optimizer, training.seed, sums, window)
            with window.timed("step"):
                sums.stop += stop.asked
                distributed.all_reduce(sums.flat)
                if applied:
                    average.update(step)
                    window.add(sums, grad_norm)

            state["step"] = step + 1
            state["samples"] = mixture.digest(state["samples"], first, first + per_step)
            state["elapsed_s"] = time.perf_counter() - started
            count_skipped(run, state, applied, mixture, sums)
            count_spikes(run, state, applied, mixture, sums, window.loss_of(sums))
            last, stopping = step + 1 == training.steps, bool(sums.stop > 0)
            if last or (step + 1) % training.log_every == 0:
                run.log(window.record(state, lr, run.failed_saves), training.steps)
                window = Window(objectives, work, watchdog.beat)
            if last or stopping or (step + 1) % training.checkpoint_every == 0:
                with window.timed("save"):
                    run.save(engine, average, state | {"window": window.state()}, training.keep_checkpoints)
                if validation is not None and not stopping:
                    validation(step + 1)
            if stopping and not last:
                run.stop(stop.exit_code)
        run.finish()


def begin(run: Run, model: nn.Module, mixture: Mixture, optimizer: OptimizerConfig, training: TrainingConfig) -> Any:
    """Tells what runs, and makes the DeepSpeed engine for it."""
    run.describe({"parameters": sum(p.numel() for p in model.parameters()), "corpora": mixture.describe()})
    for problem in mixture.damaged.values():
        run.progress.note(f"left out: {problem}")
    if training.checkpoint_activations:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    if training.compile:
        run.progress.note("compiling: the first step takes minutes")
        compile_model(model)
    run.engine = start_engine(model, optimizer, training, mixture.config.micro_batches)
    refuse_disagreement("corpora", mixture.facts, run.engine.device)
    return run.engine


def update_weights(
    engine: Any,
    batches: Mapping[int, Batch],
    objectives: Sequence[Objective],
    optimizer: OptimizerConfig,
    seed: int,
    sums: StepSums,
    window: Window,
) -> tuple[bool, float]:
    """One optimizer step from this rank's micro-batches, by number; returns what `apply_step` does at its end."""
    scored_O = count_scored(objectives, list(batches.values()))
    applied, grad_norm = False, 0.0
    for number, batch in batches.items():
        torch.manual_seed(own_seed(seed, number))
        with window.timed("forward"):
            output = engine(**batch.inputs())
            loss = step_loss(objectives, output, batch, scored_O, sums)
            sums.add_loss(number, loss)
        with window.timed("backward"):
            engine.backward(loss * distributed.get_world_size(), scale_wrt_gas=False)  # DeepSpeed averages over ranks
        with window.timed("step"):
            applied, grad_norm = apply_step(engine, optimizer.grad_clip)  # updates after the last one
    return applied, grad_norm


def start_state() -> dict[str, Any]:
    """What a checkpoint keeps besides weights and optimizer, before the first step."""
    return {
        "step": 0,
        "samples": "",  # running digest of the structures seen
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "loss_spikes": 0,
        "recent_losses": [],  # see SpikeDetector
        "elapsed_s": 0.0,
        "window": None,
    }


def count_scored(objectives: Sequence[Objective], batches: Sequence[Batch]) -> Tensor:
    """[O] float64: items that each objective scores in the whole step; a mean of per-rank means is another number."""
    scored_O = torch.stack([torch.cat([o.scored(batch) for batch in batches]).double().sum() for o in objectives])
    distributed.all_reduce(scored_O)
    return scored_O


def step_loss(objectives: Sequence[Objective], output: Any, batch: Batch, scored_O: Tensor, sums: StepSums) -> Tensor:
    """This micro-batch's share of the step's loss; its terms are added to `sums` for the log.

    A loss that is not finite poisons its gradient on purpose: the gradients are summed over ranks, so all of them skip.
    """
    sums.add_batch(batch)
    # every head, every time; what does not apply to a structure, as the stress of a molecule, is nan there
    total = torch.stack([0 * tensor.float().nan_to_num().sum() for tensor in differentiable(output)]).sum()
    for index, objective in enumerate(objectives):
        loss_B, weight_B = objective.loss_sum(output, batch), objective.scored(batch)
        loss_B = torch.where(weight_B > 0, loss_B, 0.0)
        sums.add_terms(index, batch, loss_B, weight_B)
        total = total + objective.weight * loss_B.sum() / scored_O[index].clamp(min=1).to(loss_B.dtype)
    return total if torch.isfinite(total) else total * torch.nan


def differentiable(output: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, however nested, that a gradient can flow into."""
    for value in output.values():
        if isinstance(value, Mapping):
            yield from differentiable(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            yield value


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up that starts above 0, then a cosine to `final_fraction` of the peak at the last step."""
    warmup = min(optimizer.warmup_steps, steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return optimizer.lr * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)


def count_skipped(run: Run, state: dict[str, Any], applied: bool, mixture: Mixture, sums: StepSums) -> None:
    """Counts a step that was not applied and logs its structures; gives up when there were too many in a row."""
    if applied:
        state["skipped_in_a_row"] = 0
        return
    state["skipped_steps"] += 1
    state["skipped_in_a_row"] += 1
    bad = sums.not_finite  # none: every loss is finite, their gradient is not
    what = f"{'loss' if bad else 'gradient'} not finite, skipped on all ranks"
    run.log_event(state["step"], what, lambda: structure_ids(mixture, bad or sums.numbers))
    if state["skipped_in_a_row"] == MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(f"{run.path}: {MAX_SKIPPED_IN_A_ROW} steps in a row not finite, last {state['step']}")


def count_spikes(run: Run, state: dict[str, Any], applied: bool, mixture: Mixture, sums: StepSums, loss: float) -> None:
    """Counts a step whose loss stands far above those before it, and logs its structures."""
    if not applied:
        return
    detector = SpikeDetector(state["recent_losses"])
    median = detector.add(loss)
    state["recent_losses"] = detector.losses
    if median is not None:
        state["loss_spikes"] += 1
        what = f"loss {loss:.4g} is far above the last steps' ({median:.4g})"
        run.log_event(state["step"], what, lambda: structure_ids(mixture, sums.numbers))


def structure_ids(mixture: Mixture, numbers: Sequence[int]) -> dict[int, list[str]]:
    """Micro-batch -> the ids of its structures."""
    return {number: [s.id for s in mixture.structures(number)] for number in numbers}
