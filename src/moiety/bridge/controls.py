"""Controls: what is answered by who sees no structure, the wrong one, or copies; printed beside every number.

`sees: nothing` and `sees: composition` of a stage train the other two (moiety.bridge.stages).
"""
# Shapes: S structures, F features.

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from moiety.bridge.dialogue import packed
from moiety.bridge.evaluate import Exam
from moiety.bridge.reading import TOGETHER, Said
from moiety.bridge.rows import Row
from moiety.data.structure import Structure
from moiety.tokens.batch import with_neighbors

Array = np.ndarray
PROBED = 600  # steps of a probe's fit


def subject(row: Row) -> tuple[str, str]:
    """What is asked: the fact, and the element or group that it is about."""
    assert row.fact is not None
    return row.fact.name, " ".join(sorted(row.fact.about.values()))


def majority(learned: Sequence[Row], exam: Exam) -> list[Said]:
    """The most frequent answer to each question among those that were learned from."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in learned:
        counts[subject(row)][row.answer] += 1
    return [Said(_first(counts[subject(row)]), 0.0) for row in exam.rows]


def copied(learned: Sequence[Row], known: Array, exam: Exam, found: Array) -> list[Said]:
    """The answer of the nearest structure that was asked the same; [S,F] features of known and of asked structures."""
    owners: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in learned:
        owners[subject(row)].append(row)
    said = []
    for row in exam.rows:
        others = owners[subject(row)]
        if not others:
            said.append(Said("", 0.0))
            continue
        distances = np.linalg.norm(known[[other.about for other in others]] - found[row.about], axis=1)
        said.append(Said(others[int(distances.argmin())].answer, 0.0))
    return said


def probed(learned: Sequence[Row], known: Array, exam: Exam, found: Array) -> list[Said]:
    """Logistic regression on features, one for each question."""
    owners: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in learned:
        owners[subject(row)].append(row)
    probes: dict[tuple[str, str], Any] = {}
    for key, rows in owners.items():
        answers = [row.answer for row in rows]
        if len(set(answers)) > 1:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBED))
            probes[key] = probe.fit(known[[row.about for row in rows]], answers)
    said = []
    for row in exam.rows:
        key = subject(row)
        if key in probes:
            said.append(Said(str(probes[key].predict(found[row.about][None])[0]), 0.0))
        else:
            said.append(Said(owners[key][0].answer if owners[key] else "", 0.0))
    return said


def headed(known: Array, values: Array, found: Array, seed: int = 0) -> Array:
    """[S] a number by a small network on features: [S,F] of those it learns from, their values [S], and those asked."""
    network = MLPRegressor(hidden_layer_sizes=(128, 128), early_stopping=True, random_state=seed)
    mean, spread = values.mean(), values.std()
    fitted = make_pipeline(StandardScaler(), network).fit(known, (values - mean) / spread)
    return mean + spread * fitted.predict(found)


def shuffled(exam: Exam, same_composition: bool, seed: int = 0) -> Exam:
    """The same questions with another structure in the place of each: of the domain, or of the same composition."""
    rng = np.random.default_rng(seed)
    groups: Mapping[str, list[int]] = _places(exam.structures, same_composition)
    rows = []
    for row in exam.rows:
        own = exam.structures[row.about]
        others = [place for place in groups[_key(own, same_composition)] if place != row.about]
        if others and len(row.read) == 1:
            rows.append(replace(row, read=(others[rng.integers(len(others))],)))
    return Exam(exam.structures, rows, np.zeros(len(rows), dtype=bool))


def _places(structures: Sequence[Structure], same_composition: bool) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, structure in enumerate(structures):
        places[_key(structure, same_composition)].append(place)
    return places


def _key(structure: Structure, same_composition: bool) -> str:
    return np.sort(structure.node_type).tobytes().hex() if same_composition else structure.domain


@torch.no_grad()
def tower_features(model: Any, structures: Sequence[Structure]) -> Array:
    """[S,F] what tower and bridge make of structures: means and sums over nodes, summaries, and the hand."""
    order = np.argsort([structure.num_nodes for structure in structures], kind="stable")
    found = []
    for start in range(0, len(order), TOGETHER):
        chosen = [structures[place] for place in order[start : start + TOGETHER]]
        batch = with_neighbors(packed(chosen), model.config.cutoff)
        trunk = model.tower(**batch.inputs())
        read = model.bridged(trunk.node_features, torch.full((len(chosen),), 8), batch.inputs())
        found.append(torch.cat([read.mean, read.lengths, read.even, read.odd], dim=1).numpy())
    return np.concatenate(found)[np.argsort(order)]


def _first(counts: Counter[str]) -> str:
    return counts.most_common(1)[0][0] if counts else ""
