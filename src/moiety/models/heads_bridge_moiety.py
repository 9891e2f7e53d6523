"""What is said of a structure that was read: numbers, facts that words point at, its place among texts, how sure."""
# Shapes: R rows of text, T text tokens, V words, S structures, W width of the language model, D of the bridge, E of the
# shared space, O pseudoscalars, F facts (of Calibration: means of invariants), C answers to all of them, I numbers that
# number heads read, P properties, Q quantiles.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from .configuration_bridge_moiety import HANDED, MoietyBridgeConfig
from .resampler_moiety import LEAST_SPREAD, Structures

QUANTILES = 200  # of distances
POOLS = 4  # weighted means over the tokens of a text
FAR_BELOW = -1e4
TINY = 1e-30
SHARPNESS, MOST_SHARP = 10.0, 100.0  # of the match between texts and structures: at the start, at most


class NumberHead(nn.Module):
    """Value and log sigma [S,P] of every property, in standard units, from all that is even of a structure.

    The text says which property, and when; no property depends on the words it is asked for in. Means and sums over
    nodes are read beside the queries, which have to serve the language model, too.

    Attributes:
        center, spread: [I] of all of that over structures, by which it is standardised.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__()
        width, structure = config.bridge_config.hidden_size, config.structure_config
        self.num_properties = len(config.numbers or {})
        size = width + (1 + 2 * structure.lmax) * structure.hidden_size
        self.register_buffer("center", torch.empty(size))
        self.register_buffer("spread", torch.empty(size))
        self.reset()
        self.map = nn.Sequential(
            nn.Linear(size, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * self.num_properties),
        )  # fmt: skip

    def reset(self) -> None:
        """To what changes nothing."""
        init.zeros_(self.center)
        init.ones_(self.spread)

    def forward(self, found: Structures) -> tuple[Tensor, Tensor]:
        value, log_sigma = self.map((self.read(found) - self.center) / self.spread).split(self.num_properties, dim=-1)
        return value, log_sigma.clamp(-6, 3)

    def read(self, found: Structures) -> Tensor:
        """[S,I] what stands before it."""
        return torch.cat([found.even, found.mean, found.lengths], dim=-1)

    @torch.no_grad()
    def standardise(self, read_SI: Tensor) -> None:
        """Sets center and spread from some structures; what is said of them stays the same."""
        center, spread = read_SI.mean(0), read_SI.std(0).clamp(min=LEAST_SPREAD)
        first: Any = self.map[0]
        first.bias += first.weight @ ((center - self.center) / self.spread)
        first.weight *= spread / self.spread
        self.center.copy_(center)
        self.spread.copy_(spread)


class Pointer(nn.Module):
    """Lets the language model say what heads have decided: next words [R,T,V] of both, each as likely as it is chosen.

    A pointer-generator (See et al., arXiv 1704.04368) that points at facts of the structure that stands last: from the
    hidden state [R,T,W] it chooses one of them, or the language model's own words. Which fact a question is about is
    soon learned; to see its answer in the tokens of a structure takes a small language model far longer.

    The name of a fact is what is asked, and of what: "count carbon". Each is chosen by itself, so that carbon is
    learned once for all that is asked of it.
    """

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__()
        facts = (config.facts or {}).values()
        self.tokens = [token for answers in facts for token in answers.values()]
        self.answers = [len(answers) for answers in facts]
        names = [name.split(" ", 1) for name in config.facts or {}]
        parts = sorted({part for name in names for part in name})
        self.parts = [[float(part in name) for part in parts] for name in names]
        self.own_words = nn.Linear(config.text_config.hidden_size, 1)
        self.part = nn.Linear(config.text_config.hidden_size, len(parts))

    def choose(self, hidden_RTW: Tensor) -> Tensor:
        """[R,T,1+F] logits of own words, and of the facts."""
        fact_RTF = self.part(hidden_RTW) @ torch.tensor(self.parts, device=hidden_RTW.device).T
        return torch.cat([self.own_words(hidden_RTW), fact_RTF], dim=-1)

    def forward(self, logits_RTV: Tensor, choice_RTF: Tensor, share_RC: Tensor) -> Tensor:
        """`choice_RTF`: of `choose`; `share_RC`: how likely answers are, see `heard`: 0 where none of a fact can be."""
        owner_C = torch.repeat_interleave(torch.tensor(self.answers, device=share_RC.device))
        said_RTC = choice_RTF.softmax(-1)[..., 1 + owner_C] * share_RC.unsqueeze(1)
        tokens_C = torch.tensor(self.tokens, device=share_RC.device)
        own_RT1 = (1 - said_RTC.sum(-1, keepdim=True)).clamp(min=0)
        both_RTV = (own_RT1 * logits_RTV.float().softmax(-1)).index_add(-1, tokens_C, said_RTC.float())
        there_R11 = (share_RC.sum(1) > 0)[:, None, None]
        return torch.where(there_R11, both_RTV.clamp(min=TINY).log(), logits_RTV)


class SharedSpace(nn.Module):
    """Structures [S,D] with pseudoscalars [S,O] and facts [S,C], and texts [R,T,W], as vectors of one space.

    Those of structures [S,E] have length 1, those of texts [R,E] the sharpness of the match (CLIP's temperature:
    Radford et al., arXiv 2103.00020). A text is a weighted mean over its tokens, POOLS times: two that differ in one
    word do not look alike.
    """

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__()
        bridge = config.bridge_config
        self.even = nn.Linear(bridge.hidden_size, bridge.embedding_size)
        self.odd = nn.Linear(HANDED * bridge.num_pseudoscalars, bridge.embedding_size, bias=False)
        answers = sum(map(len, (config.facts or {}).values()))
        self.facts = nn.Linear(answers, bridge.embedding_size, bias=False) if answers else None
        self.text_norm = nn.RMSNorm(config.text_config.hidden_size)
        self.text_in = nn.Linear(config.text_config.hidden_size, bridge.hidden_size)
        self.weigh = nn.Linear(bridge.hidden_size, POOLS)
        self.text = nn.Linear(POOLS * bridge.hidden_size, bridge.embedding_size)
        self.word = nn.Embedding(config.text_config.vocab_size, bridge.embedding_size)
        self.log_sharpness = nn.Parameter(torch.tensor([math.log(SHARPNESS)]))

    def forward(
        self, structures: Structures, text_RTW: Tensor, ids_RT: Tensor, words_RT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Structures, texts, and [R,C] how like texts are to structures of which one answer is known, and no more."""
        text_RTD = self.text_in(self.text_norm(text_RTW))
        share_RTH = self.weigh(text_RTD).masked_fill(~words_RT.unsqueeze(-1), FAR_BELOW).softmax(dim=1)
        bag_RE = (self.word(ids_RT) * words_RT.unsqueeze(-1)).sum(1) / words_RT.sum(1, keepdim=True).sqrt()
        text_RE = functional.normalize(self.text((share_RTH.mT @ text_RTD).flatten(1)) + bag_RE, dim=-1)
        text_RE = text_RE * self.log_sharpness.clamp(max=math.log(MOST_SHARP)).exp()
        structure_SE, stated_RC = self.even(structures.even) + self.odd(structures.odd), None
        if self.facts is not None:
            structure_SE = structure_SE + self.facts(structures.fact_shares)
            answers_CE = self.facts(torch.eye(self.facts.in_features).to(structure_SE))  # ZeRO-3 gathers what is called
            stated_RC = text_RE @ functional.normalize(answers_CE, dim=-1).T
        return functional.normalize(structure_SE, dim=-1), text_RE, stated_RC


class Calibration(nn.Module):
    """What the last stage measures, without training: how sure answers are, and what structures are known.

    Attributes:
        temperature: [1] by which logits of answers are divided.
        sigma_scale: [P] by which the sigmas of numbers are multiplied.
        center, whiten: [F] and [F,F], of the mean invariants of the structures that were learned from. What the bridge
            makes of them is less strange where structures are: it is made to answer questions.
        distance: [Q] ascending quantiles of the distances from there of structures that were held out.
        seen: [vocabulary] 1 for types of nodes that were learned from; all 1 until it was measured.
    """

    temperature: Tensor
    sigma_scale: Tensor
    center: Tensor
    whiten: Tensor
    distance: Tensor
    seen: Tensor

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__()
        size = (1 + config.structure_config.lmax) * config.structure_config.hidden_size
        for name, shape in (
            ("temperature", (1,)), ("sigma_scale", (len(config.numbers or {}),)), ("center", (size,)),
            ("whiten", (size, size)), ("distance", (QUANTILES,)), ("seen", (config.structure_config.vocab_size,)),
        ):  # fmt: skip
            self.register_buffer(name, torch.empty(shape))
        self.reset()

    def reset(self) -> None:
        """To what changes no answer."""
        for name in ("temperature", "sigma_scale", "seen"):
            init.ones_(self.get_buffer(name))
        init.zeros_(self.center)
        init.copy_(self.whiten, torch.eye(self.whiten.shape[0]))
        init.constant_(self.distance, math.inf)

    def distance_of(self, mean_SF: Tensor) -> Tensor:
        """[S] Mahalanobis distance of mean invariants from those that were learned from, per channel."""
        return ((mean_SF - self.center) @ self.whiten).square().mean(-1).sqrt()

    def strangeness(self, structures: Structures, node_type: Tensor, graph_index: Tensor) -> Tensor:
        """[S] share of held-out structures that stand nearer to what was learned from; 1 of an unseen type of node."""
        nearer_S = torch.searchsorted(self.distance, self.distance_of(structures.mean)) / QUANTILES
        unseen_S = torch.zeros_like(nearer_S).index_add(0, graph_index, 1 - self.seen[node_type])
        return torch.where(unseen_S > 0, 1.0, nearer_S)


__all__ = ["QUANTILES", "SHARPNESS", "Calibration", "NumberHead", "Pointer", "SharedSpace"]
