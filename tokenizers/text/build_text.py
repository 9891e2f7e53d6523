"""Trains the byte-level BPE of the small language model: python tokenizers/text/build_text.py [corpora/full/english]

On the English of the corpus `english`, the questions of the bridge, and the names of the elements: each is one token.
Digits stand alone, so that numbers are read as they are written. Its chat has no names: a question ends with a
line break, an answer with </s>.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from moiety.bridge.questions import sentences
from moiety.data.texts import TextCorpus
from moiety.models.vocabulary_moiety import ELEMENT_NAMES

VOCABULARY = 4096
REPEATED = 20  # times that a question counts: there are few of them
NAMED = 500  # that the name of an element counts: enough for a token of its own
PAD, START, END = "<pad>", "<s>", "</s>"
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)


def build(corpus: TextCorpus) -> PreTrainedTokenizerFast:
    """The tokenizer, from the texts that are trained on."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=START, eos_token=END, chat_template=CHAT,
        model_max_length=1024, padding_side="left",
    )  # fmt: skip


def _texts(corpus: TextCorpus) -> Iterator[str]:
    yield from corpus.table["text"].to_pylist()
    for by_split in sentences().values():
        yield from by_split["train"] * REPEATED
    yield from [f"of {name}" for name in ELEMENT_NAMES] * NAMED


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("corpora/full/english")
    build(TextCorpus.open(source, split="train")).save_pretrained(Path(__file__).parent)
