"""tokenizers/structure is the vocabulary module, as data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moiety.models.vocabulary_moiety import MASK, PAD, TOKENS

FOLDER = Path(__file__).parents[1] / "tokenizers" / "structure"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_artifact_has_the_ids_of_the_vocabulary_module(tokenizer):
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    assert tokenizer(" ".join(TOKENS)).input_ids == list(range(len(TOKENS)))


def test_an_element_is_its_atomic_number_and_a_stranger_is_masked(tokenizer):
    assert tokenizer("C O <ALA> Xx").input_ids == [6, 8, TOKENS.index("<ALA>"), MASK]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (PAD, MASK)


def test_the_script_builds_the_artifact_that_is_committed(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("build_structure", FOLDER / "build_structure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
