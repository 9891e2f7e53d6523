"""A question about structures, and all that an answer comes with: how sure, how known they are, by which atoms."""
# Shapes: R rows of text, T tokens, L of an answer, V words, N nodes, P properties.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 48  # of an answer
STRANGE = 0.995  # share of known structures that stand nearer, from which on a question is declined


@dataclass
class Number:
    """A property as its head says it: value and sigma (one standard deviation) in `unit`."""

    name: str
    value: float
    sigma: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.sigma:.2g} {self.unit}"


@dataclass
class Answer:
    """What is said to a question.

    Attributes:
        answer: the words, numbers written out; "" where `abstained`.
        choices: of the answers that were given to choose from, the probability of each.
        numbers: what heads said.
        confidence: probability of the answer, calibrated.
        strangeness: share of known structures that are less strange than this one, the strangest of them counts.
        abstained: the question does not fit the structure, or the structure is none that the model knows.
        reason: of an abstention.
        node_weights: [N] how much of the answer rests on each node; sums to 1, where it was asked for.
    """

    answer: str
    choices: dict[str, float] = field(default_factory=dict)
    numbers: list[Number] = field(default_factory=list)
    confidence: float = 0.0
    strangeness: float = 0.0
    abstained: bool = False
    reason: str = ""
    node_weights: list[float] | None = None


def ask(
    model: Any,
    processor: Any,
    structures: Any,
    question: str,
    choices: tuple[str, ...] | list[str] = (),
    explain: bool = False,
    residues: bool = False,
    max_new_tokens: int = MOST_TOKENS,
) -> Answer:
    """Asks a question about one structure, or about several that stand before it in their order.

    Args:
        model: MoietyForConditionalGeneration.
        processor: its processor.
        structures: whatever the processor takes; a list of several.
        question: in words.
        choices: answers to choose from; without them the model answers freely, with its most likely words.
        explain: also which nodes the answer rests on.
        residues: read complete amino acids as one node each.
        max_new_tokens: where a free answer ends at last.
    """
    objects = list(structures) if isinstance(structures, list | tuple) else [structures]
    content = [{"type": "structure", "structure": one} for one in objects] + [{"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, residues=residues
    ).to(model.device)
    words_of = Words(model, processor, inputs)
    strangeness = words_of.strangeness()
    if choices:
        logs = torch.stack([words_of.log_probability(words_of.tokens(choice)) for choice in choices])
        shares = logs.softmax(0)
        best = int(shares.argmax())
        tokens, confidence = words_of.tokens(choices[best]), float(shares[best])
        probabilities = dict(zip(choices, shares.tolist(), strict=True))
    else:
        tokens = words_of.generated(max_new_tokens)
        confidence, probabilities = float(words_of.log_probability(tokens).exp()), {}
    text, numbers = words_of.written(tokens)
    reason = ""
    if model.config.abstain_token_id in tokens.tolist():
        reason = "the question does not fit this structure"
    elif strangeness >= STRANGE:
        reason = "the structure is unlike those that the model has learned from"
    weights = words_of.node_weights(tokens) if explain else None
    return Answer(
        answer="" if reason else text,
        choices=probabilities,
        numbers=[] if reason else numbers,
        confidence=confidence,
        strangeness=strangeness,
        abstained=bool(reason),
        reason=reason,
        node_weights=weights,
    )


class Words:
    """A prompt, and what the model says of answers to it; the structures are read once."""

    def __init__(self, model: Any, processor: Any, inputs: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.prompt_1T = inputs["input_ids"]
        self.structures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            self.features = model.tower(**self._of_tower()).node_features
            self.found = self._bridged(self.features)

    def strangeness(self) -> float:
        """Of the strangest structure."""
        measured = self.model.calibration.strangeness(
            self.found, self.structures["node_type"], self.structures["graph_index"]
        )
        return float(measured.max())

    def tokens(self, answer: str) -> Tensor:
        """[L] of an answer, in the words of the chat template, which ends it."""
        chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]
        given = self.tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(chat, tokenize=False)
        ids = self.tokenizer(whole[len(given) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids[0].to(self.prompt_1T.device)

    @torch.no_grad()
    def generated(self, most: int) -> Tensor:
        """[L] the most likely words, one after the other."""
        reading = self.model.placed(self.prompt_1T, self.found)
        whole = self.model.generate(
            input_ids=self.prompt_1T,
            attention_mask=torch.ones_like(self.prompt_1T),
            inputs_embeds=reading.embeds,
            fact_shares=self.model.heard(reading),
            max_new_tokens=most,
            do_sample=False,
        )
        return whole[0, self.prompt_1T.shape[1] :]

    @torch.no_grad()
    def log_probability(self, tokens: Tensor) -> Tensor:
        """Of an answer, with the temperature of the calibration."""
        return self._scored(tokens, self.found)

    def written(self, tokens: Tensor) -> tuple[str, list[Number]]:
        """The answer with its numbers in the place of their tokens."""
        numbers = []
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        known = self.model.config.numbers or {}
        if any(own["token_id"] in tokens.tolist() for own in known.values()):
            with torch.no_grad():
                values, log_sigmas = (said[-1] for said in self.model.number_head(self.found))  # of the last
            sigmas = log_sigmas.exp() * self.model.calibration.sigma_scale
            for place, (name, own) in enumerate(known.items()):
                for _ in range(int((tokens == own["token_id"]).sum())):
                    value = own["mean"] + own["std"] * float(values[place])
                    numbers.append(Number(name, value, own["std"] * float(sigmas[place]), own["unit"]))
                    token = self.tokenizer.convert_ids_to_tokens(own["token_id"])
                    text = text.replace(token, str(numbers[-1]), 1)
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text.strip(), numbers

    def node_weights(self, tokens: Tensor) -> list[float]:
        """[N] gradient of the answer's log probability times what the bridge read of each node, as shares."""
        features = self.features.detach().clone().requires_grad_()
        self._scored(tokens, self._bridged(features)).backward()
        with torch.no_grad():
            share = (features.grad * features).flatten(1).sum(1).abs()
            return (share / share.sum().clamp(min=1e-30)).tolist()

    def _of_tower(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.structures.items() if name != "num_queries"}

    def _bridged(self, features: Tensor) -> Any:
        return self.model.bridged(features, self.structures["num_queries"], self.structures)

    def _scored(self, tokens: Tensor, found: Any) -> Tensor:
        """Log probability of an answer."""
        model, length = self.model, len(tokens)
        reading = model.placed(torch.cat([self.prompt_1T, tokens.unsqueeze(0)], dim=1), found)
        logits = model(inputs_embeds=reading.embeds, fact_shares=model.heard(reading)).logits
        logits_LV = logits[0, -length - 1 : -1].float() / model.calibration.temperature
        return logits_LV.log_softmax(-1).gather(1, tokens.unsqueeze(1)).sum()


__all__ = ["Answer", "Number", "Words", "ask"]
