"""Writes the node vocabulary as a plain PreTrainedTokenizerFast: python tokenizers/structure/build_structure.py

One word, one node: "C C O H", "<ALA> <GLY>", "[MASK]"; the id of an element is its atomic number. A word that is none
of the vocabulary becomes [MASK], a node whose type is not told.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from moiety.models.vocabulary_moiety import TOKENS


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, from the vocabulary module alone."""
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="[MASK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[MASK]", mask_token="[MASK]", model_max_length=1_000_000
    )


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    build().save_pretrained(out)
