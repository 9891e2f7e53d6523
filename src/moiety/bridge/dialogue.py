"""Micro-batches of structures with rows of text: what is said of them, or asked and answered."""
# Shapes: B structures, R rows, T text tokens, L of them whose next one is learned, A places where a structure stands.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.bridge.facts import counted, decided_of, full_name, is_kept_back, numbers_of
from moiety.bridge.rows import Row, with_wrong_ones
from moiety.data.leak.proteins import sequence
from moiety.data.structure import Structure
from moiety.models.processing_bridge_moiety import (
    PLACEHOLDER,
    MoietyBridgeProcessor,
    with_placeholders,
)
from moiety.models.resampler_moiety import query_counts
from moiety.models.vocabulary_moiety import FIRST_RESIDUE
from moiety.tokens.batch import Batch, collate

UNSCORED = -100
Write = Callable[[Sequence[Structure], np.random.Generator], list[Row]]
See = Callable[[Structure], Structure]


@dataclass(frozen=True)
class Dialogue(Batch):
    """A batch with rows of text, padded on the left.

    `targets` has "answer" [R,L], the next token or UNSCORED; "about" [R], the structure that a row is scored under;
    "right" [R], the row that a wrong one is held against, -1 of right ones; "caption" [R], of rows that are matched,
    not said; "statement" [R], of captions of one fact alone; "spoiled" [R], of captions that are not true; "group" [B],
    the same for partners, -1 where there are none; "numbers" [B,P], in standard units, NaN where none is known;
    "facts" [B,F], the place of the answer to each fact, UNSCORED where none is known; "pointed" [R,L], 1 + the
    place of the fact that a token of an answer says, 0 of other tokens, UNSCORED of what is no answer to a question;
    "stated" [R,F], the place of the answer that a caption states to each fact, UNSCORED where it is silent.
    """

    input_ids: Tensor | None = None  # [R, T]
    attention_mask: Tensor | None = None  # [R, T]
    num_queries: Tensor | None = None  # [B]
    structure_order: Tensor | None = None  # [A] structure
    logits_to_keep: Tensor | None = None  # [L] places


class Asking:
    """Makes a Dialogue of structures; the n-th micro-batch of a run is asked the same whatever rank makes it."""

    def __init__(
        self, processor: MoietyBridgeProcessor, numbers: dict[str, Any], write: Write, contrast: bool = False,
        mirrored: bool = False, see: See | None = None, string: bool = False,
        facts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            processor: of the model.
            numbers: MoietyBridgeConfig.numbers.
            write: rows for structures.
            contrast: add rows with a partner of another answer in the place of the structure.
            mirrored: half of what is not asked for its hand is shown in a mirror.
            see: what the model sees of a structure, where that is not all of it.
            string: composition and SMILES stand before the question, and no structure.
            facts: MoietyBridgeConfig.facts, where they are learned.
        """
        self._processor, self._numbers, self._write = processor, numbers, write
        self._contrast, self._mirrored, self._see, self._string = contrast, mirrored, see, string
        self._facts = facts or {}

    def __call__(self, structures: Sequence[Structure], rng: torch.Generator) -> Dialogue:
        numpy_rng = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
        rows = self._write(structures, numpy_rng)
        if self._contrast:
            rows = with_wrong_ones(rows, structures)
        shown = list(structures)
        if self._mirrored:
            hands = {row.about for row in rows if row.fact and row.fact.name == "handedness"}
            hands |= {place for place, s in enumerate(structures) if s.groups.get("fact") == "handedness"}
            flipped = numpy_rng.random(len(shown)) < 0.5
            shown = [in_mirror(s) if flipped[p] and p not in hands else s for p, s in enumerate(shown)]
        groups = [structure.groups.get("pair") for structure in structures]
        return self.dialogue(shown, rows, groups)

    def shown(self, structures: Sequence[Structure]) -> Batch:
        """What the model sees of structures, packed."""
        return packed([self._see(structure) for structure in structures] if self._see else structures)

    @property
    def tokenizer(self) -> Any:
        return self._processor.tokenizer

    def dialogue(
        self, structures: Sequence[Structure], rows: Sequence[Row], groups: Sequence[str | None] = ()
    ) -> Dialogue:
        """The batch of these rows about these structures; partners are those of one group."""
        if self._string:
            rows = [in_a_string(row, structures) for row in rows]
        batch = self.shown(structures)
        queries = query_counts(batch.node_type, batch.graph_index, batch.pbc, self._processor.nodes_per_query)
        order = [place for row in rows for place in row.read]
        pieces = [self._pieces(row) for row in rows]
        first = with_placeholders([own[0] for own in pieces], queries[order].tolist())
        ids, there, answer = self._tokens([[start, *own[1:]] for start, own in zip(first, pieces, strict=True)])
        longest, kept = ids.shape[1], answer.shape[1]
        seen = set(order)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        group = torch.tensor([numbers[name] if name else -1 for name in groups] or [-1] * len(structures))
        values: dict[str, Any] = vars(batch) | {
            "targets": batch.targets
            | self._targets(rows, answer)
            | {"group": group, "numbers": self._known(structures), "facts": self._decided(structures)}
        }
        return Dialogue(
            **values,
            input_ids=ids,
            attention_mask=there,
            num_queries=torch.tensor([n if place in seen else 0 for place, n in enumerate(queries.tolist())]),
            structure_order=torch.tensor(order, dtype=torch.long),
            logits_to_keep=torch.arange(longest - kept, longest),
        )

    def _pieces(self, row: Row) -> list[str]:
        """What is given and what is learned of a row, in the words of the chat template."""
        tokenizer = self._processor.tokenizer
        if not row.question:
            return ["", f"{tokenizer.bos_token}{row.answer}{tokenizer.eos_token}"]
        asked = " ".join([PLACEHOLDER] * len(row.read) + [row.question])
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": row.answer}]
        given = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        if not whole.startswith(given):
            raise ValueError("the chat template writes a question otherwise once it is answered")
        return [given, whole[len(given) :]]

    def _tokens(self, rows: Sequence[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """[R,T] tokens and mask, padded on the left, and [R,L] what is learned after the last L of them.

        Args:
            rows: two pieces each, of which the second one is learned.
        """
        tokenizer = self._processor.tokenizer
        tokens = iter(tokenizer([piece for own in rows for piece in own], add_special_tokens=False)["input_ids"])
        found = []
        for own in rows:
            parts = [(token, bool(n % 2)) for n in range(len(own)) for token in next(tokens)]
            following = [token if learned else UNSCORED for token, learned in parts[1:]] + [UNSCORED]
            found.append((torch.tensor([token for token, _ in parts]), torch.tensor(following)))
        longest = max(len(own) for own, _ in found)
        kept = max(len(own) - int((following != UNSCORED).int().argmax()) for own, following in found)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        there = torch.zeros(len(rows), longest, dtype=torch.long)
        answer = torch.full((len(rows), longest), UNSCORED)
        for number, (own, following) in enumerate(found):
            ids[number, longest - len(own) :], there[number, longest - len(own) :] = own, 1
            answer[number, longest - len(own) :] = following
        return ids, there, answer[:, longest - kept :]

    def _known(self, structures: Sequence[Structure]) -> Tensor:
        """[B,P] numbers that may be learned, in standard units."""
        known = torch.full((len(structures), len(self._numbers)), torch.nan)
        for place, structure in enumerate(structures):
            for fact in numbers_of(structure):
                if fact.value is not None and not is_kept_back(fact, structure):
                    scale = self._numbers[fact.name]
                    known[place, list(self._numbers).index(fact.name)] = (fact.value - scale["mean"]) / scale["std"]
        return known

    def _decided(self, structures: Sequence[Structure]) -> Tensor:
        """[B,F] places of the answers of facts."""
        return self._places([decided_of(structure) for structure in structures])

    def _places(self, told: Sequence[Iterable[tuple[str, str]]]) -> Tensor:
        """[n,F] of answers that are told to facts, by name."""
        places = torch.full((len(told), len(self._facts)), UNSCORED)
        names = {name: number for number, name in enumerate(self._facts)}
        for place, answers in enumerate(told if names else ()):
            for name, answer in answers:
                if answer in self._facts.get(name, ()):
                    places[place, names[name]] = list(self._facts[name]).index(answer)
        return places

    def _pointed(self, rows: Sequence[Row], answer: Tensor) -> Tensor:
        asked = torch.tensor([bool(row.fact and row.read) for row in rows]).unsqueeze(1)
        pointed = torch.where(asked & (answer != UNSCORED), 0, UNSCORED)
        for number, row in enumerate(rows):
            name = full_name(row.fact) if row.fact and row.read else ""
            if (token := self._facts.get(name, {}).get(row.answer)) is not None:
                pointed[number, (answer[number] == token).int().argmax()] = 1 + list(self._facts).index(name)
        return pointed

    def _targets(self, rows: Sequence[Row], answer: Tensor) -> dict[str, Tensor]:
        return {
            "answer": answer,
            "about": torch.tensor([row.about for row in rows]),
            "pointed": self._pointed(rows, answer),
            "stated": self._places([[(full_name(fact), fact.answer) for fact in row.stated] for row in rows]),
            "right": torch.tensor([row.right for row in rows]),
            "caption": torch.tensor([row.is_caption for row in rows]),
            "statement": torch.tensor([row.is_statement for row in rows]),
            "spoiled": torch.tensor([row.is_spoiled for row in rows]),
        }


def in_a_string(row: Row, structures: Sequence[Structure]) -> Row:
    """The row with what text says of its structures in their place."""
    if not row.read:
        return row
    strings = "; ".join(string_of(structures[place]) for place in row.read)
    return replace(row, question=f"{strings}: {row.question}", read=())


def string_of(structure: Structure) -> str:
    """Composition and SMILES without stereo, or the sequence: what a text can say of it."""
    if structure.node_type.max() >= FIRST_RESIDUE:
        return sequence(structure)
    return " ".join([f"({counted(structure)})", *structure.text[:1]])


def packed(structures: Sequence[Structure]) -> Batch:
    """A batch without edges; a pair of molecules is told to be a molecule, since no file says that it holds two."""
    told = [replace(one, domain="molecule") if one.domain == "complex" else one for one in structures]
    return collate(told)


def in_mirror(structure: Structure) -> Structure:
    """Its mirror image."""
    flip = np.array([-1, 1, 1])
    return replace(
        structure,
        positions=structure.positions * flip,
        cell=None if structure.cell is None else structure.cell * flip,
        node_vectors=None if structure.node_vectors is None else structure.node_vectors * flip,
    )
