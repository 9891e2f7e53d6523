"""From steerable node features to tokens that turn with nothing: invariants, and queries that attend to them.

Every token but the HANDED last ones is the same for a structure and its mirror image; what is in those changes sign.
All of them are the same for a crystal and its supercells, since attention is a weighted mean over nodes.
"""
# Shapes: B structures, N nodes, n most nodes of a structure, M = (lmax + 1)^2 components, C channels of the tower,
# D channels of the queries, P pseudoscalars, K query tokens, V types of nodes.

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_bridge_moiety import BUCKETS, HANDED, BridgeConfig, MoietyBridgeConfig, num_queries
from .configuration_moiety import MoietyConfig
from .vocabulary_moiety import FIRST_RESIDUE

TINY = 1e-6
LEAST_SPREAD = 1e-3  # of an invariant over structures
TYPICAL, LARGE = 16.0, 64.0  # nodes of a unit over which sums are of unit size; that are counted at most
CERTAIN = 30.0  # log odds of what is counted
NEVER = (0, -1, -1)  # a range in which no count lies
FAINT = 0.03  # root mean square of pseudoscalars far below which a structure has no hand


class Invariants(nn.Module):
    """[N,M,C] -> [N,F] even and [N,P] odd under reflection.

    Even are scalars and the lengths of vectors and rank-2 features; odd are triple products of three vectors, without
    which the two hands of a molecule cannot be told apart.

    Attributes:
        center, spread: [F] of the means over the nodes of structures, by which even invariants are standardised.
            Without that what all structures share hides what tells partners apart, and nothing is learned for long.
        length: [L] typical lengths of the sums of vectors and rank-2 features over structures.
    """

    center: Tensor
    spread: Tensor
    length: Tensor

    def __init__(self, structure: MoietyConfig, config: BridgeConfig):
        super().__init__()
        channels = structure.hidden_size
        self.lmax = structure.lmax
        self.size = (1 + structure.lmax) * channels
        self.register_buffer("center", torch.empty(self.size))
        self.register_buffer("spread", torch.empty(self.size))
        self.register_buffer("length", torch.empty(structure.lmax * channels))
        self.triple = nn.ModuleList(nn.Linear(channels, config.num_pseudoscalars, bias=False) for _ in range(3))
        self.reset()

    def reset(self) -> None:
        """To what changes nothing."""
        init.zeros_(self.center)
        init.ones_(self.spread)
        init.ones_(self.length)

    def forward(self, features_NMC: Tensor) -> tuple[Tensor, Tensor]:
        scalars, vectors, *_ = self._by_degree(features_NMC)
        even_NF = torch.cat([scalars.squeeze(1), self._lengths(features_NMC)], dim=-1)
        even_NF = (even_NF - self.center) / self.spread
        a, b, c = (linear(vectors) for linear in self.triple)
        product_NP = (torch.linalg.cross(a, b, dim=1) * c).sum(1)
        return even_NF, F.softsign(product_NP)

    def of_sums(self, features_NMC: Tensor, graph_index: Tensor, units_B: Tensor) -> Tensor:
        """[B,L] lengths of what vectors and rank-2 features add up to; a dipole is one, which no node has."""
        means_BG = mean_over(features_NMC.flatten(1), graph_index, units_B.shape[0])
        sums_BMC = (means_BG * sum_of_units(units_B).to(means_BG)).unflatten(1, features_NMC.shape[1:])
        return self._lengths(sums_BMC) / self.length

    def _by_degree(self, features_NMC: Tensor) -> tuple[Tensor, ...]:
        return features_NMC.split([2 * degree + 1 for degree in range(self.lmax + 1)], dim=1)

    def _lengths(self, features_NMC: Tensor) -> Tensor:
        """Of vectors and rank-2 features, one after the other."""
        return torch.cat([part.square().sum(1).add(TINY).sqrt() for part in self._by_degree(features_NMC)[1:]], dim=-1)

    @torch.no_grad()
    def standardise(self, features_NMC: Tensor, graph_index: Tensor) -> None:
        """Sets what invariants are standardised by, from the features of some structures."""
        self.reset()
        nodes_B = torch.bincount(graph_index)
        means_BF = mean_over(self(features_NMC)[0], graph_index, nodes_B.shape[0])
        self.center.copy_(means_BF.mean(0))
        self.spread.copy_(means_BF.std(0).clamp(min=LEAST_SPREAD))
        self.length.copy_(self.of_sums(features_NMC, graph_index, nodes_B).mean(0).clamp(min=LEAST_SPREAD))


class Attention(nn.Module):
    """Queries [B,K,D] over the nodes [B,n,D] of their structure."""

    def __init__(self, config: BridgeConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BKD: Tensor, nodes_BnD: Tensor, there_Bn: Tensor) -> Tensor:
        query, key, value = (
            linear(given).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, given in ((self.query, x_BKD), (self.key, nodes_BnD), (self.value, nodes_BnD))
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=there_Bn[:, None, None])
        return self.out(read.transpose(1, 2).flatten(2))


class ResamplerBlock(nn.Module):
    def __init__(self, config: BridgeConfig):
        super().__init__()
        width = config.hidden_size
        self.before_attention = nn.RMSNorm(width)
        self.attention = Attention(config)
        self.before_map = nn.RMSNorm(width)
        self.map = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x_BKD: Tensor, nodes_BnD: Tensor, there_Bn: Tensor) -> Tensor:
        x_BKD = x_BKD + self.attention(self.before_attention(x_BKD), nodes_BnD, there_Bn)
        return x_BKD + self.map(self.before_map(x_BKD))


class Hand(nn.Module):
    """Tokens that say the hand: means of pseudoscalars, weighed by what is even, which change sign in a mirror.

    [B,HANDED,width], which have a constant by which they are known, and what they are made of [B,HANDED*P], of unit
    size unless the structure has no hand.
    """

    def __init__(self, config: BridgeConfig, width: int):
        super().__init__()
        self.weigh = nn.Linear(config.hidden_size, HANDED)
        self.out = nn.Linear(config.num_pseudoscalars, width)

    def forward(self, nodes_BnD: Tensor, odd_BnP: Tensor, there_Bn: Tensor) -> tuple[Tensor, Tensor]:
        logits_BnK = self.weigh(nodes_BnD).masked_fill(~there_Bn.unsqueeze(-1), -torch.inf)
        odd_BKP = logits_BnK.softmax(dim=1).transpose(1, 2) @ odd_BnP
        odd_BKP = odd_BKP / (odd_BKP.square().mean(-1, keepdim=True) + FAINT**2).sqrt()
        return self.out(odd_BKP), odd_BKP.flatten(1)


class Whole(nn.Module):
    """What a structure is as a whole, [B,D]: its nodes on average, their sum, and each channel where it is largest.

    Attention is a mean: it counts nothing. Of a crystal the nodes of its smallest unit are added up, so that a
    supercell has the same sum.
    """

    def __init__(self, size: int, config: BridgeConfig):
        super().__init__()
        self.mean = nn.Linear(size, config.hidden_size)
        self.total = nn.Linear(size + 2, config.hidden_size, bias=False)
        self.most = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, mean_BF: Tensor, nodes_BnD: Tensor, there_Bn: Tensor, units_B: Tensor) -> Tensor:
        count_B1 = sum_of_units(units_B).to(mean_BF)
        total_BG = torch.cat([mean_BF * count_B1, count_B1, count_B1.log()], dim=-1)
        most_BD = nodes_BnD.masked_fill(~there_Bn.unsqueeze(-1), -torch.inf).amax(1)
        return self.mean(mean_BF) + self.total(total_BG) + self.most(most_BD)


class FactHead(nn.Module):
    """Logits [B,C] of the answers of all facts, one fact after the other, and how likely [B,C] that makes them.

    What is known of the composition is counted, not learned; where its answer is none of those, none is likely.
    """

    def __init__(self, config: MoietyBridgeConfig):
        super().__init__()
        facts = (config.facts or {}).items()
        self.answers = [len(answers) for _, answers in facts]
        columns = [(name, answer) for name, answers in facts for answer in answers]
        counted, compared = config.counted_facts or {}, config.compared_facts or {}
        self.handed = [name in (config.handed_facts or ()) for name, _ in columns]
        self.is_counted = [name in counted or name in compared for name, _ in columns]
        self.ranges = [counted.get(name, {}).get(answer, NEVER) for name, answer in columns]
        self.compared = [
            [
                columns.index(place)
                for place in ((name, how["first"]), (name, how["last"]), (how["fact"], how["answer"]))
            ]
            for name, how in compared.items()
        ]
        self.even = nn.Linear(config.bridge_config.hidden_size, len(columns))
        self.odd = nn.Linear(HANDED * config.bridge_config.num_pseudoscalars, len(columns), bias=False)

    def forward(self, even_BD: Tensor, odd_BO: Tensor, units_BV: Tensor) -> tuple[Tensor, Tensor]:
        """`units_BV`: see `unit_counts`."""
        here: dict[str, Any] = {"device": even_BD.device}
        learned_BC = self.even(even_BD) + self.odd(odd_BO) * torch.tensor(self.handed, **here)
        number_C, least_C, most_C = torch.tensor(self.ranges, **here).unbind(1)
        asked_BC = asked_counts(units_BV)[:, number_C]
        is_met_BC, is_counted_C = (asked_BC >= least_C) & (asked_BC <= most_C), torch.tensor(self.is_counted, **here)
        counted_BC = torch.where(is_met_BC, 0.0, -CERTAIN)
        logits_BC = torch.where(is_counted_C, counted_BC, learned_BC)
        share_BC = torch.cat([own.softmax(1) for own in logits_BC.split(self.answers, dim=1)], dim=1)
        return logits_BC, share_BC * (is_met_BC | ~is_counted_C)

    def compare(self, first_RC: Tensor, last_RC: Tensor) -> Tensor:
        """[R,C] how likely the answers about two structures are, from how likely answers about each are; else 0."""
        share_RC = torch.zeros_like(first_RC)
        for first, last, answer in self.compared:
            odds_R = first_RC[:, answer].float().logit(TINY) - last_RC[:, answer].float().logit(TINY)
            share_RC[:, first], share_RC[:, last] = odds_R.sigmoid(), (-odds_R).sigmoid()
        return share_RC


def asked_counts(units_BV: Tensor) -> Tensor:
    """[B,E+1] by atomic number; at 0 how many elements there are, and at -1 the atomic number of the heaviest."""
    atoms_BE = F.pad(units_BV, (0, max(0, FIRST_RESIDUE - units_BV.shape[1])))[:, :FIRST_RESIDUE]
    there_BE = atoms_BE[:, 1:] > 0
    heaviest_B = (there_BE * torch.arange(1, FIRST_RESIDUE, device=units_BV.device)).amax(1)
    return torch.cat([there_BE.sum(1, keepdim=True), atoms_BE[:, 1:], heaviest_B.unsqueeze(1)], dim=1)


@dataclass
class Structures:
    """What the bridge reads: tokens [sum of sizes, width], structure after structure, and a summary of each."""

    tokens: Tensor
    sizes: Tensor  # [B] tokens of each
    mean: Tensor  # [B,F] of the even invariants of its nodes, the same for its mirror image
    lengths: Tensor  # [B,L] of what its vectors and rank-2 features add up to, the same, too
    even: Tensor  # [B,D] the mean of its queries, the same for its mirror image
    odd: Tensor  # [B,HANDED*P] what changes sign in a mirror
    fact_logits: Tensor | None  # [B,C] of the answers of facts
    fact_shares: Tensor | None  # [B,C] how likely they are


class Bridge(nn.Module):
    """Node features [N,M,C] -> tokens of the language model. A structure of 0 queries has no tokens, but a summary."""

    def __init__(self, whole: MoietyBridgeConfig):
        super().__init__()
        config, width = whole.bridge_config, whole.text_config.hidden_size
        self.invariants = Invariants(whole.structure_config, config)
        self.even = nn.Linear(self.invariants.size, config.hidden_size)
        self.whole = Whole(self.invariants.size, config)
        self.node_norm = nn.RMSNorm(config.hidden_size)
        if config.kind == "resampler":
            self.queries = nn.Embedding(BUCKETS[-1], config.hidden_size)
            self.blocks = nn.ModuleList(ResamplerBlock(config) for _ in range(config.num_layers))
        else:
            inner = 4 * config.hidden_size
            self.spread = nn.Sequential(
                nn.Linear(config.hidden_size, inner), nn.SiLU(), nn.Linear(inner, BUCKETS[0] * config.hidden_size)
            )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, width)
        self.hand = Hand(config, width)
        self.facts = FactHead(whole) if whole.facts else None

    def forward(self, features_NMC: Tensor, graph_index: Tensor, num_queries_B: Tensor, units_BV: Tensor) -> Structures:
        """`units_BV`: see `unit_counts`."""
        even_NF, odd_NP = self.invariants(features_NMC)
        nodes_BnD, there_Bn = padded(self.node_norm(self.even(even_NF)), graph_index, num_queries_B.shape[0])
        mean_BF = mean_over(even_NF, graph_index, num_queries_B.shape[0])
        whole_BD = self.whole(mean_BF, nodes_BnD, there_Bn, units_BV.sum(1))
        odd_BnP, _ = padded(odd_NP, graph_index, num_queries_B.shape[0])
        asked_B = num_queries_B.clamp(min=BUCKETS[0])
        x_BKD = self.norm(self._queried(nodes_BnD, there_Bn, whole_BD, int(asked_B.max())))
        place_K = torch.arange(x_BKD.shape[1], device=x_BKD.device)
        share_BK = (place_K < asked_B.unsqueeze(-1)) / asked_B.unsqueeze(-1)
        hand_BKW, odd_BO = self.hand(nodes_BnD, odd_BnP, there_Bn)
        is_read_B = num_queries_B > 0
        kept_BK = torch.cat([place_K < num_queries_B.unsqueeze(-1), is_read_B.unsqueeze(-1).expand(-1, HANDED)], dim=1)
        even_BD = (x_BKD * share_BK.unsqueeze(-1)).sum(1)
        logits_BC, share_BC = (None, None) if self.facts is None else self.facts(even_BD, odd_BO, units_BV)
        return Structures(
            tokens=torch.cat([self.out(x_BKD), hand_BKW], dim=1)[kept_BK],
            sizes=num_queries_B + HANDED * is_read_B,
            mean=mean_BF,
            lengths=self.invariants.of_sums(features_NMC, graph_index, units_BV.sum(1)),
            even=even_BD,
            odd=odd_BO,
            fact_logits=logits_BC,
            fact_shares=share_BC,
        )

    def _queried(self, nodes_BnD: Tensor, there_Bn: Tensor, whole_BD: Tensor, most: int) -> Tensor:
        """[B,K,D]: queries, which know the mean node, that have read the nodes; of the baseline, a map of the mean.

        The baseline has a few tokens for any structure: where more are asked for, they come again.
        """
        if not hasattr(self, "blocks"):
            few_BKD = self.spread(whole_BD).unflatten(-1, (BUCKETS[0], -1))
            return few_BKD[:, torch.arange(most, device=few_BKD.device) % BUCKETS[0]]
        x_BKD = self.queries(torch.arange(most, device=nodes_BnD.device)) + whole_BD.unsqueeze(1)
        for block in self.blocks:
            x_BKD = block(x_BKD, nodes_BnD, there_Bn)
        return x_BKD


def sum_of_units(units_B: Tensor) -> Tensor:
    """[B,1] by which a mean over nodes becomes a sum over a unit, of about unit size."""
    return units_B.unsqueeze(-1).clamp(max=LARGE) / TYPICAL


def unit_counts(node_type: Tensor, graph_index: Tensor, pbc: Tensor) -> Tensor:
    """[B,V] nodes of each type, up to the last that there is, of packed structures.

    Of a periodic one of its reduced formula, so that a supercell has as many.

    Args:
        node_type: [N].
        graph_index: [N].
        pbc: [B,3].
    """
    graphs, types = pbc.shape[0], int(node_type.max()) + 1
    counts_BV = torch.bincount(graph_index * types + node_type, minlength=graphs * types).reshape(graphs, types)
    divisor_B = reduce(torch.gcd, counts_BV.unbind(1))
    return counts_BV // torch.where(pbc.any(-1), divisor_B, 1).unsqueeze(-1)


def query_counts(node_type: Tensor, graph_index: Tensor, pbc: Tensor, nodes_per_query: int) -> Tensor:
    """[B] query tokens of packed structures; a supercell has those of its smallest unit.

    Args:
        node_type: [N].
        graph_index: [N].
        pbc: [B,3].
        nodes_per_query: `BridgeConfig.nodes_per_query`.
    """
    units = unit_counts(node_type, graph_index, pbc).sum(1).tolist()
    return torch.tensor([num_queries(size, nodes_per_query) for size in units], device=pbc.device)


def mean_over(values_ND: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """[B,D] over the nodes of each structure."""
    sizes_B = torch.bincount(graph_index, minlength=num_graphs)
    return values_ND.new_zeros(num_graphs, values_ND.shape[-1]).index_add(
        0, graph_index, values_ND
    ) / sizes_B.unsqueeze(-1)


def padded(values_ND: Tensor, graph_index: Tensor, num_graphs: int) -> tuple[Tensor, Tensor]:
    """[B,n,D] with zeros where a structure has no node, and [B,n] bool where it has one."""
    sizes_B = torch.bincount(graph_index, minlength=num_graphs)
    place_N = torch.arange(graph_index.shape[0], device=graph_index.device)
    place_N = place_N - (sizes_B.cumsum(0) - sizes_B)[graph_index]
    most = int(sizes_B.max())
    there = torch.arange(most, device=graph_index.device) < sizes_B.unsqueeze(-1)
    return values_ND.new_zeros(num_graphs, most, values_ND.shape[-1]).index_put(
        (graph_index, place_N), values_ND
    ), there


__all__ = ["LEAST_SPREAD", "Bridge", "Structures", "mean_over", "query_counts", "unit_counts"]
