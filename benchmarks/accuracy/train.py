"""One model from scratch on one task with one seed, for so many CPU seconds or so many molecule passes.

    python benchmarks/accuracy/train.py --model moiety-l1 --task u0 --seconds 510 --seed 0 --out u0.json
    .venv-peers/bin/python benchmarks/accuracy/train.py --model tensornet --task u0 --passes 80000 --seed 0 --out t.json

One loop for all: the same batches in the same order, the same loss, optimizer, schedule and clipping; the learning rate
is each model's own (SETTINGS, chosen by a pilot). Forward, backward, optimizer, average and the collation of a
batch count as training, in CPU seconds of this process on one core; evaluation does not count. At points spaced evenly
over the run the errors on validation molecules and on some test molecules are written down; in the end the weights of
lowest validation error are tested on all test molecules. Arrays come from prepare.py.
"""
# Shapes: B molecules in the batch, n in a split, N nodes, E edges.

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.models import PeerModel, build, count_parameters
from peers.systems import Batch

NUM_PARAMETERS = 400_000
EVALUATED = 128  # molecules at a time
WARMUP = 0.02  # share of the budget in which the learning rate rises; from there it falls as a cosine, to zero
CLIP = 10.0  # norm of the gradient
ENERGY_WEIGHT, FORCES_WEIGHT = 0.2, 0.8  # as TorchMD-NET publishes them for MD17, for all models
SETTINGS = Path(__file__).with_name("settings.json")  # published learning rates, and what the pilot chose


@dataclass(frozen=True)
class Task:
    """What is learned: arrays of a corpus, and how the model's sum over nodes is read.

    Attributes:
        corpus: file of arrays.
        label: energy or gap, eV.
        intensive: whether a readout that does not grow with the molecule is tried beside the sum; the pilot tells which
            is better.
        forces: whether forces (eV/Å), the derivatives of the energy, are learned too.
        batch: molecules; of forces as TorchMD-NET publishes it for MD17.
    """

    corpus: str
    label: str
    intensive: bool = False
    forces: bool = False
    batch: int = 32


TASKS = {
    "u0": Task("qm9", "energy"),
    "gap": Task("qm9", "gap", intensive=True),
    "forces": Task("forces", "energy", forces=True, batch=8),
}


class Molecules:
    """A split in memory; any of its molecules make a batch, by slices of arrays alone."""

    def __init__(self, arrays: dict[str, np.ndarray], label: str):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.node_type, self.positions = tensors["node_type"], tensors["positions"]
        self.edge_index = tensors["edge_index"]
        self.num_nodes, self.num_edges = tensors["num_nodes"], tensors["num_edges"]
        self.first_node = self.num_nodes.cumsum(0) - self.num_nodes
        self.first_edge = self.num_edges.cumsum(0) - self.num_edges
        self.label = tensors[label].float()
        self.forces = tensors.get("forces")

    def __len__(self) -> int:
        return len(self.num_nodes)

    def batch(self, chosen: Tensor) -> tuple[Batch, Tensor, Tensor | None]:
        """The batch, its labels [B], and its forces [N, 3] if there are any."""
        nodes, edges = self.num_nodes[chosen], self.num_edges[chosen]
        node_N = _ranges(self.first_node[chosen], nodes)
        edge_E = _ranges(self.first_edge[chosen], edges)
        shift_E = torch.repeat_interleave(nodes.cumsum(0) - nodes, edges)
        batch = Batch(
            node_type=self.node_type[node_N],
            positions=self.positions[node_N],
            graph_index=torch.repeat_interleave(nodes),
            edge_index=self.edge_index[:, edge_E].long() + shift_E,
            edge_shift=self.positions.new_zeros(len(edge_E), 3),
            cell=self.positions.new_zeros(len(chosen), 3, 3),
            pbc=torch.zeros(len(chosen), 3, dtype=torch.bool),
        )
        return batch, self.label[chosen], None if self.forces is None else self.forces[node_N]


def _ranges(first: Tensor, count: Tensor) -> Tensor:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    offset = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    return torch.arange(len(offset)) + offset


class Predictor(nn.Module):
    """A model in the units of a task: the label is shift + scale * (its sum over nodes, or its intensive readout).

    The scale is MACE's where there are forces, their root mean square times 1 Å; else it is the standard deviation of
    the labels, divided by the square root of the mean number of nodes where these are summed.
    """

    def __init__(self, model: PeerModel, task: Task, mean: bool, train: Molecules):
        super().__init__()
        self.model, self.task, self.mean = model, task, mean
        self.shift = float(train.label.mean()) if task.intensive else 0.0
        self.scale = float(train.label.std())
        if train.forces is not None:
            self.scale = float(train.forces.square().mean().sqrt())
        elif not mean:
            self.scale /= math.sqrt(float(train.num_nodes.float().mean()))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Labels [B] eV and, if the task has them, forces [N, 3] eV/Å."""
        if not self.task.forces:
            return self._label(batch, batch.positions), None
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            label = self._label(batch, positions)
            (slope,) = torch.autograd.grad(label.sum(), positions, create_graph=self.training)
        return label, -slope

    def _label(self, batch: Batch, positions: Tensor) -> Tensor:
        value_B = self.model.intensive(batch) if self.mean else self.model.energy(batch, positions, batch.edge_shift)
        return self.shift + self.scale * value_B

    def loss(self, batch: Batch, label: Tensor, forces: Tensor | None) -> Tensor:
        """Mean absolute error, which is what is reported, in units of the scale."""
        predicted, predicted_forces = self(batch)
        error_B = (predicted - label).abs() / self.scale
        if forces is None or predicted_forces is None:
            return error_B.mean()
        error_forces = (predicted_forces - forces).abs().mean() / self.scale
        return ENERGY_WEIGHT * error_B.mean() + FORCES_WEIGHT * error_forces


def evaluate(predictor: Predictor, molecules: Molecules) -> dict[str, float]:
    """MAE in meV, of forces in meV/Å."""
    predictor.eval()
    errors, error_forces = [], []
    with torch.no_grad():
        for chosen in torch.arange(len(molecules)).split(EVALUATED):
            batch, label, forces = molecules.batch(chosen)
            predicted, predicted_forces = predictor(batch)
            errors.append((predicted.detach() - label).abs())
            if forces is not None and predicted_forces is not None:
                error_forces.append((predicted_forces.detach() - forces).abs())
    predictor.train()
    found = {"label": 1000 * float(torch.cat(errors).mean())}
    if error_forces:
        found["forces"] = 1000 * float(torch.cat(error_forces).mean())
    return found


class Average:
    """Exponential moving average of the weights; young, it forgets faster. A decay of 0 is no average."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (9 + self.steps))
        if self.decay:
            for kept, live in zip(self.kept, self.live, strict=True):
                kept.lerp_(live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges live and average weights."""
        if self.decay:
            for live, kept in zip(self.live, self.kept, strict=True):
                before = live.clone()
                live.copy_(kept)
                kept.copy_(before)


@dataclass
class Budget:
    """CPU seconds or molecule passes, whichever was given; `spent` and `passes` count both."""

    most_seconds: float | None
    most_passes: int | None
    spent: float = 0.0
    passes: int = 0

    @property
    def progress(self) -> float:
        if self.most_seconds is not None:
            return self.spent / self.most_seconds
        assert self.most_passes is not None
        return self.passes / self.most_passes


def shuffled(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches for ever, each epoch in its own order; the rest of an epoch that fills no batch is left out."""
    rng = torch.Generator().manual_seed(seed)
    batch = min(batch, size)
    while True:
        yield from torch.randperm(size, generator=rng)[: size - size % batch].split(batch)


def train(
    predictor: Predictor,
    splits: dict[str, Molecules],
    budget: Budget,
    seed: int,
    lr: float,
    ema: float,
    num_points: int,
) -> list[dict[str, Any]]:
    """Trains until the budget is spent and leaves the predictor with the weights of lowest validation error.

    Returns one entry a point: seconds, passes, train_loss (mean since the last point), val. A loss that is no number
    ends the run; the points so far say how far it came.
    """
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=0.0)
    average = Average(predictor, ema)
    batches = shuffled(len(splits["train"]), predictor.task.batch, seed)
    points: list[dict[str, Any]] = []
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    predictor.train()
    predictor.loss(*splits["train"].batch(torch.arange(2))).backward()  # what is compiled or loaded at a first step
    while len(points) < num_points:
        began = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(budget.progress)
        chosen = next(batches)
        loss = predictor.loss(*splits["train"].batch(chosen))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(predictor.parameters(), CLIP)
        optimizer.step()
        average.update()
        losses.append(loss.item())
        budget.spent += time.process_time() - began
        budget.passes += len(chosen)
        if not math.isfinite(losses[-1]):
            break
        if budget.progress >= (len(points) + 1) / num_points:
            average.swap()
            point = {"seconds": budget.spent, "passes": budget.passes, "train_loss": float(np.mean(losses))}
            point["val"] = evaluate(predictor, splits["val"])
            points.append(point)
            if point is min(points, key=lambda p: judged(predictor.task, p)):
                best = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
            average.swap()
            losses.clear()
            print(json.dumps(point), file=sys.stderr, flush=True)
    if best:
        predictor.load_state_dict(best)
    return points


def schedule(progress: float) -> float:
    """Share of the learning rate."""
    return min(1.0, progress / WARMUP + 1e-3) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def judged(task: Task, point: dict[str, Any]) -> float:
    """The validation error by which points and learning rates are chosen."""
    return point["val"]["forces" if task.forces else "label"]


def settings(args: argparse.Namespace) -> tuple[float, str]:
    """Learning rate and readout: as asked for, else as the pilot chose, else as published."""
    readout = args.readout or ("mean" if TASKS[args.task].intensive else "sum")
    if args.lr is not None:
        return args.lr, readout
    known = json.loads(SETTINGS.read_text())
    found = known.get(args.task, {}).get(args.model) or known["published"].get(args.model)
    if found is None:
        raise ValueError(f"{SETTINGS.name} has no learning rate of {args.model}: say --lr")
    return found["lr"], args.readout or found.get("readout", readout)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, choices=TASKS)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="CPU seconds")
    budget.add_argument("--passes", type=int, help="molecules seen, with repetition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="default: the pilot's choice, or as published")
    parser.add_argument("--readout", choices=("mean", "sum"), help="default: the pilot's choice")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights; 0: none")
    parser.add_argument("--points", type=int, default=12, help="of the curve")
    parser.add_argument("--no-test", action="store_true", help="validation only: to choose by")
    parser.add_argument("--data", type=Path, default=Path("corpora/accuracy"), help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    task = TASKS[args.task]
    path = args.data / f"{task.corpus}.npz"
    if not path.exists():
        print(f"train: no {path}; make it with benchmarks/accuracy/prepare.py", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    with np.load(path) as arrays:
        splits = {
            split: Molecules({k.partition("/")[2]: arrays[k] for k in arrays if k.startswith(f"{split}/")}, task.label)
            for split in ("train", "val", "test")
        }
    try:
        lr, readout = settings(args)
        if readout == "mean" and not task.intensive:
            raise ValueError(f"{args.task} is no intensive label: its readout is the sum")
        model = build(args.model, NUM_PARAMETERS)
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    predictor = Predictor(model, task, readout == "mean", splits["train"])
    budget = Budget(args.seconds, args.passes)
    points = train(predictor, splits, budget, args.seed, lr, args.ema, args.points)
    found = {
        "model": args.model, "task": args.task, "seed": args.seed, "seconds": args.seconds, "passes": args.passes,
        "lr": lr, "readout": readout, "ema": args.ema, "batch": task.batch, "num_parameters": count_parameters(model),
        "val": evaluate(predictor, splits["val"]) if points else None,
        "test": evaluate(predictor, splits["test"]) if points and not args.no_test else None,
        "points": points, "torch": torch.__version__,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, args.out)  # a file that is there is a run that is finished
    return 0


if __name__ == "__main__":
    sys.exit(main())
