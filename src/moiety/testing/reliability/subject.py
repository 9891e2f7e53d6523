"""The run that the promises are tried on: a small network, three domains, and faults on demand.

python subject.py --config CONFIG --out OUT [--forces] [--fault KIND:STEP:RANK] [key=value ...]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.objectives.base import Objective, remove_mean, sum_by_structure
from moiety.tokens.batch import Batch
from moiety.training import checkpoint
from moiety.training.config import PretrainConfig, load_config
from moiety.training.loop import fit
from moiety.training.mixture import Mixture
from moiety.training.run import Run
from moiety.training.script import run_script

FOREVER = 10_000.0  # s
SPRING = 10.0  # eV/Å^2
TASKS = {"energy": {"kind": "energy", "unit": "eV"}}


class Springs(Objective):
    """Forces that pull displaced nodes back, and their energy: something for exact derivatives to learn."""

    name, weight = "springs", 1.0

    def __init__(self) -> None:
        pass

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        shift_N3 = remove_mean(0.1 * torch.randn(batch.positions.shape, generator=rng), batch)
        energy_B = SPRING / 2 * sum_by_structure(shift_N3.square().sum(-1), batch)
        pull = {"targets": {"energy": energy_B}, "node_targets": {"forces": -SPRING * shift_N3}}
        return batch.replace(positions=batch.positions + shift_N3, **pull)

    def scored(self, batch: Batch) -> Tensor:
        return batch.num_nodes_B.to(batch.positions)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        error_N = (output.predictions["forces"] - batch.node_targets["forces"]).square().mean(-1)
        error_B = (output.predictions["energy"] - batch.targets["energy"]).square()
        return sum_by_structure(error_N, batch) + 0.01 * error_B


class Fault(NamedTuple):
    """What goes wrong, at which step (from 1), on which rank."""

    kind: str
    step: int
    rank: int


class Faulty(Objective):
    """An objective that is struck by a fault."""

    def __init__(self, inner: Objective, fault: Fault, model: nn.Module, per_step: int) -> None:
        self.inner, self.fault, self.model, self.per_step = inner, fault, model, per_step
        self.name, self.weight = inner.name, inner.weight
        self._calls = 0

    def corrupt(self, batch: Batch, rng: torch.Generator) -> Batch:
        return self.inner.corrupt(batch, rng)

    def scored(self, batch: Batch) -> Tensor:
        return self.inner.scored(batch)

    def loss_sum(self, output: Any, batch: Batch) -> Tensor:
        self._calls += 1
        loss_B = self.inner.loss_sum(output, batch)
        of_rank = self.per_step // distributed.get_world_size()
        struck = (self._calls - 1) // of_rank + 1 == self.fault.step and distributed.get_rank() == self.fault.rank
        if struck and self.fault.kind == "loss":
            return loss_B * torch.nan
        if struck and self.fault.kind == "gradient":
            loss_B.register_hook(lambda gradient: gradient * torch.inf)
        if struck and self.fault.kind == "weight":
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        if struck and self.fault.kind == "stuck":
            time.sleep(FOREVER)
        return loss_B


def limit_files(num_bytes: int) -> None:
    """From here on no file of this process can grow beyond that: a disk that fills up in the middle of one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def ignore_free_space() -> None:
    """The disk fills up only after the look at it: others write there too."""
    usage = shutil.disk_usage
    checkpoint.shutil.disk_usage = lambda path: usage(path)._replace(free=2**60)  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--forces", action="store_true", help="exact forces instead of the pretraining objectives")
    parser.add_argument("--fault", help="loss | gradient | weight | stuck, with the step and the rank")
    parser.add_argument("--file-limit", type=int, help="bytes that a file may have")
    parser.add_argument("--blind", action="store_true", help="do not look at the free space of the disk")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(argv)
    if args.file_limit:
        limit_files(args.file_limit)
    if args.blind:
        ignore_free_space()
    config = load_config(PretrainConfig, args.config, args.overrides)
    mixture = Mixture.open(config.data)
    with Run.open(args.out, config) as run:
        torch.manual_seed(config.training.seed)
        shape = config.model_config()
        shape.tasks = TASKS if args.forces else None
        model = MoietyForPrediction(shape) if args.forces else MoietyForPreTraining(shape)
        objectives: list[Objective] = [Springs()] if args.forces else build_objectives(config.objectives)
        if args.fault:
            kind, step, rank = args.fault.split(":")
            fault = Fault(kind, int(step), int(rank))
            objectives[0] = Faulty(objectives[0], fault, model, config.data.micro_batches)
        fit(run, model, mixture, objectives, config.optimizer, config.training)
    return 0


if __name__ == "__main__":
    run_script(main)
