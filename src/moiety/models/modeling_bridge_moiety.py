"""A language model that reads structures: tower, bridge, and any causal language model of transformers."""
# Shapes: R rows of text, T text tokens, V words, S structures, A places in the text where a structure stands, K tokens
# of all these, W width of the language model, E of the shared space, C answers to all F facts, P properties.

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .asking_moiety import ask
from .configuration_bridge_moiety import HANDED, MoietyBridgeConfig
from .heads_bridge_moiety import SHARPNESS, Calibration, NumberHead, Pointer, SharedSpace
from .modeling_moiety import MoietyModel
from .resampler_moiety import Bridge, Invariants, Structures, query_counts, unit_counts

STRUCTURE_INPUTS = (
    "node_type", "positions", "graph_index", "edge_index", "edge_shift", "cell", "pbc", "charge", "spin", "domain",
    "role", "node_vectors", "num_queries", "structure_order",
)  # fmt: skip


@dataclass
class MoietyBridgeOutput(ModelOutput):
    """What the language model says of the next token, what the number heads say of the structures, and embeddings.

    `loss` where there were labels; `logits` [R,T,V]; `number_values` and `number_log_sigmas` [S,P] in units of their
    spread; `structure_embeds` [S,E] and `text_embeds` [R,E], whose products are log odds of belonging together;
    `fact_logits` [S,C] of the answers of all facts, one fact after the other; `fact_choices` [R,T,1+F], logits of the
    language model's own words and of every fact; `stated_facts` [R,C], how much a text is like one that states each of
    the answers; `structure_features` [S,F], means of invariants.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: Any | None = None
    attentions: Any | None = None
    number_values: Tensor | None = None
    number_log_sigmas: Tensor | None = None
    fact_logits: Tensor | None = None
    fact_choices: Tensor | None = None
    structure_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    stated_facts: Tensor | None = None
    structure_features: Tensor | None = None


@dataclass
class Reading:
    """Structures in a text: `embeds` [R,T,W], what the bridge makes of them, and which stand `first` and `last` [R].

    -1 where there is none.
    """

    embeds: Tensor
    structures: Structures
    first: Tensor
    last: Tensor


class MoietyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Text in which structures stand: each is a run of placeholder tokens, which become what the bridge reads of it.

    Tower and bridge run also where the text has no structure, on one of one atom: under ZeRO-3 ranks that call
    different modules wait for each other for ever.

    Attributes:
        text_alone: set where no rank ever has a structure in a text, as long as texts are only matched: a frozen
            language model then has no gradient to carry, and is not walked backwards.
    """

    text_alone = False

    config_class = MoietyBridgeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["structure", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__(config)
        self.tower = MoietyModel(config.structure_config)
        self.bridge = Bridge(config)
        self.pointer = Pointer(config) if config.facts else None
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.space = SharedSpace(config)
        self.number_head = NumberHead(config) if config.numbers else None
        self.calibration = Calibration(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            small = module in (self.bridge.out, self.bridge.hand.out)  # tokens as large as those of words
            size = self.config.text_config.initializer_range if small else 1.0
            init.normal_(module.weight, std=size / module.in_features**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Calibration | Invariants | NumberHead):
            module.reset()
        elif isinstance(module, SharedSpace):
            init.constant_(module.log_sharpness, math.log(SHARPNESS))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def read_structures(self, num_queries: Tensor, **structures: Tensor) -> Structures:
        """What the bridge makes of structures; `structures` are the inputs of the tower."""
        return self.bridged(self.tower(**structures).node_features, num_queries, structures)

    def bridged(self, features_NMC: Tensor, num_queries: Tensor, structures: dict[str, Tensor]) -> Structures:
        """What the bridge makes of node features of the tower."""
        units_BV = unit_counts(*(structures[name] for name in ("node_type", "graph_index", "pbc")))
        return self.bridge(features_NMC, structures["graph_index"], num_queries, units_BV)

    def read(self, input_ids: Tensor, structures: dict[str, Tensor]) -> Reading:
        """The text [R,T] with what the bridge makes of its structures in the place of their tokens.

        Raises:
            ValueError: the text has more or fewer placeholders than the structures have tokens.
        """
        structures = dict(structures or self._one_atom(input_ids.device))
        order_A = structures.pop("structure_order", None)
        return self.placed(input_ids, self.read_structures(**structures), order_A)

    def placed(self, input_ids: Tensor, found: Structures, order_A: Tensor | None = None) -> Reading:
        """`read`, of structures that the bridge has read; in the order of the structures unless another is given."""
        if order_A is None:
            order_A = found.sizes.nonzero().flatten()
        text_RTW = self.get_input_embeddings()(input_ids)
        here_RT = input_ids == self.config.structure_token_id
        sizes_A = found.sizes[order_A]
        owner_K = torch.repeat_interleave(order_A, sizes_A)
        if int(here_RT.sum()) != owner_K.shape[0]:
            raise ValueError(
                f"the text has {int(here_RT.sum())} placeholders for structures that have {owner_K.shape[0]} tokens; "
                "let the processor make both"
            )
        within_K = torch.arange(owner_K.shape[0], device=owner_K.device)
        within_K = within_K - torch.repeat_interleave(sizes_A.cumsum(0) - sizes_A, sizes_A)
        tokens_KW = found.tokens[(found.sizes.cumsum(0) - found.sizes)[owner_K] + within_K].to(text_RTW.dtype)
        count_R, none_R = here_RT.sum(1), torch.full(input_ids.shape[:1], -1, device=input_ids.device)
        ends_R, is_read_R = count_R.cumsum(0), count_R > 0
        first_R, last_R = (
            none_R.masked_scatter(is_read_R, owner_K[place_R[is_read_R]]) for place_R in (ends_R - count_R, ends_R - 1)
        )
        unread = 0 * found.tokens.sum()  # every rank walks the same modules backwards
        if self.text_alone:
            return Reading(text_RTW, replace(found, even=found.even + unread), first_R, last_R)
        return Reading(text_RTW.masked_scatter(here_RT.unsqueeze(-1), tokens_KW) + unread, found, first_R, last_R)

    def heard(self, reading: Reading) -> Tensor | None:
        """[R,C] how likely answers are by the heads, of the structure that stands last in each row; 0 without one.

        Of a comparison, of the first and the last.
        """
        share_SC = reading.structures.fact_shares
        if share_SC is None or self.bridge.facts is None:
            return None
        first_RC, last_RC = share_SC[reading.first.clamp(min=0)], share_SC[reading.last.clamp(min=0)]
        are_two_R = reading.first != reading.last
        share_RC = last_RC + self.bridge.facts.compare(first_RC, last_RC) * are_two_R.unsqueeze(1)
        return share_RC * (reading.last >= 0).unsqueeze(1)

    def _one_atom(self, device: torch.device) -> dict[str, Tensor]:
        """A structure for a text without one; it stands nowhere."""
        whole: dict[str, Any] = {"dtype": torch.long, "device": device}
        return {
            "node_type": torch.ones(1, **whole),
            "positions": torch.zeros(1, 3, device=device),
            "graph_index": torch.zeros(1, **whole),
            "edge_index": torch.zeros(2, 0, **whole),
            "edge_shift": torch.zeros(0, 3, device=device),
            "pbc": torch.zeros(1, 3, dtype=torch.bool, device=device),
            "domain": torch.zeros(1, **whole),
            "num_queries": torch.zeros(1, **whole),
        }

    def _structures_alone(self, structures: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of placeholders, padded on the left, and where they stand; adds the number of queries."""
        if "num_queries" not in structures:
            structures["num_queries"] = query_counts(
                structures["node_type"],
                structures["graph_index"],
                structures["pbc"],
                self.config.bridge_config.nodes_per_query,
            )
        sizes_R = structures["num_queries"] + HANDED
        longest = int(sizes_R.max())
        there_RT = torch.arange(longest, device=sizes_R.device) >= longest - sizes_R.unsqueeze(1)
        pad = self.config.text_config.pad_token_id or 0
        return torch.where(there_RT, self.config.structure_token_id, pad), there_RT.long()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        fact_shares: Tensor | None = None,
        **kwargs: Any,
    ) -> MoietyBridgeOutput:
        """Logits of the next tokens, what the number heads say, and the embeddings of texts and structures.

        Args:
            input_ids: [R,T]; the placeholders of a structure stand together, in the order of the structures. Default: a
                row for each structure, of its placeholders.
            attention_mask: [R,T].
            position_ids: [R,T].
            past_key_values: cache of what was read before, structures included.
            inputs_embeds: [R,T,W] in place of input_ids, of text that was read before.
            labels: [R,T], -100 where nothing is learned.
            logits_to_keep: how many of the last positions need logits; 0 = all.
            fact_shares: [R,C] what `heard` said of text that was read before.
            kwargs: STRUCTURE_INPUTS as the processor returns them; `structure_order` says which structure each run of
                placeholders stands for, where that is not one after the other. The rest is for the language model.
        """
        structures = {name: kwargs.pop(name) for name in STRUCTURE_INPUTS if kwargs.get(name) is not None}
        reading = None
        if input_ids is None and inputs_embeds is None:
            input_ids, attention_mask = self._structures_alone(structures)
        if inputs_embeds is None:
            goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0  # of what was read before
            assert input_ids is not None
            reading = None if goes_on else self.read(input_ids, structures)
            inputs_embeds = self.get_input_embeddings()(input_ids) if reading is None else reading.embeds
            fact_shares = fact_shares if reading is None else self.heard(reading)
        if position_ids is None and past_key_values is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # of text that is padded on the left
        inside = dict(kwargs) | {"output_hidden_states": True}
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **inside,
        )
        logits, choices = output.logits, None
        if fact_shares is not None and self.pointer is not None:
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            choices = self.pointer.choose(output.hidden_states[-1][:, kept].to(fact_shares))
            logits = self.pointer(logits, choices, fact_shares)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size)
        answer = MoietyBridgeOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states if kwargs.get("output_hidden_states") else None,
            attentions=output.attentions,
            fact_choices=choices,
        )
        if reading is not None:
            assert input_ids is not None
            self._add_readings(answer, output.hidden_states, input_ids, attention_mask, reading)
        return answer

    def _add_readings(
        self,
        answer: MoietyBridgeOutput,
        hidden: tuple[Tensor, ...],
        ids_RT: Tensor,
        mask_RT: Tensor | None,
        reading: Reading,
    ) -> None:
        """Numbers and embeddings; of texts from the middle layer of the language model.

        The last layer is about the next word: after "R" and after "S" it says the same.
        """
        words_RT = ids_RT != self.config.structure_token_id
        words_RT = words_RT if mask_RT is None else words_RT & mask_RT.bool()
        found, dtype = reading.structures, reading.structures.even.dtype
        answer.structure_embeds, answer.text_embeds, answer.stated_facts = self.space(
            found, hidden[len(hidden) // 2].to(dtype), ids_RT, words_RT
        )
        answer.structure_features = found.mean
        if self.number_head is not None:
            answer.number_values, answer.number_log_sigmas = self.number_head(found)
        answer.fact_logits = found.fact_logits

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As any `generate` of transformers; structures are read once, before beams and sequences multiply."""
        input_ids = kwargs.pop("input_ids", inputs)
        structures = {name: kwargs.pop(name) for name in STRUCTURE_INPUTS if kwargs.get(name) is not None}
        if structures:
            reading = self.read(input_ids, structures)
            kwargs |= {"inputs_embeds": reading.embeds, "fact_shares": self.heard(reading)}
        return super().generate(input_ids=input_ids, **kwargs)  # type: ignore[misc]

    def ask(self, processor: Any, structures: Any, question: str, **settings: Any) -> Any:
        """See `asking_moiety.ask`."""
        return ask(self, processor, structures, question, **settings)


MoietyForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["STRUCTURE_INPUTS", "MoietyBridgeOutput", "MoietyForConditionalGeneration"]
