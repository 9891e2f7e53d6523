"""One trained bridge, asked everything, and the controls that take no training: what benchmarks/bridge.py tabulates."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asked.by_hand import hand_written
from asked.probes import deletion, invariance, perplexities, retrieval, strangers
from peers.crew import ROOT

from moiety.bridge.controls import copied, headed, majority, probed, shuffled, tower_features
from moiety.bridge.dialogue import Asking
from moiety.bridge.evaluate import Exam, accuracies, expected_calibration_error, number_errors, set_exam
from moiety.bridge.export import load_bridge
from moiety.bridge.facts import is_kept_back, numbers_of
from moiety.bridge.reading import Said, answers, in_units, readings
from moiety.bridge.rows import QUESTIONS, Writer
from moiety.bridge.stages import SEEN, STRING
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.training.files import write_json

CORPORA = ROOT / "corpora/full"
ASKED = {"isomers": 2000, "qm9": 600, "crystals": 300}  # structures of each test split
LEARNED = {"isomers": 12000, "qm9": 3000, "crystals": 1000}  # of each train split, for controls that need no training
NUMBERED = 20_000  # structures with numbers, as many as the stages read
PROBED = {"isomers": 400, "qm9": 200, "crystals": 100}
POOL = {"isomers": 1100, "qm9": 9000, "crystals": 400}
MOST = 150  # questions of a fact
NINETY = 1.6449
COMBINATIONS = {False: "", True: ", combinations kept back"}
Shares = dict[str, tuple[float, tuple[float, float], int]]  # class, or class:fact -> share, interval, number


@dataclass
class Findings:
    """Condition -> shares of right answers; and what else was measured."""

    shares: dict[str, Shares] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


def examine(folder: Path, sees: str, controls: bool, language: Path) -> Findings:
    """Asks the bridge of a folder; with `controls` also what needs it, but no training. Remembers what it found."""
    path = folder / "findings.json"
    if path.exists():
        return Findings(**json.loads(path.read_text()))
    torch.set_num_threads(1)
    model, processor = load_bridge(folder / "calibrate/export")
    model.eval()
    asking = Asking(processor, model.config.numbers, Writer(QUESTIONS), see=SEEN[sees], string=sees == STRING)
    structures = some("test", ASKED)
    found = Findings()
    for name, words in (("in the words of training", "train"), ("in other words", "test")):
        exam = set_exam(structures, words, MOST)
        said = answers(model, asking, exam.structures, exam.rows)
        known = [number for number in range(len(exam.rows)) if not exam.kept_back[number]]
        found.shares[name] = shares_of(exam, said, known)
        if words == "train":
            back = [number for number in range(len(exam.rows)) if exam.kept_back[number]]
            found.shares["combinations kept back"] = shares_of(exam, said, back)
            measure(found, model, exam, said)
            if controls:
                without_training(found, model, asking, exam)
                beside_numbers(found, model, exam)
                beside_answers(found, model, processor, asking, language)
    by_hand = hand_written()
    said = answers(model, asking, by_hand.structures, by_hand.rows)
    found.shares["written by hand"] = shares_of(by_hand, said, range(len(said)))
    write_json(path, asdict(found))
    return found


def some(split: str, counts: dict[str, int]) -> list[Structure]:
    """The first structures of the corpora's splits, whole; partners stand together."""
    found = []
    for name, count in counts.items():
        corpus = Corpus.open(CORPORA / name, split=split)
        found += corpus.read(range(min(count, len(corpus))), whole=True)
    return found


def shares_of(exam: Exam, said: Sequence[Said], chosen: Sequence[int]) -> Shares:
    places = set(chosen)
    return accuracies(exam.of(lambda number, _: number in places), [said[number] for number in sorted(places)])


def measure(found: Findings, model: Any, exam: Exam, said: Sequence[Said]) -> None:
    """Calibration of answers; numbers, the training mean where none is said; and intervals, of all structures."""
    found.numbers["ECE"] = expected_calibration_error(exam, said)
    scales = model.config.numbers
    means = [scale["mean"] for scale in scales.values()]
    for back, label in COMBINATIONS.items():
        part = exam.of(lambda number, _, back=back: exam.kept_back[number] == back)
        chosen = [one for one, is_back in zip(said, exam.kept_back, strict=True) if is_back == back]
        for name, errors in number_errors(part, chosen, list(scales), means).items():
            found.numbers[f"{name} MAE{label}"] = float(errors[:, 0].mean())
    numbered = [one for one in exam.structures if any(numbers_of(one))]
    covered: dict[str, list[bool]] = defaultdict(list)
    for places, output in readings(model, numbered):
        values, sigmas = in_units(model, output)
        for row, place in enumerate(places):
            for fact in numbers_of(numbered[place]):
                number = list(scales).index(fact.name)
                label = COMBINATIONS[is_kept_back(fact, numbered[place])]
                covered[f"{fact.name} in 90 %{label}"].append(
                    bool(abs(values[row, number] - fact.value) <= NINETY * sigmas[row, number])
                )
    found.numbers |= {name: float(np.mean(inside)) for name, inside in covered.items()}


def without_training(found: Findings, model: Any, asking: Asking, exam: Exam) -> None:
    """Majority, copies, probes, and the bridge with other structures in the place of the right ones."""
    learned = set_exam(some("train", LEARNED), "train", 10**9)
    known, asked = (tower_features(model, one.structures) for one in (learned, exam))
    everything = range(len(exam.rows))
    found.shares["majority"] = shares_of(exam, majority(learned.rows, exam), everything)
    found.shares["nearest neighbour"] = shares_of(exam, copied(learned.rows, known, exam, asked), everything)
    found.shares["encoder + probe"] = shares_of(exam, probed(learned.rows, known, exam, asked), everything)
    for name, same in (("shuffled, same composition", True), ("shuffled, same domain", False)):
        other = shuffled(exam, same)
        said = answers(model, asking, other.structures, other.rows)
        found.shares[name] = shares_of(other, said, range(len(other.rows)))


def beside_numbers(found: Findings, model: Any, exam: Exam) -> None:
    """What a head on the same tower says of the same numbers, from the same structures: mean absolute errors."""
    corpus = Corpus.open(CORPORA / "qm9", split="train")
    learned = corpus.read(range(min(NUMBERED, len(corpus))), whole=True)
    known, asked = tower_features(model, learned), tower_features(model, exam.structures)
    for name in model.config.numbers:
        facts = [next(fact for fact in numbers_of(one) if fact.name == name) for one in learned]
        told = [
            place for place, (fact, one) in enumerate(zip(facts, learned, strict=True)) if not is_kept_back(fact, one)
        ]
        said = headed(known[told], np.array([facts[place].value for place in told]), asked)
        for back, label in COMBINATIONS.items():
            rows = [row for row, is_back in zip(exam.rows, exam.kept_back, strict=True) if is_back == back]
            errors = [abs(said[row.about] - row.number[1]) for row in rows if row.number and row.number[0] == name]
            if errors:
                found.numbers[f"{name} MAE{label}, encoder head"] = float(np.mean(errors))


def beside_answers(found: Findings, model: Any, processor: Any, asking: Asking, language: Path) -> None:
    """Invariance, strangers, what answers rest on, retrieval, plain English."""
    structures = some("test", PROBED)
    measured = {
        "same answer under": invariance(model, asking, structures),
        "AUROC of": strangers(model, asking, structures),
        "log probability lost without nodes of weight": deletion(model, processor, asking, structures),
        "retrieval,": retrieval(model, processor, some("test", POOL)),
        "perplexity of English,": perplexities(model, processor, language, CORPORA / "english"),
    }
    for group, values in measured.items():
        found.numbers |= {f"{group} {name}": value for name, value in values.items()}
