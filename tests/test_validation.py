"""Held-out structures choose the weights, end a run that gets no better, and survive a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moiety.training.validation import BEST, SCORES, Validation


class StandIn:
    """What Validation asks of a run: checkpoints that hold their own step."""

    rank = 0

    def __init__(self, path: Path) -> None:
        self.path, self.newest, self.notes = path, 0, []
        self.engine = type("Engine", (), {"device": torch.device("cpu")})()
        self.progress = self

    def note(self, text: str) -> None:
        self.notes.append(text)

    def settle(self) -> bool:
        return True

    def weights(self) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor([float(self.newest)])}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moiety.training.validation.distributed.broadcast", lambda tensor, source: None)


def validation(run: Any, scores: dict[int, float], patience: int = 2) -> Validation:
    return Validation(run, lambda weights: scores[int(weights["step"])], patience)


def ask(run: StandIn, held_out: Validation, *steps: int) -> None:
    for step in steps:
        run.newest = step
        held_out(step)


def test_the_best_weights_are_kept_and_a_run_that_gets_no_better_ends(tmp_path: Path):
    run = StandIn(tmp_path)
    held_out = validation(run, {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5})
    ask(run, held_out, 1, 2, 3)
    assert not held_out.over
    ask(run, held_out, 4)
    assert held_out.over and (held_out.best_step, held_out.best_score) == (2, 1.0)
    assert held_out.best_weights()["step"].item() == 2


def test_a_resumed_run_knows_its_scores_and_asks_for_the_one_that_was_lost(tmp_path: Path):
    scores = {1: 3.0, 2: 1.0, 3: 2.0}
    run = StandIn(tmp_path)
    ask(run, validation(run, scores), 1, 2, 3)
    lines = (tmp_path / SCORES).read_text().splitlines()
    (tmp_path / SCORES).write_text(lines[0] + "\n" + lines[1][:9])  # torn by a kill
    again = validation(run, scores)
    run.newest = 2
    again.resume(2)
    assert (again.best_step, again.over) == (2, False)
    assert [json.loads(line)["step"] for line in (tmp_path / SCORES).read_text().splitlines()] == [1, 2]


def test_best_weights_are_a_plain_file(tmp_path: Path):
    run = StandIn(tmp_path)
    ask(run, validation(run, {5: 1.0}), 5)
    assert load_file(tmp_path / BEST)["step"].item() == 5
    assert not list(tmp_path.glob("*.tmp"))
