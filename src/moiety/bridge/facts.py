"""What can be asked of a structure, and what is true of it: facts that code computes, in three classes.

A is known from the composition, B from who is bonded to whom, C from the geometry alone: partners of one composition
have different answers (data_recipes/isomers.py), so only C proves that a structure is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.formula import Formula
from rdkit import Chem, rdBase
from rdkit.Chem import rdMolDescriptors

from moiety.data.splits import place
from moiety.data.structure import Structure
from moiety.models.resampler_moiety import unit_counts
from moiety.models.vocabulary_moiety import ELEMENT_NAMES, FIRST_RESIDUE

ASKED_ELEMENTS = (1, 6, 7, 8, 9, 16, 17, 35)  # for which a molecule may be asked in vain
MOST = 12  # what is counted beyond it is not asked
YES, NO = "yes", "no"
GROUPS = {  # name with its article -> SMARTS
    "an alcohol": "[CX4][OX2H]",
    "an amine": "[NX3;H2,H1,H0;!$(NC=[O,S,N]);!$(N~[!#6;!#1])]",
    "a carbonyl group": "[CX3]=[OX1]",
    "a nitrile": "C#N",
    "an ether": "[OX2;!$(OC=O)]([#6])[#6]",
    "a triple bond": "*#*",
    "an amide": "[NX3][CX3]=[OX1]",
    "a carboxylic acid": "[CX3](=O)[OX2H]",
}


@dataclass(frozen=True)
class Fact:
    """A question about one structure, and its answer.

    Attributes:
        name: of the entry in questions.yaml.
        kind: A, B or C; T of what is asked of two structures, N for a number that a head says.
        answer: the words; of a number, the token at which a head says it.
        about: what stands in the braces of the question.
        choices: all answers that are possible; () where there are too many to list.
        value: of a number.
    """

    name: str
    kind: str
    answer: str
    about: Mapping[str, str]
    choices: tuple[str, ...] = ()
    value: float | None = None


def number_token(name: str) -> str:
    """That a number head speaks at."""
    return f"<num:{name}>"


WIDER = Fact("wider", "T", "", {}, ("the first", "the second"))  # asked of two conformers
CHOICES = {  # of class C
    "handedness": ("R", "S"),
    "double_bond": ("E", "Z"),
    "extent": ("extended", "compact"),
    "coordination": ("4", "6", "8"),
    "contact": ("touching", "apart"),
    "fold": ("helical", "not helical"),
}
MATTER = {"molecule": "a molecule", "complex": "a pair of molecules", "crystal": "a crystal", "protein": "a protein"}
NUMBERS = {  # what number heads say: their scale, by which they are learned, is about that of QM9
    "gap": {"mean": 6.8, "std": 1.3, "unit": "eV"},
    "dipole": {"mean": 2.7, "std": 1.5, "unit": "D"},
}
HANDED_FACTS = ("handedness",)  # have another answer in a mirror
ABSTAIN = "<abstain>"  # what is answered where a question does not fit
FITS = {  # domains of which a question makes sense; others may be asked anywhere
    **dict.fromkeys(("rings", "aromatic", "donors", "group", "gap", "dipole", "extent", "double_bond"), "molecule"),
    "handedness": "molecule",
    "coordination": "crystal",
    "contact": "complex",
    "fold": "protein",
}
COUNTED = {  # what is counted of a structure: answer -> of what (see `asked_counts`), least and most
    "elements": {str(count): (0, count, count) for count in range(1, 8)},
    "heaviest": {name: (-1, number, number) for number, name in enumerate(ELEMENT_NAMES, start=1)},
    **{
        f"contains {name}": {YES: (number, 1, 10**9), NO: (number, 0, 0)}
        for number, name in enumerate(ELEMENT_NAMES, start=1)
    },
    **{f"count {ELEMENT_NAMES[n - 1]}": {str(c): (n, c, c) for c in range(1, 10)} for n in ASKED_ELEMENTS},
}
COMPARED = {  # of two structures: which of them rather has an answer to a fact that heads decide of each
    WIDER.name: {"fact": "extent", "answer": "extended", "first": WIDER.choices[0], "last": WIDER.choices[1]},
}
DECIDED = {  # what heads learn to decide of it, and from which answers
    "rings": (*map(str, range(7)), ABSTAIN),
    "donors": (*map(str, range(6)), ABSTAIN),
    "aromatic": (YES, NO, ABSTAIN),
    **{f"group {name}": (YES, NO, ABSTAIN) for name in GROUPS},
    **{name: (*choices, ABSTAIN) for name, choices in CHOICES.items()},
    **{name: (number_token(name), ABSTAIN) for name in NUMBERS},
}
KEPT_BACK = 0.1  # of the combinations of a question and of elements: they are asked in tests alone


def facts_of(structure: Structure, rng: np.random.Generator) -> Iterator[Fact]:
    """Everything that can be asked of a structure; where a fact has many subjects (elements, groups), one is drawn."""
    yield from _of_composition(structure, rng)
    if (graph := _graph_of(structure)) is not None:
        yield from _of_bonds(graph, rng)
    if (fact := structure.groups.get("fact")) in CHOICES:
        yield Fact(fact, "C", structure.groups["answer"], {}, CHOICES[fact])
    yield from numbers_of(structure)


def numbers_of(structure: Structure) -> Iterator[Fact]:
    """What number heads learn of it."""
    for name in NUMBERS:
        if structure.source == "qm9" and name in structure.scalars:
            yield Fact(name, "N", number_token(name), {}, value=structure.scalars[name])


def decided_of(structure: Structure) -> Iterator[tuple[str, str]]:
    """Names in DECIDED, with the answers that are known; not those that are kept back."""
    rng = np.random.default_rng(0)
    asked = [fact for fact in facts_of(structure, rng) if fact.name in DECIDED and fact.kind != "N"]
    numbers = [Fact(name, "N", number_token(name), {}) for name in NUMBERS if FITS[name] == structure.domain]
    for fact in (*asked, *_every_group(structure), *numbers):
        if not is_kept_back(fact, structure):
            yield full_name(fact), fact.answer
    for name, answers in DECIDED.items():
        if ABSTAIN in answers and FITS[name.partition(" ")[0]] != structure.domain:
            yield name, ABSTAIN


def full_name(fact: Fact) -> str:
    """With the element or group that it is about."""
    return " ".join([fact.name, *fact.about.values()])


def _of_composition(structure: Structure, rng: np.random.Generator) -> Iterator[Fact]:
    yield Fact("matter", "A", MATTER[structure.domain], {}, tuple(MATTER.values()))
    types, counts = np.unique(structure.node_type, return_counts=True)
    if types.max() >= FIRST_RESIDUE:
        return
    yield Fact("elements", "A", str(len(types)), {})
    yield Fact("heaviest", "A", element(types.max()), {})
    there = bool(rng.random() < 0.5)
    missing = [number for number in ASKED_ELEMENTS if number not in types]
    asked = rng.choice(types) if there or not missing else rng.choice(missing)
    yield Fact("contains", "A", YES if asked in types else NO, {"element": element(asked)}, (YES, NO))
    if structure.domain == "molecule":
        few = [(number, count) for number, count in zip(types, counts, strict=True) if count <= MOST]
        if few:
            number, count = few[rng.integers(len(few))]
            yield Fact("count", "A", str(count), {"element": element(number)})


def _of_bonds(graph: Chem.Mol, rng: np.random.Generator) -> Iterator[Fact]:
    rings = graph.GetNumBonds() - graph.GetNumAtoms() + len(Chem.GetMolFrags(graph))  # RDKit's count has more for cages
    yield Fact("rings", "B", str(rings), {})
    aromatic = any(atom.GetIsAromatic() for atom in graph.GetAtoms())
    yield Fact("aromatic", "B", YES if aromatic else NO, {}, (YES, NO))
    yield Fact("donors", "B", str(rdMolDescriptors.CalcNumHBD(graph)), {})
    held = _held(graph)
    others = [name for name in GROUPS if name not in held]
    asked = held if held and (rng.random() < 0.5 or not others) else others
    name = asked[rng.integers(len(asked))]
    yield Fact("group", "B", YES if name in held else NO, {"group": name}, (YES, NO))


def groups_of(structure: Structure) -> list[Fact]:
    """Every functional group that a molecule has, as a fact."""
    return [fact for fact in _every_group(structure) if fact.answer == YES]


def _every_group(structure: Structure) -> list[Fact]:
    """Those that it has, and those that it has not."""
    if (graph := _graph_of(structure)) is None:
        return []
    held = _held(graph)
    return [Fact("group", "B", YES if name in held else NO, {"group": name}, (YES, NO)) for name in GROUPS]


def _held(graph: Chem.Mol) -> list[str]:
    return [name for name, pattern in _patterns().items() if graph.HasSubstructMatch(pattern)]


def element(number: int) -> str:
    """Its English name, in small letters."""
    return ELEMENT_NAMES[number - 1]


def _graph_of(structure: Structure) -> Chem.Mol | None:
    """Of a molecule whose SMILES is known."""
    return _graph(structure.text[0]) if structure.domain == "molecule" and structure.text else None


@lru_cache(maxsize=100_000)
def _graph(smiles: str) -> Chem.Mol | None:
    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles)


@lru_cache(maxsize=1)
def _patterns() -> dict[str, Chem.Mol]:
    return {name: Chem.MolFromSmarts(smarts) for name, smarts in GROUPS.items()}


def unfit(structure: Structure, rng: np.random.Generator) -> Fact:
    """A question that makes no sense of this structure."""
    names = [name for name, domain in FITS.items() if domain != structure.domain]
    name = names[rng.integers(len(names))]
    groups = list(GROUPS)
    return Fact(name, "X", ABSTAIN, {"group": groups[rng.integers(len(groups))]} if name == "group" else {})


def can_be_denied(fact: Fact) -> bool:
    """Whether there is another answer that is as easily said: a choice, or a count."""
    return len(fact.choices) > 1 or fact.answer.isdigit()


def denied(fact: Fact, rng: np.random.Generator) -> Fact:
    """The fact with an answer that is not true."""
    others = [choice for choice in fact.choices if choice != fact.answer]
    if not others:
        count = int(fact.answer)
        others = [str(other) for other in (count - 2, count - 1, count + 1, count + 2) if other >= 0]
    return replace(fact, answer=others[rng.integers(len(others))])


def is_kept_back(fact: Fact, structure: Structure) -> bool:
    """Whether this question of structures of these elements is for tests: who answers it has not seen the two together.

    Residues stand for no elements: of proteins nothing is kept back.
    """
    elements = np.unique(structure.node_type).tolist()
    if elements[-1] >= FIRST_RESIDUE:
        return False
    return place(f"{fact.name}:{sorted(fact.about.values())}:{elements}", "kept back") < KEPT_BACK


def formula(structure: Structure) -> str:
    """By Hill's order, of the whole structure or of a crystal's smallest unit."""
    whole = Formula.from_list([chemical_symbols[number] for number in structure.node_type])
    return (whole.reduce()[0] if structure.periodic else whole).format("hill")


def counted(structure: Structure) -> str:
    """Its atoms in words, of a crystal those of its reduced formula."""
    node_type = torch.from_numpy(structure.node_type)
    pbc = torch.tensor([[structure.periodic] * 3])
    counts = unit_counts(node_type, torch.zeros_like(node_type), pbc)[0].tolist()
    return ", ".join(f"{count} {element(number)}" for number, count in enumerate(counts) if count)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
