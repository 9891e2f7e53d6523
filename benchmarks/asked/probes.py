"""What else is measured of a bridge: invariance, strangers, what answers rest on, retrieval, and its plain English."""
# Shapes: S structures, N nodes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from moiety.bridge.dialogue import Asking, in_mirror
from moiety.bridge.evaluate import is_right, set_exam
from moiety.bridge.facts import ABSTAIN
from moiety.bridge.objectives import log_likelihood
from moiety.bridge.reading import answers, dialogue_of, readings
from moiety.bridge.retrieval import composition, fits, formula_in, structure_vectors, text_vectors
from moiety.bridge.rows import Row, Writer, asking, in_full, unfit_row
from moiety.bridge.sources import LETTERS, joined
from moiety.data.structure import Structure
from moiety.data.texts import TextCorpus
from moiety.models.asking_moiety import Words

TURNED = 200  # structures whose answers are compared
STRANGERS = 300  # structures of each kind
HEAVIEST = 104  # elements up to lawrencium
EXPLODED, JITTER = 2.0, 1.0  # factor, and Å
DELETED = 0.2  # share of the nodes
EXPLAINED = 100
PIECES = 200
CROWD = 10  # structures of one formula


def invariance(model: Any, asker: Asking, structures: Sequence[Structure]) -> dict[str, float]:
    """Change -> share of answers that stay the same, to the letter; a question of the hand is not asked in a mirror."""
    rng = np.random.default_rng(0)
    exam = set_exam(structures, "test", TURNED)
    single = [row for row in exam.rows if len(row.read) == 1]
    rows = [single[place] for place in rng.permutation(len(single))[:TURNED]]
    said = [one.answer for one in answers(model, asker, structures, rows)]
    same: dict[str, list[bool]] = {}
    for name, change in CHANGES.items():
        kept = [n for n, row in enumerate(rows) if applies(name, structures[row.about], row)]
        changed = [change(structures[rows[n].about], rng) for n in kept]
        moved = [replace(rows[n], about=place, read=(place,)) for place, n in enumerate(kept)]
        same[name] = [one.answer == said[n] for n, one in zip(kept, answers(model, asker, changed, moved), strict=True)]
    return {name: float(np.mean(values)) for name, values in same.items() if values}


def applies(name: str, structure: Structure, row: Row) -> bool:
    """Whether a change leaves the right answer what it is."""
    assert row.fact is not None
    if name == "reflection":
        return row.fact.name != "handedness" and structure.domain != "protein"
    return structure.periodic if name == "supercell" else True


def turned(structure: Structure, rng: np.random.Generator) -> Structure:
    rotation = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix().T
    return _mapped(structure, rotation)


def _mapped(structure: Structure, matrix: np.ndarray) -> Structure:
    return replace(
        structure,
        positions=structure.positions @ matrix,
        cell=None if structure.cell is None else structure.cell @ matrix,
        node_vectors=None if structure.node_vectors is None else structure.node_vectors @ matrix,
    )


def translated(structure: Structure, rng: np.random.Generator) -> Structure:
    return replace(structure, positions=structure.positions + rng.normal(0, 5, 3))


def renumbered(structure: Structure, rng: np.random.Generator) -> Structure:
    order = rng.permutation(structure.num_nodes)
    return replace(
        structure,
        node_type=structure.node_type[order],
        positions=structure.positions[order],
        node_vectors=None if structure.node_vectors is None else structure.node_vectors[order],
        role=None if structure.role is None else structure.role[order],
    )


def doubled(structure: Structure, rng: np.random.Generator) -> Structure:
    """Twice as long along one vector of the cell."""
    assert structure.cell is not None
    axis = int(rng.integers(3))
    shift = np.zeros(3)
    shift[axis] = 1
    cell = structure.cell.copy()
    cell[axis] *= 2
    return replace(
        structure,
        node_type=np.tile(structure.node_type, 2),
        positions=np.concatenate([structure.positions, structure.positions + shift @ structure.cell]),
        cell=cell,
        role=None,
        node_vectors=None,
    )


CHANGES = {
    "rotation": turned,
    "reflection": lambda structure, rng: in_mirror(structure),
    "translation": translated,
    "permutation": renumbered,
    "supercell": doubled,
}


def strangers(model: Any, asker: Asking, structures: Sequence[Structure]) -> dict[str, float]:
    """Kind of stranger -> how well strangeness, or the token of abstention, tells it from what is known (AUROC)."""
    rng = np.random.default_rng(0)
    known = [structures[place] for place in rng.permutation(len(structures))[:STRANGERS]]
    usual = scores(model, known)
    found = {}
    unseen = partial(with_unseen, elements=1 + np.flatnonzero(model.calibration.seen.numpy()[1:HEAVIEST] == 0))
    for name, change in (("exploded", exploded), ("unseen elements", unseen), ("shuffled types", shuffled_types)):
        other = scores(model, [change(one, rng) for one in known if one.domain != "protein"])
        found[name] = float(roc_auc_score(np.r_[np.zeros(len(usual)), np.ones(len(other))], np.r_[usual, other]))
    writer = Writer("questions")
    fitting = [asking(writer.drawn(one, rng)[0], place, "test", rng) for place, one in enumerate(known)]
    unfit = [unfit_row(one, place, "test", rng) for place, one in enumerate(known)]
    shares = np.concatenate([abstention(model, asker, known, rows) for rows in (fitting, unfit)])
    found["unfitting question"] = float(roc_auc_score(np.r_[np.zeros(len(fitting)), np.ones(len(unfit))], shares))
    return found


@torch.no_grad()
def scores(model: Any, structures: Sequence[Structure]) -> np.ndarray:
    """[S] distance from what was learned from; unseen types of nodes are beyond all."""
    found = np.zeros(len(structures))
    for places, output in readings(model, structures):
        found[places] = model.calibration.distance_of(output.structure_features).numpy()
    seen = model.calibration.seen.numpy()
    strange = np.array([bool((seen[structure.node_type] == 0).any()) for structure in structures])
    return np.where(strange, np.inf, found).clip(max=1e6)


def exploded(structure: Structure, rng: np.random.Generator) -> Structure:
    """Drawn apart, and every node displaced."""
    noise = rng.normal(0, JITTER, structure.positions.shape)
    return replace(
        structure,
        positions=EXPLODED * structure.positions + noise,
        cell=None if structure.cell is None else EXPLODED * structure.cell,
    )


def with_unseen(structure: Structure, rng: np.random.Generator, elements: np.ndarray) -> Structure:
    """One node becomes one of these elements."""
    types = structure.node_type.copy()
    types[rng.integers(len(types))] = rng.choice(elements)
    return replace(structure, node_type=types)


def shuffled_types(structure: Structure, rng: np.random.Generator) -> Structure:
    """The right nodes in the wrong places."""
    return replace(structure, node_type=rng.permutation(structure.node_type))


@torch.no_grad()
def abstention(model: Any, asker: Asking, structures: Sequence[Structure], rows: Sequence[Row]) -> np.ndarray:
    """Probability of the answer that the question does not fit."""
    found = []
    declined = [replace(row, answer=ABSTAIN, number=None) for row in rows]
    for start in range(0, len(rows), 64):
        batch = dialogue_of(declined[start : start + 64], structures, asker, model.config.cutoff)
        found.append(log_likelihood(model(**batch.inputs()).logits, batch.targets["answer"]).exp().numpy())
    return np.concatenate(found)


def deletion(model: Any, processor: Any, asker: Asking, structures: Sequence[Structure]) -> dict[str, float]:
    """How much less likely right answers become without the nodes they rest on most, least, and without random ones."""
    rng = np.random.default_rng(0)
    exam = set_exam(structures, "test", 60)
    said = answers(model, asker, structures, exam.rows)
    right = [row for row, one in zip(exam.rows, said, strict=True) if is_right(one, row) and row.fact.kind in "BC"]  # type: ignore[union-attr]
    lost: dict[str, list[float]] = {"most": [], "random": [], "least": []}
    for row in right[:EXPLAINED]:
        structure = structures[row.about]
        weights = np.array(
            model.ask(processor, structure, row.question, choices=(row.answer,), explain=True).node_weights
        )
        size = max(1, round(DELETED * len(weights)))
        order = np.argsort(-weights)
        chosen = {"most": order[:size], "least": order[-size:], "random": rng.permutation(len(weights))[:size]}
        whole = answer_log(model, processor, structure, row, np.zeros(0, dtype=int))
        for name, nodes in chosen.items():
            lost[name].append(whole - answer_log(model, processor, structure, row, nodes))
    return {name: float(np.mean(values)) for name, values in lost.items()}


@torch.no_grad()
def answer_log(model: Any, processor: Any, structure: Structure, row: Row, without: np.ndarray) -> float:
    """Log probability of the right answer where the bridge does not read some nodes."""
    content = [{"type": "structure", "structure": structure}, {"type": "text", "text": row.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    words = Words(model, processor, inputs)
    kept = np.setdiff1d(np.arange(structure.num_nodes), without)
    left = {name: words.structures[name][kept] for name in ("node_type", "graph_index")}
    left["pbc"] = words.structures["pbc"]
    words.found = model.bridged(words.features[kept], words.structures["num_queries"], left)
    return float(words.log_probability(words.tokens(row.answer)))


def retrieval(model: Any, processor: Any, structures: Sequence[Structure], seed: int = 0) -> dict[str, float]:
    """Share of captions, and of structures, whose own stands first among all; beside who knows the formula alone.

    By vectors alone, and as `moiety search` does it, which compares only what may have the formula.
    """
    rng = np.random.default_rng(seed)
    texts = [in_full(structure, rng) for structure in structures]
    kinds = np.array([composition(structure) for structure in structures])
    _, owners, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    alike = counts[owners]
    vectors = structure_vectors(model, structures), text_vectors(model, processor.tokenizer, texts)
    said = np.array([formula_in(text) for text in texts])
    found = {"pool": float(len(structures)), "chance": 1 / len(structures)}
    ranks = {}
    for name, (of_queries, of_entries), (asked, formulas) in (
        ("text to structure", vectors[::-1], (said, kinds)),
        ("structure to text", vectors, (kinds, said)),
    ):
        ranks[f"{name}, vectors alone,"] = ranked(of_queries, of_entries, None)
        ranks[f"{name}, searched,"] = ranked(of_queries, of_entries, (asked, formulas))
    for among, chosen in (("", alike > 0), (f", of {CROWD} or more of one formula", alike >= CROWD)):
        found[f"formula only R@1{among}"] = float((1 / alike[chosen]).mean())
        for name, own in ranks.items():
            found |= {f"{name} R@{k}{among}": float((own[chosen] < k).mean()) for k in (1, 10)}
    return found


def ranked(queries: np.ndarray, entries: np.ndarray, formulas: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """How many entries match a query better than its own; with formulas of both, only of those that may have it."""
    ranks = np.zeros(len(queries), dtype=int)
    for place, query in enumerate(queries):
        product = entries @ query
        better = product > product[place]
        ranks[place] = (better if formulas is None else better & fits(formulas[0][place], formulas[1])).sum()
    return ranks


@torch.no_grad()
def perplexity(language: Any, tokenizer: Any, corpus: Path) -> float:
    """Of a word piece of held-out English."""
    texts = TextCorpus.open(corpus, split="val").table["text"].to_pylist()
    total, count = 0.0, 0
    for piece in joined(texts, LETTERS)[:PIECES]:
        ids = tokenizer(f"{tokenizer.bos_token}{piece}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = language(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return float(np.exp(total / count))


def perplexities(model: Any, processor: Any, language: Path, corpus: Path) -> dict[str, float]:
    """Before and after the bridge was trained, and their ratio."""
    before = perplexity(AutoModelForCausalLM.from_pretrained(language), processor.tokenizer, corpus)
    after = perplexity(model.language_model, processor.tokenizer, corpus)
    return {"before": before, "after": after, "ratio": after / before}
