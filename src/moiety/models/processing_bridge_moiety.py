"""Questions and structures in, tensors out: a structure becomes as many placeholder tokens as the bridge has for it."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration_bridge_moiety import HANDED
from .feature_extraction_moiety import MoietyFeatureExtractor
from .resampler_moiety import query_counts

PLACEHOLDER = "<structure>"
TEMPLATE_SETTINGS = ("add_generation_prompt", "continue_final_message", "chat_template", "documents", "tools")


class MoietyBridgeProcessor(ProcessorMixin):
    """`processor(text=[...], structures=[...])`: each PLACEHOLDER in the text stands for the next structure.

    A chat has blocks {"type": "structure", "structure": obj}; `obj` is whatever `MoietyProcessor` takes.
    """

    attributes = ["feature_extractor", "tokenizer"]

    def __init__(
        self, feature_extractor: MoietyFeatureExtractor, tokenizer: Any, nodes_per_query: int = 4,
        chat_template: str | None = None,
    ):  # fmt: skip
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.nodes_per_query = nodes_per_query

    def __call__(
        self, text: str | list[str] | None = None, structures: Any = None, residues: bool = False, **kwargs: Any
    ) -> BatchFeature:
        """Tokens of the text, padded on the left, and the inputs of the tower.

        Args:
            text: one prompt or several.
            structures: those that the placeholders stand for, in their order over all prompts.
            residues: read complete amino acids as one node each.
            kwargs: for the tokenizer.

        Raises:
            ValueError: there are not as many placeholders as structures.
        """
        for other in ("images", "videos", "audio"):  # pipelines pass them, empty
            if kwargs.pop(other, None) is not None:
                raise ValueError(f"{other}: this model reads structures and text")
        prompts = [text] if isinstance(text, str) else list(text or [])
        objects = structures if isinstance(structures, list | tuple) else [structures]
        objects = [one for one in objects if one is not None]
        asked = sum(prompt.count(PLACEHOLDER) for prompt in prompts)
        if asked != len(objects):
            raise ValueError(f"the text has {asked} {PLACEHOLDER} for {len(objects)} structures; write one for each")
        inputs = self.feature_extractor(list(objects), residues=residues) if objects else {}
        if objects:
            nodes = inputs["node_type"], inputs["graph_index"], inputs["pbc"]
            inputs["num_queries"] = query_counts(*nodes, self.nodes_per_query)
            prompts = with_placeholders(prompts, inputs["num_queries"].tolist())
        kwargs = {"return_tensors": "pt", "padding": True, "padding_side": "left"} | kwargs
        return BatchFeature({**self.tokenizer(prompts, **kwargs), **inputs})

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As any processor; structures are read from their blocks, and each block is written as its text.

        So the chat template of any language model serves, also one that knows texts alone.
        """
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = conversation if several else [conversation]
        structures = [block["structure"] for chat in chats for block in _blocks(chat) if block["type"] == "structure"]
        plain = [[{**message, "content": _as_text(message["content"])} for message in chat] for chat in chats]
        if not kwargs.pop("tokenize", False):
            return self.tokenizer.apply_chat_template(plain if several else plain[0], *args, tokenize=False, **kwargs)
        told = {name: kwargs.pop(name) for name in TEMPLATE_SETTINGS if name in kwargs}
        kwargs.pop("return_dict", None)
        text = self.tokenizer.apply_chat_template(plain, tokenize=False, **told)
        return self(text=text, structures=structures or None, add_special_tokens=False, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_queries"]


def with_placeholders(prompts: list[str], queries: list[int]) -> list[str]:
    """Texts in which every PLACEHOLDER stands as often as the next structure has tokens."""
    sizes = iter(queries)
    filled = []
    for prompt in prompts:
        first, *rest = prompt.split(PLACEHOLDER)
        filled.append(first + "".join(PLACEHOLDER * (next(sizes) + HANDED) + part for part in rest))
    return filled


def _blocks(chat: Any) -> list[dict[str, Any]]:
    return [block for message in chat if not isinstance(message["content"], str) for block in message["content"]]


def _as_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(PLACEHOLDER if block["type"] == "structure" else block["text"] for block in content)


MoietyBridgeProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["PLACEHOLDER", "MoietyBridgeProcessor", "with_placeholders"]
