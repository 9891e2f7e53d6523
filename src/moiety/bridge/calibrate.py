"""The last stage trains nothing: how sure answers and numbers are, and what is known, by structures held out."""
# Shapes: S structures, F invariants, R rows, L tokens of an answer.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.bridge.dialogue import UNSCORED, Asking
from moiety.bridge.facts import facts_of
from moiety.bridge.reading import TOGETHER, dialogue_of, readings
from moiety.bridge.rows import Row, asking, unfit_row
from moiety.data.structure import Structure
from moiety.models.heads_bridge_moiety import QUANTILES

NINETY = 1.6449  # standard deviations on either side hold 90 % of a Gaussian
SHRINKAGE = 0.05  # of the covariance towards its mean variance
TEMPERATURES = np.geomspace(0.5, 4.0, 61)
ASKED = 4  # questions of each held-out structure


def calibrate(
    model: Any, asker: Asking, known: Sequence[Structure], held_out: Sequence[Structure], seed: int = 0
) -> dict[str, float]:
    """Sets the calibration of a bridge; returns what was found.

    Args:
        model: the bridge.
        asker: makes its batches.
        known: structures that it has learned from.
        held_out: others like them.
        seed: of the questions.
    """
    model.eval()
    calibration = model.calibration
    calibration.reset()
    set_known(calibration, model, known, held_out)
    rng = np.random.default_rng(seed)
    rows = [row for place, structure in enumerate(held_out) for row in questions(structure, place, rng)]
    logits, targets, errors = answered(model, asker, held_out, rows)
    calibration.temperature.fill_(best_temperature(logits, targets))
    for place in range(errors.shape[1]):
        found = errors[~np.isnan(errors[:, place]), place]
        if len(found):
            calibration.sigma_scale[place] = float(np.quantile(found, 0.9)) / NINETY
    return {
        "temperature": float(calibration.temperature),
        "rows": len(rows),
        **{f"sigma_scale.{n}": float(v) for n, v in zip(model.config.numbers, calibration.sigma_scale, strict=True)},
    }


def set_known(calibration: Any, model: Any, known: Sequence[Structure], held_out: Sequence[Structure]) -> None:
    """Centre and spread of the mean invariants of what was learned from, and how far from there held-out ones lie."""
    features_SF = stacked(model, known)
    calibration.center.copy_(features_SF.mean(0))
    covariance = torch.cov(features_SF.T.double())
    size = covariance.shape[0]
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(size).double()
    values, vectors = torch.linalg.eigh(covariance)
    calibration.whiten.copy_((vectors / values.clamp(min=1e-12).sqrt()).float())
    distances = calibration.distance_of(stacked(model, held_out))
    calibration.distance.copy_(torch.quantile(distances, torch.linspace(0, 1, QUANTILES)))
    calibration.seen.zero_()
    calibration.seen[np.unique(np.concatenate([structure.node_type for structure in known]))] = 1


def stacked(model: Any, structures: Sequence[Structure]) -> Tensor:
    """[S,F] mean invariants."""
    places, found = zip(*readings(model, structures), strict=True)
    return torch.cat([output.structure_features for output in found])[np.argsort(np.concatenate(places))]


def questions(structure: Structure, place: int, rng: np.random.Generator) -> list[Row]:
    """A few questions of a structure, one that does not fit among them now and then."""
    facts = list(facts_of(structure, rng))
    chosen = [facts[index] for index in rng.permutation(len(facts))[:ASKED]]
    rows = [asking(fact, place, "train", rng) for fact in chosen]
    return [*rows, unfit_row(structure, place, "train", rng)] if rng.random() < 0.3 else rows


@torch.no_grad()
def answered(
    model: Any, asker: Asking, structures: Sequence[Structure], rows: Sequence[Row]
) -> tuple[list[Tensor], list[Tensor], np.ndarray]:
    """Logits and right tokens of all answers, and the errors of numbers in sigmas [S,P], NaN where none is known."""
    logits, targets, errors = [], [], []
    for start in range(0, len(rows), TOGETHER):
        chosen = rows[start : start + TOGETHER]
        batch = dialogue_of(chosen, structures, asker, model.config.cutoff)
        scored = batch.targets["answer"] != UNSCORED
        output = model(**batch.inputs())
        logits.append(output.logits[scored].float())
        targets.append(batch.targets["answer"][scored])
        missed = (batch.targets["numbers"] - output.number_values).abs() / output.number_log_sigmas.exp()
        errors.append(missed.numpy())
    return logits, targets, np.concatenate(errors)


def best_temperature(logits: list[Tensor], targets: list[Tensor]) -> float:
    """That under which the right tokens are most likely (Guo et al., arXiv 1706.04599)."""
    losses = [
        sum(
            float(torch.nn.functional.cross_entropy(own / temperature, right, reduction="sum"))
            for own, right in zip(logits, targets, strict=True)
        )
        for temperature in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(losses))])
