"""What is written about the structures of a micro-batch: captions, questions with answers, and prose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from moiety.bridge.facts import (
    ABSTAIN,
    WIDER,
    Fact,
    can_be_denied,
    denied,
    facts_of,
    formula,
    groups_of,
    is_kept_back,
    number_token,
    unfit,
)
from moiety.bridge.questions import in_a_sentence, phrases, question, statement, worn
from moiety.data.structure import Structure
from moiety.models.processing_bridge_moiety import PLACEHOLDER
from moiety.models.vocabulary_moiety import FIRST_RESIDUE

PROSE = "prose"  # source of what stands for a text without a structure
NAMED = "named"  # the entry of `Structure.groups` that says of which kind a structure's own text is: a name, or a
DESCRIBED = "description"
CAPTIONS, QUESTIONS, WORDS, NOTHING = "captions", "questions", "words", "nothing"
USUAL = (6, 7, 8)  # elements that one is taken for
UNPAIRED = (1, 7, 9, 15, 17, 35, 53)  # with bonds of an odd number: there is an even number of such atoms
PHRASES = 3  # in which what tells partners apart is said, of each structure
MOST_SAID, MOST_IN_CAPTIONS = 3, 8  # facts of a description, and of one that is to be found, besides that of class C


@dataclass(frozen=True)
class Row:
    """One row of text.

    Attributes:
        about: place in the batch of the structure that it is scored under.
        answer: what is learned.
        question: what it answers; "" where the answer stands by itself.
        read: places of the structures that stand before the question.
        right: the row that says the same of the right structure, of a row that does not; -1 else.
        number: what is measured where the answer is a number.
        fact: what is asked.
        is_caption: stands beside the structure that it is about, unread, to be found by it.
        is_statement: a caption that says nothing but the fact that tells the structure from its partners.
        is_spoiled: a caption of which one thing is not true of the structure.
        stated: facts that a caption states, true or not.
    """

    about: int
    answer: str
    question: str = ""
    read: tuple[int, ...] = ()
    right: int = -1
    number: tuple[str, float] | None = None
    fact: Fact | None = None
    is_caption: bool = False
    is_statement: bool = False
    is_spoiled: bool = False
    stated: tuple[Fact, ...] = ()


class Writer:
    """Rows of one kind of text for structures; the same random numbers, the same rows."""

    def __init__(
        self,
        text: str,
        split: str = "train",
        asked: int = 2,
        geometric: float = 0.3,
        numeric: float = 0.7,
        worn: float = 0.3,
        unfitting: float = 0.08,
        described: float = 0.1,
        stated: float = 0.7,
        told: float = 0.9,
        comparing: float = 0.3,
    ) -> None:
        """
        Args:
            text: captions | questions | words: questions in plain text, beside which no structure stands | nothing.
            split: whose sentences are used; combinations that are kept back are asked in others than "train" alone.
            asked: facts that each structure is asked for, in a row each: a few tokens of a structure among a hundred of
                a conversation are hardly looked at.
            geometric: chance that a structure with a fact of class C is asked for that.
            numeric: chance that one with numbers is asked for one of them.
            worn: share of the questions that some words fall out of.
            unfitting: chance of a question that makes no sense of it.
            described: share of the micro-batches in which descriptions are asked for.
            comparing: chance that two conformers are compared, besides what is asked of each.
            told: chance that in words alone a description stands before a question, from which it can be answered.
            stated: share of the micro-batches of partners whose captions say nothing but what tells them apart.
        """
        self.text, self.split, self.asked = text, split, asked
        self.geometric, self.numeric, self.worn = geometric, numeric, worn
        self.unfitting, self.described = unfitting, described
        self.stated, self.told, self.comparing = stated, told, comparing

    def __call__(self, structures: Sequence[Structure], rng: np.random.Generator) -> list[Row]:
        if self.text == NOTHING:
            return [Row(0, "")]  # one at least, for a language model that runs everywhere
        in_captions = self.text == CAPTIONS
        if in_captions and all("answer" in structure.groups for structure in structures) and rng.random() < self.stated:
            places = range(len(structures))
            return [statement_row(structures[place], place, rng) for place in places for _ in range(PHRASES)]
        describing = not in_captions and rng.random() < self.described  # long texts stand together, for little padding
        rows = []
        for place, structure in enumerate(structures):
            rows += self._of_one(place, structure, in_captions, describing, rng)
        if not in_captions and not describing:
            rows += [row for row in compared(structures, self.split, rng) if rng.random() < self.comparing]
        rows = [self._worn(row, rng) if rng.random() < self.worn else row for row in rows]
        if self.text == WORDS:
            return [self._in_words(row, structures, rng) for row in rows]
        return rows

    def _in_words(self, row: Row, structures: Sequence[Structure], rng: np.random.Generator) -> Row:
        """The row as plain text; before what is asked a description that says it may stand in the structure's place."""
        asked = row.question
        if row.fact is not None and rng.random() < self.told:
            asked = " ".join([*self._told(row, structures, rng), asked])
        return replace(row, question=asked, read=(), number=None)

    def _told(self, row: Row, structures: Sequence[Structure], rng: np.random.Generator) -> list[str]:
        """What stands for structures: sentences that answer the question."""
        said = []
        assert row.fact is not None
        for place in row.read:
            if len(row.read) > 1:
                sentence = statement_row(structures[place], place, rng).answer
            else:
                facts = self._told_of(structures[place], rng)
                if row.fact.kind in "ABC":
                    facts = [row.fact, *(fact for fact in facts if fact.name != row.fact.name)]
                sentence = in_a_sentence(phrases([facts[number] for number in rng.permutation(len(facts))], rng))
            said.append(sentence)
        return said

    def _worn(self, row: Row, rng: np.random.Generator) -> Row:
        if row.fact is None:
            return row
        kept = " ".join([*row.fact.about.values(), *row.fact.choices]).split()
        return replace(row, question=worn(row.question, kept, rng))

    def _of_one(
        self, place: int, structure: Structure, in_captions: bool, describing: bool, rng: np.random.Generator
    ) -> list[Row]:
        """The rows about one structure."""
        if structure.source == PROSE:
            return [Row(place, structure.text[0])]
        if kind := structure.groups.get(NAMED):
            return [self._named(place, structure, kind, in_captions, rng)]
        if in_captions:
            return caption_rows(structure, place, self._told_of(structure, rng, most=MOST_IN_CAPTIONS), rng)
        if describing:
            asked = question(Fact("caption", "", "", {}), self.split, rng)
            return [Row(place, self.described_as(structure, rng), asked, (place,))]
        if rng.random() < self.unfitting:
            return [unfit_row(structure, place, self.split, rng)]
        return [asking(fact, place, self.split, rng) for fact in self.drawn(structure, rng)]

    def _named(self, place: int, structure: Structure, kind: str, in_captions: bool, rng: np.random.Generator) -> Row:
        """By its own text."""
        text = structure.text[rng.integers(len(structure.text))]
        if in_captions:
            return Row(place, text, is_caption=True)
        asked = question(Fact("caption" if kind == DESCRIBED else "name", "", "", {}), self.split, rng)
        return Row(place, text, asked, (place,))

    def drawn(self, structure: Structure, rng: np.random.Generator) -> list[Fact]:
        """Facts that are asked, in any order."""
        allowed = self._allowed(structure, rng)
        order = [allowed[place] for place in rng.permutation(len(allowed))]
        telling = [
            next(fact for fact in order if fact.kind == kind)
            for kind, chance in (("C", self.geometric), ("N", self.numeric))
            if rng.random() < chance and any(fact.kind == kind for fact in order)
        ]
        others = [fact for fact in order if fact not in telling]
        chosen = [*telling, *sorted(others, key=lambda fact: fact.kind in "CN")][: self.asked]
        return [chosen[number] for number in rng.permutation(len(chosen))]

    def _allowed(self, structure: Structure, rng: np.random.Generator) -> list[Fact]:
        facts = list(facts_of(structure, rng))
        return [fact for fact in facts if self.split != "train" or not is_kept_back(fact, structure)] or facts[:1]

    def described_as(self, structure: Structure, rng: np.random.Generator) -> str:
        """What it is, its formula, the fact of class C where there is one, and a few others."""
        return after_formula(structure, phrases(self._told_of(structure, rng), rng))

    def _told_of(self, structure: Structure, rng: np.random.Generator, most: int = MOST_SAID) -> list[Fact]:
        what, *others = (fact for fact in facts_of(structure, rng) if fact.kind != "N")
        geometric = [fact for fact in others if fact.kind == "C"]
        more = [fact for fact in (*others, *groups_of(structure)) if fact.kind != "C"]
        chosen = [more[index] for index in rng.permutation(len(more))[: rng.integers(most + 1)]]
        return [what, *chosen, *geometric]


def in_full(structure: Structure, rng: np.random.Generator) -> str:
    """All that can be said of a structure."""
    facts = [fact for fact in facts_of(structure, rng) if fact.kind != "N" and fact.name != "group"]
    return after_formula(structure, phrases([*facts, *groups_of(structure)], rng))


def after_formula(structure: Structure, said: Sequence[str]) -> str:
    """The formula, where there is one, and phrases."""
    text = in_a_sentence(said)
    return text if structure.node_type.max() >= FIRST_RESIDUE else f"{formula(structure)}. {text}"


def caption_rows(structure: Structure, place: int, facts: Sequence[Fact], rng: np.random.Generator) -> list[Row]:
    """The facts in a caption, and in one of which a word, or the formula, is wrong (Yuksekgonul et al., 2210.01936).

    What is told apart from the captions of a micro-batch alone need not be known exactly.
    """
    said = phrases(facts, rng)
    right = Row(place, after_formula(structure, said), is_caption=True, stated=tuple(facts))
    changed = [number for number, fact in enumerate(facts) if can_be_denied(fact)]
    changed = changed[1:] or changed  # what it is, which comes first, is too easy
    if structure.node_type.max() < FIRST_RESIDUE and (not changed or rng.random() < 0.5):
        spoiled = after_formula(nearly(structure, rng), said)
    else:
        number = changed[rng.integers(len(changed))]
        facts = [denied(fact, rng) if n == number else fact for n, fact in enumerate(facts)]
        said[number] = statement(facts[number], rng)
        spoiled = after_formula(structure, said)
    return [right, replace(right, answer=spoiled, is_spoiled=True, stated=tuple(facts))]


def nearly(structure: Structure, rng: np.random.Generator) -> Structure:
    """With a composition that is easily taken for its own: another atom, or two hydrogens more or less."""
    types = structure.node_type
    hydrogens = np.flatnonzero(types == 1)
    if rng.random() < 0.5:
        types = (
            np.delete(types, hydrogens[:2]) if len(hydrogens) > 2 and rng.random() < 0.5 else np.append(types, (1, 1))
        )
    else:
        types = types.copy()
        changed = rng.integers(len(types))
        types[changed] = rng.choice([other for other in USUAL if other != types[changed]])
        if np.isin(types, UNPAIRED).sum() % 2 != np.isin(structure.node_type, UNPAIRED).sum() % 2:
            types = np.append(types, 1)
    return replace(structure, node_type=types)


def asking(fact: Fact, place: int, split: str, rng: np.random.Generator) -> Row:
    """The fact as a question about the structure at a place of the batch."""
    number = None if fact.value is None else (fact.name, fact.value)
    return Row(place, fact.answer, question(fact, split, rng), (place,), number=number, fact=fact)


def statement_row(structure: Structure, place: int, rng: np.random.Generator) -> Row:
    """What tells a structure from its partners, said alone."""
    geometric = tuple(fact for fact in facts_of(structure, rng) if fact.kind == "C")
    said = in_a_sentence(phrases(geometric, rng))
    return Row(place, said, is_caption=True, is_statement=True, stated=geometric)


def unfit_row(structure: Structure, place: int, split: str, rng: np.random.Generator) -> Row:
    """A question that makes no sense of the structure, and the answer that says so."""
    return asking(unfit(structure, rng), place, split, rng)


def compared(structures: Sequence[Structure], split: str, rng: np.random.Generator) -> list[Row]:
    """For two conformers that stand one after the other: which of them is more extended, in either order."""
    rows = []
    for place, (one, two) in enumerate(pairwise(structures)):
        if one.groups.get("fact") == "extent" and one.groups["pair"] == two.groups.get("pair"):
            read = (place, place + 1) if rng.random() < 0.5 else (place + 1, place)
            answer = WIDER.choices[structures[read[0]].groups["answer"] != "extended"]
            rows.append(Row(place, answer, question(WIDER, split, rng), read, fact=replace(WIDER, answer=answer)))
    return rows


def with_wrong_ones(rows: Sequence[Row], structures: Sequence[Structure]) -> list[Row]:
    """The rows, and those about geometry again with a partner of another answer in the place of the structure."""
    answers = {place: structure.groups.get("answer") for place, structure in enumerate(structures)}
    partners: dict[str, list[int]] = {}
    for place, structure in enumerate(structures):
        if "pair" in structure.groups:
            partners.setdefault(structure.groups["pair"], []).append(place)
    wrong = []
    for number, row in enumerate(rows):
        if row.fact and row.fact.kind == "C":
            pair = partners[structures[row.about].groups["pair"]]
            others = [place for place in pair if answers[place] not in (None, row.answer)]
            wrong += [replace(row, read=(other,), right=number) for other in others[:1]]
    return [*rows, *wrong]


def special_tokens(numbers: Sequence[str]) -> list[str]:
    """What the bridge adds to a tokenizer."""
    return [PLACEHOLDER, ABSTAIN, *(number_token(name) for name in numbers)]
