"""Held-out structures, asked at every checkpoint: which weights were best, and whether it is time to stop.

What is scored are the averaged weights that the checkpoint holds, whatever the ZeRO stage. `validation.jsonl` has a
line a score, `best.safetensors` the weights of the lowest one.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from moiety.training.run import Run

SCORES, BEST = "validation.jsonl", "best.safetensors"


class Validation:
    """Scores of a run's checkpoints, lower is better; every process calls it, the first one computes."""

    def __init__(self, run: Run, score: Callable[[dict[str, Tensor]], float], patience: int) -> None:
        """
        Args:
            run: whose checkpoints.
            score: of a model's weights, whole, by name.
            patience: scores in a row without a new lowest one before the run ends.
        """
        self._run, self._score, self._patience = run, score, patience
        self._scores: dict[int, float] = {}

    def resume(self, step: int) -> None:
        """Forgets scores after a step, from which the run goes on; asks again for one that a kill has swallowed."""
        path = self._run.path / SCORES
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            self._scores = {line["step"]: line["score"] for line in lines if line["step"] <= step}
        if self._run.rank == 0:
            text = "".join(json.dumps({"step": s, "score": score}) + "\n" for s, score in self._scores.items())
            path.write_text(text)
        if step and step not in self._scores:
            self(step)

    def __call__(self, step: int) -> None:
        """Scores the newest checkpoint, that of this step."""
        if not self._run.settle():
            return
        score = torch.zeros((), dtype=torch.float64, device=self._run.engine.device)
        weights = self._run.weights()
        if weights is not None:
            score += self._score(weights)
        distributed.broadcast(score, 0)
        self._scores[step] = float(score)
        if self._run.rank == 0:
            with (self._run.path / SCORES).open("a") as file:
                file.write(json.dumps({"step": step, "score": float(score)}) + "\n")
            is_best = step == self.best_step
            if is_best and weights is not None:
                aside = self._run.path / f"{BEST}.tmp"
                save_file(weights, aside)
                aside.replace(self._run.path / BEST)
            best = ", the best so far" if is_best else ""
            self._run.progress.note(f"step {step}: validation {float(score):.4g}{best}")

    @property
    def best_step(self) -> int:
        return min(self._scores, key=lambda step: self._scores[step])

    @property
    def best_score(self) -> float:
        return min(self._scores.values())

    @property
    def over(self) -> bool:
        """Whether the last `patience` scores were all no better than one before them."""
        steps = list(self._scores)
        return len(steps) > self._patience and self.best_step < steps[-self._patience]

    def best_weights(self) -> dict[str, Tensor]:
        return load_file(self._run.path / BEST)
