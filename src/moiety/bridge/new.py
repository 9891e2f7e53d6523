"""A new bridge between a structure tower and a language model: any of transformers', or a small one from nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from moiety.adapters.adapter import quietly, require_export
from moiety.bridge.facts import ABSTAIN, COMPARED, COUNTED, DECIDED, HANDED_FACTS, NUMBERS, number_token
from moiety.bridge.language import language_dir
from moiety.bridge.rows import special_tokens
from moiety.errors import InputError
from moiety.models.configuration_bridge_moiety import BridgeConfig, MoietyBridgeConfig
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_bridge_moiety import MoietyForConditionalGeneration
from moiety.models.modeling_moiety import MoietyModel
from moiety.models.processing_bridge_moiety import PLACEHOLDER, MoietyBridgeProcessor

SEEING = ("tower.", "bridge.", "number_head.")
SPEAKING = re.compile(r"bridge\.(hand\.)?out\.")  # is as wide as the language model
TOKENIZER = Path(__file__).parents[3] / "tokenizers/text"


def new_bridge(
    tower: str | Path,
    language: str | Path = "",
    new_language: Mapping[str, Any] | None = None,
    bridge: Mapping[str, Any] | None = None,
    random_tower: bool = False,
) -> tuple[MoietyForConditionalGeneration, MoietyBridgeProcessor]:
    """A bridge that knows nothing yet, between a tower and a language model that may.

    Args:
        tower: an exported Moiety model.
        language: directory of a causal language model with its tokenizer, or `smollm2`; "" for a new one.
        new_language: numbers of a LlamaConfig, for a new one.
        bridge: numbers of a BridgeConfig.
        random_tower: leave the weights of the tower as they are drawn.

    Raises:
        InputError: no model at one of the places, numbers that do not fit together.
    """
    require_export(tower)
    language = language_dir(language) if language else ""
    tokenizer = load_tokenizer(language)
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens(list(NUMBERS))})
    structure = MoietyConfig.from_pretrained(str(tower), tasks=None)
    try:
        own = BridgeConfig(**(bridge or {}))
        text = text_config(language, new_language or {}, tokenizer)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"the bridge: {error}") from error
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    config = MoietyBridgeConfig(
        structure_config=structure,
        text_config=text,
        bridge_config=own,
        structure_token_id=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        abstain_token_id=tokenizer.convert_tokens_to_ids(ABSTAIN),
        numbers={
            name: {**scale, "token_id": tokenizer.convert_tokens_to_ids(number_token(name))}
            for name, scale in NUMBERS.items()
        },
        handed_facts=list(HANDED_FACTS),
        facts={name: deciding_tokens(answers, tokenizer, name in COUNTED) for name, answers in told_by_heads().items()},
        compared_facts=COMPARED,
        counted_facts={name: {answer: list(of) for answer, of in answers.items()} for name, answers in COUNTED.items()},
    )
    model = MoietyForConditionalGeneration(config)
    if not random_tower:
        with quietly():
            model.tower = MoietyModel.from_pretrained(str(tower), config=structure)
    if language:
        with quietly():
            model.language_model = AutoModelForCausalLM.from_pretrained(str(language), dtype=torch.float32)
            model.language_model.resize_token_embeddings(text.vocab_size)
    model.config.text_config = model.language_model.config
    extractor = MoietyFeatureExtractor(cutoff=structure.cutoff)
    return model, MoietyBridgeProcessor(extractor, tokenizer, own.nodes_per_query)


def told_by_heads() -> dict[str, list[str]]:
    """Every fact that the language model may point at, with its answers."""
    compared = {name: [how["first"], how["last"]] for name, how in COMPARED.items()}
    return {name: list(answers) for name, answers in (COUNTED | DECIDED | compared).items()}


def take_over(model: MoietyForConditionalGeneration, other: MoietyForConditionalGeneration) -> None:
    """What another bridge sees of structures, and decides: everything but what speaks to its language model.

    Raises:
        InputError: the two do not see or decide the same.
    """
    own, told = model.state_dict(), [{name: list(of) for name, of in m.config.facts.items()} for m in (model, other)]
    taken = {
        name: value
        for name, value in other.state_dict().items()
        if name.startswith(SEEING) and not SPEAKING.match(name)
    }
    if told[0] != told[1] or any(name not in own or own[name].shape != value.shape for name, value in taken.items()):
        raise InputError("start: another tower, bridge or facts; give tower and bridge as that stage had them")
    model.load_state_dict(taken, strict=False)


def deciding_tokens(answers: Sequence[str], tokenizer: Any, may_share: bool = False) -> dict[str, int]:
    """Of each answer to a question the first token in which all differ, in the words of the chat template.

    Args:
        answers: to one question.
        tokenizer: of the language model.
        may_share: where there is none, the one in which most differ; the language model says the rest.

    Raises:
        InputError: there is none.
    """
    chats = [[{"role": "user", "content": ""}, {"role": "assistant", "content": answer}] for answer in answers]
    given = tokenizer.apply_chat_template(chats[0][:1], tokenize=False, add_generation_prompt=True)
    said = [tokenizer.apply_chat_template(chat, tokenize=False)[len(given) :] for chat in chats]
    places = list(zip(*tokenizer(said, add_special_tokens=False)["input_ids"], strict=False))
    telling = max(places, key=lambda tokens: len(set(tokens)))
    if len(set(telling)) < (2 if may_share else len(answers)):
        raise InputError(f"the tokenizer has no token that tells {', '.join(answers)} apart")
    return dict(zip(answers, telling, strict=True))


def load_tokenizer(language: str | Path) -> Any:
    """That of the language model; of a new one, ours."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(language or TOKENIZER))
    except (OSError, ValueError) as error:
        raise InputError(f"{language}: no tokenizer there: {error}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(str(TOKENIZER)).chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def text_config(language: str | Path, numbers: Mapping[str, Any], tokenizer: Any) -> Any:
    """Of a language model that is there, or of a new one."""
    if language:
        try:
            return AutoConfig.from_pretrained(str(language))
        except OSError as error:
            raise InputError(f"{language}: no language model there: {error}") from error
    for key in numbers:
        if key not in LlamaConfig.__annotations__:
            raise InputError(f"new_language.{key}: LlamaConfig has no such number")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return LlamaConfig(vocab_size=len(tokenizer), **special, **numbers)
