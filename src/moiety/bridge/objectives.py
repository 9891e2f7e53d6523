"""What the stages of the bridge learn: to answer, to tell a right structure from a wrong one, to say numbers, to match.

All score rows of a `Dialogue` under the structures that the rows are about.
"""
# Shapes: B structures, R rows, S = B, L scored tokens, V words, P properties.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moiety.bridge.dialogue import UNSCORED, Dialogue
from moiety.bridge.facts import ABSTAIN, CHOICES
from moiety.objectives.base import Objective

UNLIKELY = 1e4  # nats, for what takes no part in a softmax


class OfRows(Objective):
    """An objective that has a loss of each row [R], and counts those it applies to."""

    def __init__(self, name: str, weight: float = 1.0):
        self.name, self.weight = name, weight

    def applies(self, batch: Dialogue) -> Tensor:
        """[R] bool."""
        raise NotImplementedError

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        """[R], anything where it does not apply."""
        raise NotImplementedError

    def scored(self, batch: Any) -> Tensor:
        return by_structure(self.applies(batch).to(batch.positions), batch)

    def loss_sum(self, output: Any, batch: Any) -> Tensor:
        losses_R = torch.where(self.applies(batch), self.row_losses(output, batch), 0.0).to(batch.positions.dtype)
        return by_structure(losses_R, batch)


class Answering(OfRows):
    """Negative log-likelihood (nats) of a token of the right answers, a mean over those of each row."""

    def applies(self, batch: Dialogue) -> Tensor:
        return (batch.targets["right"] < 0) & ~batch.targets["caption"]

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        count_R = (batch.targets["answer"] != UNSCORED).sum(1).clamp(min=1)
        return -log_likelihood(output.logits, batch.targets["answer"]) / count_R


class Preference(OfRows):
    """Softplus of what a wrong structure lacks to make the right answer `margin` nats less likely than the right one.

    A language model that ignores the structure gives both the same likelihood: it loses softplus(margin).
    """

    def __init__(self, name: str, margin: float = 2.0, weight: float = 1.0):
        super().__init__(name, weight)
        self.margin = margin

    def applies(self, batch: Dialogue) -> Tensor:
        return batch.targets["right"] >= 0

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        likelihood_R = log_likelihood(output.logits, batch.targets["answer"])
        right_R = likelihood_R[batch.targets["right"].clamp(min=0)]
        return functional.softplus(self.margin - (right_R - likelihood_R))

    def trivial_loss(self, node_type: Tensor) -> float:
        return math.log1p(math.exp(self.margin))


class Numbers(Objective):
    """Negative log-likelihood of the numbers of a structure under the Gaussians of its heads, a mean over those known.

    Weighted by sigma (beta-NLL with beta = 1/2: Seitzer et al., arXiv 2203.09168), so that hard structures are learned
    from, too.
    """

    def __init__(self, name: str, weight: float = 1.0):
        self.name, self.weight = name, weight

    def scored(self, batch: Any) -> Tensor:
        return (~batch.targets["numbers"].isnan()).any(1).to(batch.positions)

    def loss_sum(self, output: Any, batch: Any) -> Tensor:
        target_SP = batch.targets["numbers"].to(output.number_values.dtype)
        known_SP = ~target_SP.isnan()
        error_SP = torch.nan_to_num(target_SP - output.number_values)
        sigma_SP = output.number_log_sigmas.exp()
        loss_SP = (0.5 * (error_SP / sigma_SP).square() + output.number_log_sigmas) * sigma_SP.detach()
        return torch.where(known_SP, loss_SP, 0.0).sum(1) / known_SP.sum(1).clamp(min=1)


class Deciding(Objective):
    """Cross-entropy of the answers of fact heads, a mean over the facts that are known of a structure.

    The one that geometry alone decides counts `geometric` times, what is counted of bonds `counting` times: a molecule
    has a dozen others, which are easier. That a fact does not fit a structure counts `unfitting`, about as seldom as it
    is asked in vain: who cannot see what a structure is then takes it for one that the question fits.
    """

    def __init__(
        self,
        name: str,
        facts: Mapping[str, Mapping[str, int]],
        geometric: float = 12.0,
        counting: float = 4.0,
        unfitting: float = 0.1,
        weight: float = 1.0,
    ):
        self.name, self.weight = name, weight
        self.sizes = [len(answers) for answers in facts.values()]
        counts = [any(answer.isdigit() for answer in answers) for answers in facts.values()]
        self.shares = torch.tensor(
            [
                geometric if fact in CHOICES else counting if is_count else 1.0
                for fact, is_count in zip(facts, counts, strict=True)
            ]
        )
        self.unfit = torch.tensor(
            [[*answers].index(ABSTAIN) if ABSTAIN in answers else -1 for answers in facts.values()]
        )
        self.unfitting = unfitting

    def scored(self, batch: Any) -> Tensor:
        return (batch.targets["facts"] != UNSCORED).any(1).to(batch.positions)

    def loss_sum(self, output: Any, batch: Any) -> Tensor:
        target_SF = batch.targets["facts"]
        loss_SF = of_facts(output.fact_logits, self.sizes, target_SF)
        is_unfit_SF = target_SF == self.unfit.to(target_SF)
        share_SF = torch.where(is_unfit_SF, self.unfitting, self.shares.to(loss_SF)) * (target_SF != UNSCORED)
        return (loss_SF * share_SF).sum(1) / share_SF.sum(1).clamp(min=self.unfitting)


class Pointing(OfRows):
    """Cross-entropy of what a token of an answer is taken from: one of the facts, or the language model's own words."""

    def applies(self, batch: Dialogue) -> Tensor:
        return (batch.targets["pointed"] != UNSCORED).any(1) & (batch.targets["right"] < 0)

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        pointed_RL = batch.targets["pointed"]
        count_R = (pointed_RL != UNSCORED).sum(1).clamp(min=1)
        return -log_likelihood(output.fact_choices, pointed_RL) / count_R


class Contrast(OfRows):
    """Cross-entropy between structures and the texts of a micro-batch, both ways (Radford et al., arXiv 2103.00020).

    Texts in the same words are one. Statements of one fact are left out: they are true of many structures. A spoiled
    text belongs to no structure.
    """

    def applies(self, batch: Dialogue) -> Tensor:
        return batch.targets["caption"] & ~batch.targets["statement"] & ~batch.targets["spoiled"]

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        assert batch.input_ids is not None
        logits_SR = output.structure_embeds @ output.text_embeds.T
        logits_SR = logits_SR.masked_fill(batch.targets["statement"], -UNLIKELY)
        about_R = batch.targets["about"]
        same_RR = (batch.input_ids.unsqueeze(0) == batch.input_ids.unsqueeze(1)).all(-1)
        of_text_R = -torch.logsumexp(logits_SR.log_softmax(1)[about_R].masked_fill(~same_RR, -torch.inf), dim=1)
        own_SR = torch.zeros_like(logits_SR).index_add(0, about_R, same_RR.to(logits_SR)) > 0
        of_structure_R = -torch.logsumexp(logits_SR.log_softmax(0).masked_fill(~own_SR, -torch.inf), dim=0)
        return (of_text_R + of_structure_R) / 2


class Matching(OfRows):
    """Cross-entropy of a structure over its own text, that spoiled, and those of its partners of one composition."""

    def applies(self, batch: Dialogue) -> Tensor:
        return batch.targets["caption"] & ~batch.targets["spoiled"] & (self._rivals(batch).sum(1) > 1)

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        logits_RR = (output.structure_embeds @ output.text_embeds.T)[batch.targets["about"]]
        logits_RR = logits_RR.masked_fill(~self._rivals(batch), -torch.inf)
        return -logits_RR.log_softmax(1).diagonal()

    def _rivals(self, batch: Dialogue) -> Tensor:
        """[R,R] bool: rows about partners, in other words, that say as much; the spoiled row; and the row itself."""
        assert batch.input_ids is not None
        group_R = batch.targets["group"][batch.targets["about"]]
        partners_RR = (group_R.unsqueeze(0) == group_R.unsqueeze(1)) & (group_R >= 0)
        statement_R, about_R = batch.targets["statement"], batch.targets["about"]
        partners_RR = partners_RR & (statement_R.unsqueeze(0) == statement_R.unsqueeze(1))
        other_RR, spoiled_R = about_R.unsqueeze(0) != about_R.unsqueeze(1), batch.targets["spoiled"]
        partners_RR = partners_RR & other_RR & ~spoiled_R | ~other_RR & spoiled_R
        same_RR = (batch.input_ids.unsqueeze(0) == batch.input_ids.unsqueeze(1)).all(-1)
        return partners_RR & ~same_RR | torch.eye(len(group_R), dtype=torch.bool, device=group_R.device)


class Stating(OfRows):
    """Cross-entropy of the answers that a caption states, a mean over them, by its likeness to those of each fact.

    To be like the right structure rather than others says too little of each word of a long text.
    """

    def __init__(self, name: str, facts: Mapping[str, Mapping[str, int]], weight: float = 1.0):
        super().__init__(name, weight)
        self.sizes = [len(answers) for answers in facts.values()]

    def applies(self, batch: Dialogue) -> Tensor:
        return (batch.targets["stated"] != UNSCORED).any(1)

    def row_losses(self, output: Any, batch: Dialogue) -> Tensor:
        stated_RF = batch.targets["stated"]
        loss_RF = of_facts(output.stated_facts, self.sizes, stated_RF)
        return loss_RF.sum(1) / (stated_RF != UNSCORED).sum(1).clamp(min=1)


def of_facts(logits_RC: Tensor, sizes: Sequence[int], target_RF: Tensor) -> Tensor:
    """[R,F] cross-entropy of the answers to each fact, 0 where none is known; logits of one fact after the other."""
    parts = zip(logits_RC.split(sizes, dim=1), target_RF.T, strict=True)
    losses = [
        functional.cross_entropy(logits_RA, target_R, ignore_index=UNSCORED, reduction="none")
        for logits_RA, target_R in parts
    ]
    return torch.stack(losses, dim=1)


def by_structure(values_R: Tensor, batch: Dialogue) -> Tensor:
    """[B] sums over the rows about each structure."""
    return values_R.new_zeros(batch.num_structures).index_add(0, batch.targets["about"], values_R)


def log_likelihood(logits_RLV: Tensor, answer_RL: Tensor) -> Tensor:
    """[R] sum over the scored tokens, nats."""
    loss = functional.cross_entropy(logits_RLV.flatten(0, 1).float(), answer_RL.flatten(), reduction="none")
    return -loss.reshape(answer_RL.shape).sum(1)


__all__ = [
    "Answering",
    "Contrast",
    "Matching",
    "Numbers",
    "OfRows",
    "Pointing",
    "Preference",
    "Stating",
    "log_likelihood",
]
