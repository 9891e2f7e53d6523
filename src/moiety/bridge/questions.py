"""Questions in words: every fact can be asked in dozens of ways, and those of the test are none of the training's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moiety.bridge.facts import Fact, capitalised

FILE = Path(__file__).with_name("questions.yaml")
SPLITS = ("train", "val", "test")
SAY = "say"
FALLEN = 0.15  # of the words of a worn question


@lru_cache(maxsize=1)
def sentences() -> dict[str, dict[str, list[str]]]:
    """Fact -> split -> its sentences; none stands in two splits, and the later ones keep it."""
    found: dict[str, dict[str, list[str]]] = {}
    for fact, entry in _frames().items():
        own: dict[str, list[str]] = {}
        taken: set[str] = set()
        for split in reversed(SPLITS):
            said = {sentence.lower(): sentence for sentence in _all_of(entry[split])}
            own[split] = [sentence for key, sentence in said.items() if key not in taken]
            taken |= said.keys()
        found[fact] = own
    return found


@lru_cache(maxsize=1)
def statements() -> dict[tuple[str, str], list[str]]:
    """(fact, answer) -> the phrases that say it; the answer "" stands for any, which goes where {answer} is."""
    said = {}
    for fact, entry in _frames().items():
        say = entry.get(SAY, [])
        for answer, frames in say.items() if isinstance(say, dict) else [("", say)]:
            said[fact, answer] = _all_of(frames)
    return said


def question(fact: Fact, split: str, rng: np.random.Generator) -> str:
    """What is asked of a fact, in one of the ways of a split."""
    known = sentences()[fact.name][split]
    return known[rng.integers(len(known))].format(**fact.about)


def worn(text: str, kept: Sequence[str], rng: np.random.Generator) -> str:
    """A question that some words, not all, have fallen out of, none of them from `kept`: no word is to be relied on."""
    words = text.split()
    stays = rng.random(len(words)) >= FALLEN
    left = [word for word, there in zip(words, stays, strict=True) if there or word.strip("?.,:()") in kept]
    return " ".join(left) or text


def statement(fact: Fact, rng: np.random.Generator) -> str:
    """A phrase that says the fact."""
    known = statements().get((fact.name, fact.answer)) or statements()[fact.name, ""]
    return known[rng.integers(len(known))].format(**fact.about, answer=fact.answer)


def phrases(facts: Sequence[Fact], rng: np.random.Generator) -> list[str]:
    """One for each fact."""
    return [statement(fact, rng) for fact in facts]


def in_a_sentence(said: Sequence[str]) -> str:
    """Phrases, one after the other."""
    return capitalised("; ".join(said)) + "."


def expanded(frame: str) -> list[str]:
    """All sentences of a frame: "[a|b|] c" is "a c", "b c" and "c"."""
    pieces = re.split(r"\[([^\]]*)\]", frame)  # every second one is a list of alternatives
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return [re.sub(r" ([?.,:])", r"\1", " ".join("".join(words).split())) for words in product(*choices)]


def _all_of(frames: Sequence[str]) -> list[str]:
    return [sentence for frame in frames for sentence in expanded(frame)]


@lru_cache(maxsize=1)
def _frames() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())
