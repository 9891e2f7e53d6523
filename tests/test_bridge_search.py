"""Searches by words and by structures: formulas and predicted numbers are conditions, the rest is likeness."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from moiety.bridge.export import save_bridge
from moiety.bridge.facts import formula
from moiety.bridge.new import new_bridge
from moiety.bridge.retrieval import Condition, composition, formula_in
from moiety.bridge.searching import search
from moiety.data.shards import Corpus
from moiety.errors import InputError

ROOT = Path(__file__).parents[1]
CORPORA = ROOT / "tests/data/corpora"
ETHANOL = ROOT / "docs/examples/ethanol.xyz"
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge") / "export"
    save_bridge(*new_bridge(base, new_language=SMALL, bridge={"hidden_size": 32}), folder)
    return folder


@pytest.fixture(scope="module")
def qm9(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(CORPORA / "qm9", tmp_path_factory.mktemp("corpora") / "qm9"))


def test_a_corpus_is_indexed_once_and_searched_by_words(model: Path, qm9: Path) -> None:
    found = search("a molecule with a nitrile", qm9, model, most=5)
    scores = [one.score for one in found]
    assert len(found) == 5 and scores == sorted(scores, reverse=True)
    (made,) = (qm9 / ".searched").iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert search("a molecule with a nitrile", qm9, model, most=5) == found
    assert times == {path.name: path.stat().st_mtime_ns for path in made.iterdir()}


def test_a_formula_is_a_condition_unless_nothing_has_it(model: Path, qm9: Path) -> None:
    formulas = {structure.id: composition(structure) for structure in Corpus.open(qm9)}
    wanted = formulas[sorted(formulas)[0]]
    having = sorted(name for name, own in formulas.items() if own == wanted)
    found = search(f"{wanted}. A molecule.", qm9, model, most=len(formulas))
    assert sorted(one.id for one in found) == having
    assert len(search("U9Xe7. A molecule.", qm9, model, most=3)) == 3


def test_predicted_numbers_are_conditions(model: Path, qm9: Path) -> None:
    everything = search("a molecule", qm9, model, most=1000)
    gaps = [one.numbers["gap"][0] for one in everything]
    middle = float(np.median(gaps))
    found = search("a molecule", qm9, model, where=f"gap > {middle}", most=1000)
    assert len(found) == sum(gap > middle for gap in gaps)
    assert search("a molecule", qm9, model, where=f"gap > {max(gaps)}") == []
    with pytest.raises(InputError, match="no property"):
        search("a molecule", qm9, model, where="mass > 3")
    with pytest.raises(InputError, match="write, for example"):
        Condition.read("gap is large")


def test_texts_are_found_by_a_structure(model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("C2H6O. An alcohol.\nC6H6. It is aromatic.\nSome other molecule.\n")
    names = {one.id for one in search(str(ETHANOL), lines, model)}
    assert names == {"C2H6O. An alcohol.", "Some other molecule."}
    with pytest.raises(InputError, match="no such file"):
        search(str(ETHANOL), tmp_path / "none.txt", model)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("C7H10O2. A molecule", "C7H10O2"),
        ("a crystal of NaCl", "ClNa"),
        ("TiO2", "O2Ti"),
        ("NO rings In it", ""),
        ("PHOSPHONIC ACID", ""),
        ("which has 3 rings", ""),
    ],
)
def test_a_formula_is_told_from_words(text: str, found: str) -> None:
    assert formula_in(text) == found


def test_formulas_that_are_written_are_read(qm9: Path) -> None:
    for structure in Corpus.open(qm9):
        own = formula(structure)
        assert formula_in(f"{own}. A molecule.") == ("" if own.isalpha() and own.isupper() else own)
