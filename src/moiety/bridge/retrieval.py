"""Structures found by words, and words by structures: an index on disk of one space, with predicted properties.

Everything that is searched becomes a vector of the space that texts and structures share (faiss, exact). A formula is
no matter of likeness: where words name one, only structures that have it are compared. Numbers that heads say of the
structures are stored beside them, so that a search can ask for them.
"""
# Shapes: n entries, E channels of the space, P properties.

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from ase.formula import Formula

from moiety.bridge.facts import FITS, NUMBERS, formula
from moiety.bridge.reading import TOGETHER, in_units, readings
from moiety.data.shards import complete_or_absent
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import ELEMENT_ID, FIRST_RESIDUE

Array = np.ndarray
FORMULA = re.compile(r"(?:[A-Z][a-z]?\d*)+")
RESIDUES = "residues"
INDEX, ENTRIES, FACTS = "index.faiss", "entries.json", "facts.json"
CONDITION = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*(-?[\d.]+(?:e-?\d+)?)\s*([A-Za-z]*)\s*")
COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


@dataclass(frozen=True)
class Found:
    """An entry of an index, how well it matches, and what heads say of it: property -> (value, sigma)."""

    id: str
    score: float
    numbers: dict[str, tuple[float, float]]


class Index:
    """Vectors with names, on disk."""

    def __init__(
        self, vectors: Array, names: list[str], formulas: list[str], values: dict[str, Array], facts: dict[str, Any]
    ) -> None:
        """
        Args:
            vectors: [n,E].
            names: of the entries.
            formulas: of the entries; "" of a text that names none.
            values: property -> [n,2] value and sigma, NaN where it makes no sense.
            facts: what it was made from.
        """
        self.names, self.values, self.facts = names, values, facts
        self.formulas = np.array(formulas, dtype=str)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))  # type: ignore[call-arg]

    def __len__(self) -> int:
        return len(self.names)

    def search(self, query: Array, most: int, where: Sequence[Condition] = (), formula: str = "") -> list[Found]:
        """The best matches of a vector [E], of those that meet the conditions and have the formula, if any has it."""
        met, alike = self._meets(where), fits(formula, self.formulas)
        allowed = np.flatnonzero(met & alike if alike.any() else met)
        if not len(allowed):  # faiss refuses to look for none
            return []
        chosen = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))  # type: ignore[call-arg]
        scores, places = self._index.search(  # type: ignore[call-arg]
            query[None].astype(np.float32), min(most, len(allowed)), params=chosen
        )
        return [
            Found(self.names[place], float(score), {name: tuple(v[place].tolist()) for name, v in self.values.items()})
            for score, place in zip(scores[0], places[0], strict=True)
        ]

    def _meets(self, where: Sequence[Condition]) -> Array:
        met = np.ones(len(self), dtype=bool)
        for condition in where:
            if condition.name not in self.values:
                raise InputError(f"--where: no property {condition.name!r} here; {', '.join(self.values) or 'none'}")
            met &= COMPARE[condition.sign](self.values[condition.name][:, 0], condition.value)  # NaN meets nothing
        return met

    def save(self, folder: Path) -> None:
        with complete_or_absent(folder) as aside:
            faiss.write_index(self._index, str(aside / INDEX))
            values = {name: found.tolist() for name, found in self.values.items()}
            (aside / ENTRIES).write_text(
                json.dumps({"names": self.names, "formulas": self.formulas.tolist(), "values": values})
            )
            (aside / FACTS).write_text(json.dumps(self.facts))

    @classmethod
    def open(cls, folder: Path) -> Index:
        entries = json.loads((folder / ENTRIES).read_text())
        index = faiss.read_index(str(folder / INDEX))
        vectors = index.reconstruct_n(0, index.ntotal)
        values = {name: np.array(found) for name, found in entries["values"].items()}
        return cls(vectors, entries["names"], entries["formulas"], values, json.loads((folder / FACTS).read_text()))


@dataclass(frozen=True)
class Condition:
    """A property, <, <=, > or >=, and a number in the property's unit."""

    name: str
    sign: str
    value: float

    @classmethod
    def read(cls, text: str) -> list[Condition]:
        """Of "gap > 5 and dipole < 2 D".

        Raises:
            InputError: anything else, or another unit.
        """
        found = []
        for part in text.split(" and ") if text else ():
            match = CONDITION.fullmatch(part)
            if match is None:
                raise InputError(f'--where {text!r}: write, for example, "gap > 5 and dipole < 2"')
            name, sign, value, unit = match.groups()
            if unit and unit != NUMBERS.get(name, {}).get("unit"):
                raise InputError(f"--where {text!r}: {name} is in {NUMBERS.get(name, {}).get('unit')}")
            found.append(cls(name, sign, float(value)))
        return found


def index_structures(model: Any, structures: Sequence[Structure], facts: dict[str, Any]) -> Index:
    """Of structures: their embeddings, and what number heads say of those they make sense for."""
    vectors = np.zeros((len(structures), model.config.bridge_config.embedding_size), dtype=np.float32)
    values = {name: np.full((len(structures), 2), np.nan) for name in model.config.numbers}
    for places, output in readings(model, structures):
        vectors[places] = output.structure_embeds.numpy()
        said = np.stack(in_units(model, output), axis=-1)  # [S,P,2]
        for number, name in enumerate(values):
            fitting = np.array([structures[place].domain == FITS[name] for place in places])
            values[name][places[fitting]] = said[fitting, number]
    names, formulas = [structure.id for structure in structures], [composition(one) for one in structures]
    return Index(vectors, names, formulas, values, facts)


def index_texts(model: Any, tokenizer: Any, texts: Sequence[str], facts: dict[str, Any]) -> Index:
    """Of texts, under themselves as names."""
    formulas = [formula_in(text) for text in texts]
    return Index(text_vectors(model, tokenizer, texts), list(texts), formulas, {}, facts)


def composition(structure: Structure) -> str:
    """Its formula, or that it has none."""
    return RESIDUES if structure.node_type.max() >= FIRST_RESIDUE else formula(structure)


def formula_in(text: str) -> str:
    """The first formula among the words of a text, by Hill's order; "" if there is none.

    One has a number in it, or elements of which some have two letters: "NaCl" is one, "NO" and "In" are words.
    """
    for word in re.findall(r"[A-Za-z0-9]+", text):
        symbols = re.findall(r"[A-Z][a-z]?", word)
        if not FORMULA.fullmatch(word) or not all(symbol in ELEMENT_ID for symbol in symbols):
            continue
        if any(letter.isdigit() for letter in word) or (len(symbols) > 1 and not word.isupper()):
            return Formula(word).format("hill")
    return ""


def fits(wanted: str, formulas: Array) -> Array:
    """[n] bool, whether entries have a formula, or may have it."""
    return (formulas == wanted) | (formulas == "") | (wanted == "")


@torch.no_grad()
def text_vectors(model: Any, tokenizer: Any, texts: Sequence[str]) -> Array:
    """[n,E] unit vectors."""
    found = []
    for start in range(0, len(texts), TOGETHER):
        whole = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in texts[start : start + TOGETHER]]
        tokens = tokenizer(whole, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        found.append(torch.nn.functional.normalize(output.text_embeds, dim=-1).numpy())
    return np.concatenate(found)


@torch.no_grad()
def structure_vectors(model: Any, structures: Sequence[Structure]) -> Array:
    """[n,E] unit vectors."""
    vectors = np.zeros((len(structures), model.config.bridge_config.embedding_size), dtype=np.float32)
    for places, output in readings(model, structures):
        vectors[places] = output.structure_embeds.numpy()
    return vectors
