"""Configuration of the Moiety models."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CHANNELS_PER_WEIGHT = 2  # that an attention weight of an edge moves together


@strict
class MoietyConfig(PreTrainedConfig):
    """The numbers that fix a model's shape.

    Attributes:
        hidden_size: channels C of every degree.
        num_layers: blocks.
        num_heads: heads of attention over the whole structure, and of the pooling in heads of kind "mean".
        lmax: highest degree of the steerable features, 1 or 2.
        edge_channels: channels of everything that lives on edges (a half of hidden_size), an even number.
        num_radial: radial basis functions.
        cutoff: Å between two atoms; twice that between residues.
        global_every: every how many blocks attention over the whole structure stands; 0 = never.
        vocab_size: node types (see vocabulary_moiety).
        tasks: heads of labels, name -> {"kind", "mean", "std", "unit"}; see `TaskHead`.
    """

    model_type = "moiety"

    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 4
    lmax: int = 2
    edge_channels: int = 32
    num_radial: int = 12
    cutoff: float = 5.0
    global_every: int = 2
    vocab_size: int = 145
    tasks: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.lmax not in (1, 2):
            raise ValueError(f"lmax is {self.lmax}; 1 and 2 are built")
        if self.edge_channels % CHANNELS_PER_WEIGHT:
            raise ValueError(f"edge_channels {self.edge_channels} is not a multiple of {CHANNELS_PER_WEIGHT}")

    @property
    def num_weights(self) -> int:
        """Attention weights of an edge."""
        return self.edge_channels // CHANNELS_PER_WEIGHT


MoietyConfig.register_for_auto_class()

__all__ = ["MoietyConfig"]
