"""Configuration of the text bridge: a structure tower, a language model, and what stands between them."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_moiety import MoietyConfig

BUCKETS = (8, 16, 32, 64, 128)  # query tokens of a structure
HANDED = 2  # tokens more that change sign in a mirror


class BridgeConfig(PreTrainedConfig):
    """The map from node features to tokens of the language model.

    Attributes:
        kind: "resampler" (queries attend to the nodes), or the baseline "mlp" (the mean over the nodes).
        hidden_size: channels of the queries.
        num_layers: blocks of the resampler.
        num_heads: of its attention.
        num_pseudoscalars: triple products of vectors of a node.
        nodes_per_query: nodes that share a query token, see `num_queries`.
        embedding_size: of the space that texts and structures share.
    """

    model_type = "moiety_resampler"
    base_config_key = "bridge_config"

    kind: Literal["resampler", "mlp"] = "resampler"
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_pseudoscalars: int = 16
    nodes_per_query: int = 4
    embedding_size: int = 128


class MoietyBridgeConfig(PreTrainedConfig):
    """Three configurations, and the tokens that stand for structures and numbers.

    Attributes:
        structure_config: of the tower, a `MoietyModel`.
        text_config: of any causal language model.
        bridge_config: of the resampler.
        structure_token_id: the placeholder; a structure has as many as `num_queries` says, and HANDED more.
        abstain_token_id: what is said where a question does not fit, -1 for nothing.
        numbers: property -> {"token_id", "mean", "std", "unit"}: what a number head says where that token stands.
        facts: name -> {answer: token_id}: what heads decide of a structure, and the token that tells the answers apart.
        handed_facts: those of another answer in a mirror.
        counted_facts: name -> {answer: (of what, least, most)} of facts that are counted, see `asked_counts`.
        compared_facts: name -> {"fact", "answer", "first", "last"}: of two structures, which rather has an answer to a
            fact; the answers that say so.
    """

    model_type = "moiety_bridge"
    sub_configs_defaults = {
        "structure_config": SubConfigSpec(config_class=MoietyConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "bridge_config": SubConfigSpec(config_class=BridgeConfig),
    }

    structure_config: Any = None
    text_config: Any = None
    bridge_config: Any = None
    structure_token_id: int = 0
    abstain_token_id: int = -1
    numbers: dict[str, Any] | None = None
    facts: dict[str, dict[str, int]] | None = None
    handed_facts: list[str] | None = None
    counted_facts: dict[str, dict[str, list[int]]] | None = None
    compared_facts: dict[str, dict[str, str]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.numbers, self.facts = in_order(self.numbers), in_order(self.facts)
        self.tie_word_embeddings |= self.text_config.tie_word_embeddings

    @property
    def cutoff(self) -> float:
        """Of the tower's neighbours, Å."""
        return self.structure_config.cutoff


def in_order(found: Any) -> Any:
    """Mappings in the order of their keys, as a saved configuration has them: heads count on it."""
    return {key: in_order(found[key]) for key in sorted(found)} if isinstance(found, dict) else found


def num_queries(num_nodes: int, nodes_per_query: int) -> int:
    """Query tokens of a structure: the smallest bucket that holds a query for so many nodes.

    Args:
        num_nodes: of a structure; of a crystal, of its reduced formula, so that a supercell has as many.
        nodes_per_query: `BridgeConfig.nodes_per_query`.
    """
    wanted = -(-num_nodes // nodes_per_query)
    return next((size for size in BUCKETS if size >= wanted), BUCKETS[-1])


MoietyBridgeConfig.register_for_auto_class()

__all__ = ["BUCKETS", "HANDED", "BridgeConfig", "MoietyBridgeConfig", "num_queries"]
