"""What is gathered between two log records: losses by domain and objective, gradient norms, where the time went."""
# Shapes: D domains, O objectives.

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moiety.models.vocabulary_moiety import DOMAINS
from moiety.objectives import Objective
from moiety.tokens.batch import Batch
from moiety.training.flops import Work

PHASES: tuple[str, ...] = ("data", "forward", "backward", "step", "save")
COUNTS = 3  # structures, nodes, edges


class StepSums:
    """One step's sums on this rank, in one tensor so that one all_reduce makes them global."""

    def __init__(self, num_objectives: int, first: int, micro_batches: int, device: torch.device) -> None:
        """`first` is the number of the step's first micro-batch, over all ranks."""
        num_terms = len(DOMAINS) * num_objectives * 2
        self.numbers = range(first, first + micro_batches)
        self.flat = torch.zeros(num_terms + COUNTS + micro_batches + 1, dtype=torch.float64, device=device)
        self.logged = self.flat[: num_terms + COUNTS]  # terms, counts
        self.stop = self.flat[-1]  # ranks that were asked to stop
        self._not_finite_m = self.flat[num_terms + COUNTS : -1]
        self._terms_DO2 = self.flat[:num_terms].view(len(DOMAINS), num_objectives, 2)  # sum of loss, sum of weight

    @property
    def not_finite(self) -> list[int]:
        """Numbers of the micro-batches whose loss is not finite."""
        return [self.numbers[m] for m in self._not_finite_m.nonzero().flatten().tolist()]

    def add_loss(self, number: int, loss: Tensor) -> None:
        self._not_finite_m[number - self.numbers.start] = ~torch.isfinite(loss.detach())

    def add_batch(self, batch: Batch) -> None:
        assert batch.edge_index is not None
        for place, size in enumerate((batch.num_structures, len(batch.node_type), batch.edge_index.shape[1])):
            self.logged[place - COUNTS] += size

    def add_terms(self, objective: int, batch: Batch, loss_B: Tensor, weight_B: Tensor) -> None:
        terms_B2 = torch.stack([loss_B.detach(), weight_B], dim=-1).double()
        self._terms_DO2[:, objective].index_add_(0, batch.domain, terms_B2)


class Window:
    """Sums over the steps since the last record. Losses are global; times are rank 0's own."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        work: Work,
        beat: Callable[[str], None],
        state: dict[str, Any] | None = None,
    ) -> None:
        """`beat` is told of every phase that begins; `state` is what an earlier process had of this window."""
        self._work = work
        self._beat = beat
        self._objectives = objectives
        num_sums = len(DOMAINS) * len(objectives) * 2 + COUNTS
        self._sums = torch.tensor(state["sums"] if state else [0.0] * num_sums, dtype=torch.float64)
        self._grad_norms: list[float] = list(state["grad_norms"]) if state else []
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()
        self._before = self._sums[-COUNTS:].clone()  # of the resumed part: not done in this process's time

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to a phase. On a GPU kernels run on behind it; read the shares as the host's."""
        self._beat(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def add(self, sums: StepSums, grad_norm: float) -> None:
        self._sums += sums.logged.cpu()
        self._grad_norms.append(grad_norm)

    def loss_of(self, sums: StepSums) -> float:
        """The loss of one step, over all ranks."""
        return self._loss(sums.logged.cpu())

    def _loss(self, sums: Tensor) -> float:
        loss_O, weight_O = sums[:-COUNTS].view(len(DOMAINS), len(self._objectives), 2).sum(0).unbind(-1)
        means_O = (loss_O / weight_O.clamp(min=1)).tolist()
        return sum(o.weight * mean for o, mean in zip(self._objectives, means_O, strict=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a record which spans it is the same after a resume."""
        return {"sums": self._sums.tolist(), "grad_norms": self._grad_norms}

    def record(self, state: dict[str, Any], lr: float, failed_saves: int) -> dict[str, Any]:
        """The log record of these steps: mean losses over all scored items, rates, shares of the time."""
        terms_DO2 = self._sums[:-COUNTS].view(len(DOMAINS), len(self._objectives), 2)
        elapsed = time.perf_counter() - self._started
        structures, nodes, edges = (self._sums[-COUNTS:] - self._before).tolist()
        busy = sum(self._seconds.values())
        return {
            "step": state["step"],
            "loss": self._loss(self._sums),
            "losses": {
                domain: losses for index, domain in enumerate(DOMAINS) if (losses := self._means(terms_DO2[index]))
            },
            "grad_norm": sum(self._grad_norms) / max(1, len(self._grad_norms)),
            "lr": lr,
            "structures_per_s": round(structures / elapsed, 1),
            "nodes_per_s": round(nodes / elapsed, 1),
            "mfu": round(self._work.utilization(nodes, edges, elapsed), 4),
            "skipped_steps": state["skipped_steps"],
            "failed_saves": failed_saves,
            "loss_spikes": state["loss_spikes"],
            "samples": state["samples"],
            "time": {phase: round(seconds / busy, 4) for phase, seconds in self._seconds.items()},
            "elapsed_s": round(state["elapsed_s"], 3),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }

    def _means(self, terms_O2: Tensor) -> dict[str, float]:
        return {
            objective.name: loss / weight
            for objective, (loss, weight) in zip(self._objectives, terms_O2.tolist(), strict=True)
            if weight
        }


def peak_memory() -> int:
    """Bytes that this process has held at most: of its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage also counts what the process was before its exec
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
