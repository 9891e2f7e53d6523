"""The block: local attention, global attention, tensor feed-forward, each behind one merged norm.

Every map that mixes channels is a plain `nn.Linear` over the last axis, one per degree, with bias at l = 0 alone.
So any low-rank update of any of them keeps the model equivariant.
"""
# Shapes: B structures, N nodes, K neighbours, M = (lmax + 1)^2 components, C channels, D edge channels, H heads.
# Steerable features are x_MNC, components first: every degree is then one contiguous slab, hence one GEMM, and what
# does not tell degrees apart is one kernel over all of them.

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .configuration_moiety import MoietyConfig
from .geometry_moiety import FRAME_DISTANCES, Group, Neighbors, symmetric_basis

EDGES_AT_ONCE = 8192  # on a CPU: what is computed on so many stays in its caches
LONGEST_REACH = 12.0  # Å: global attention between two atoms falls at least as exp(-r^2 / (2 * 12^2))


class ScaledLinear(nn.Linear):
    """`nn.Linear` whose initial weights are `gain` times the usual size.

    A block that starts close to the identity learns from fewer samples; docs/accuracy.md has the gains that were tried.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gain: float = 1.0):
        super().__init__(in_features, out_features, bias)
        self.gain = gain


class ZeroLinear(nn.Linear):
    """`nn.Linear` without bias that starts at zero, which takes no random numbers from the maps that follow.

    A base that has not learned what it reads leaves it so.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def matrix(linear: nn.Linear, like: Tensor) -> Tensor:
    """[in, out] of a linear map, whatever an adapter adds to it.

    Called once: ZeRO-3 gathers weights whenever a module is called, on all ranks, whose numbers of edges differ.
    Dropout of an adapter on it so drops inputs of all edges at once.
    """
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device))


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def full_precision(like: Tensor) -> torch.autocast:
    """Where autocast is on, it is for the linear maps: geometry, weights and products of features are exact."""
    return torch.autocast(like.device.type, enabled=False)


def by_degree(x_MNC: Tensor, lmax: int) -> tuple[Tensor, ...]:
    """The slabs [2l+1, N, C] of a steerable feature, one a degree."""
    return x_MNC.split([2 * degree + 1 for degree in range(lmax + 1)])


class DegreeLinear(nn.Module):
    """One `nn.Linear` per degree, from the slabs [2l+1, N, C] to as many steerable features [M, N, width] as widths."""

    def __init__(self, in_channels: int, widths: list[int], lmax: int, gain: float = 1.0):
        super().__init__()
        self.widths = widths
        self.degrees = nn.ModuleList(
            ScaledLinear(in_channels, sum(widths), bias=degree == 0, gain=gain) for degree in range(lmax + 1)
        )

    def forward(self, slabs: Sequence[Tensor]) -> list[Tensor]:
        images = [linear(x_l).to(x_l.dtype) for linear, x_l in zip(self.degrees, slabs, strict=True)]
        parts = [image.split(self.widths, dim=-1) for image in images]
        return [torch.cat(part) for part in zip(*parts, strict=True)]


def merged_norm(x_MNC: Tensor, lmax: int) -> Tensor:
    """RMS norm with one variance over all degrees, each degree weighing the same; linear maps that follow scale it.

    A norm per degree would blow noise up at sites whose symmetry makes a degree vanish.
    """
    square_MN = x_MNC.square().mean(-1)
    variance_N = torch.stack([slab.mean(0) for slab in by_degree(square_MN, lmax)]).mean(0)
    return x_MNC * torch.rsqrt(variance_N + 1e-6)[:, None]


def rms_normalize(x: Tensor, scale: float) -> Tensor:
    return x * (scale * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class LocalAttention(nn.Module):
    """Attention over neighbours whose queries are the centre's steerable features and whose keys are the edge alone.

    A_i = sum_j Y_ij (x) phi_ij g_j builds new directions from filters, T_i = sum_j a_ij V_j moves the steerable
    features of the neighbours. Filters phi and weights a are linear in the radial functions and in P_ij = Y_ij . X_i,
    the angle between the edge and what the centre already knows, and fade with the envelope. Between two residues they
    are linear in radial functions of the distances between their backbone atoms, too; that part starts at zero.

    The weights have a sign and no softmax: forces of molecules are learned to an error a tenth smaller so, with many
    weights of few channels, and a further inner product of centre and neighbour changes nothing (docs/accuracy.md).
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        self.lmax, self.width = config.lmax, config.edge_channels
        channels, width = config.hidden_size, config.edge_channels
        on_edges = width + config.num_weights
        self.content = nn.Linear(channels, width)  # g
        self.steerable = DegreeLinear(channels, [width, on_edges], config.lmax, gain=0.5)  # V, P
        self.filter = ScaledLinear(config.num_radial, on_edges, bias=False, gain=0.5)
        self.frames = ZeroLinear(FRAME_DISTANCES * config.num_radial, on_edges)
        self.out = DegreeLinear(2 * width, [channels], config.lmax, gain=0.25)

    def forward(self, x_MNC: Tensor, neighbors: Neighbors) -> Tensor:
        slabs = by_degree(x_MNC, self.lmax)
        content_ND = self.content(slabs[0].squeeze(0)).to(x_MNC.dtype)
        value_MND, angle_MNF = self.steerable(slabs)
        with full_precision(x_MNC):
            both_MNF = self._aggregate(content_ND, value_MND, angle_MNF, neighbors)
        return self.out(by_degree(both_MNF, self.lmax))[0]

    def _aggregate(self, content_ND: Tensor, value_MND: Tensor, angle_MNF: Tensor, neighbors: Neighbors) -> Tensor:
        """[M, N, 2D]: what is built, and what is moved."""
        layout, radial = neighbors.layout, neighbors.radial
        filter_RF, frames_RF = matrix(self.filter, radial), matrix(self.frames, radial)
        tables = [radial, neighbors.harmonics, neighbors.directions, layout.source, angle_MNF.transpose(0, 1)]
        if neighbors.frames is not None:
            tables.append(neighbors.framed_table(neighbors.frames @ frames_RF))
        else:  # they have a gradient all the same, zero: on all ranks alike
            filter_RF = torch.cat([filter_RF, frames_RF])[: radial.shape[-1]]
        on_edges = partial(self._on_edges, content_ND, filter_RF)
        if layout.pattern is None:  # a compiler wants one graph for all batches, whatever their number of parts
            built_NMD, weight_HNK = on_edges(*tables)
        else:
            rows = max(EDGES_AT_ONCE // layout.source.shape[1], 1)
            parts = [on_edges(*part) for part in zip(*(t.split(rows) for t in tables), strict=True)]
            built_NMD, weight_HNK = (joined(part, dim) for dim, part in enumerate(zip(*parts, strict=True)))
        value_HNF = value_MND.unflatten(-1, (len(weight_HNK), -1)).permute(2, 1, 0, 3).flatten(2)
        moved_HNF = neighbors.transport(weight_HNK, value_HNF)
        moved_MND = moved_HNF.unflatten(-1, (len(value_MND), -1)).permute(2, 1, 0, 3).flatten(2)
        return torch.cat([built_NMD.transpose(0, 1), moved_MND], dim=-1)

    def _on_edges(
        self,
        content_ND: Tensor,
        filter_RF: Tensor,
        radial: Tensor,
        harmonics: Tensor,
        directions: Tensor,
        source: Tensor,
        angle: Tensor,
        framed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is built [n,M,D], and the weights of the edges [H,n,K], of n rows of the tables."""
        edge_nKF = (radial @ filter_RF).baddbmm_(harmonics, angle, alpha=1 / (self.lmax + 1))
        if framed is not None:
            edge_nKF = edge_nKF.add_(framed)
        filter_nKD, weight_nKH = edge_nKF.split([self.width, edge_nKF.shape[-1] - self.width], dim=-1)
        content_nKD = content_ND.index_select(0, source.flatten()).view_as(filter_nKD)
        return torch.bmm(directions, filter_nKD * content_nKD), weight_nKH.permute(2, 0, 1).contiguous()


class GlobalAttention(nn.Module):
    """Attention over all nodes of a structure through fused kernels.

    Logits are inner products of same-degree features, so they are invariant. In open systems each head also subtracts
    |x_i - x_j|^2 / (2 ell^2) with ell at most 12 Å, written as extra columns of q and k: far-apart fragments do not see
    each other and energies stay additive. Periodic systems attend by content alone, which does not depend on the choice
    of the cell: every copy of an atom counts the same above and below the fraction.
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        self.lmax, self.num_heads = config.lmax, config.num_heads
        channels, heads = config.hidden_size, config.num_heads
        width = heads * math.ceil(config.edge_channels / (2 * heads))
        self.project = DegreeLinear(channels, [3 * width], config.lmax)
        self.reach = nn.Parameter(torch.zeros(self.num_heads))
        self.out = DegreeLinear(width, [channels], config.lmax, gain=0.25)

    def forward(self, x_MNC: Tensor, places: StructurePlaces) -> Tensor:
        (qkv_MNF,) = self.project(by_degree(x_MNC, self.lmax))
        with full_precision(x_MNC):  # distances are differences of large columns, which bfloat16 would blur
            y_MND = self._attend(qkv_MNF, places)
        return self.out(by_degree(y_MND, self.lmax))[0]

    def _attend(self, qkv_MNF: Tensor, places: StructurePlaces) -> Tensor:
        """[M, N, width]."""
        qkv_NH3F = qkv_MNF.unflatten(-1, (3, self.num_heads, -1)).permute(1, 3, 2, 0, 4).flatten(3)
        qk, v = qkv_NH3F.split([2, 1], dim=2)
        qk = rms_normalize(qk, scale=qk.shape[-1] ** -0.25)
        decay_H1 = (torch.sigmoid(self.reach) * 3 + 1)[:, None] / (2 * LONGEST_REACH**2)
        far, near = places.distance_columns
        columns = torch.stack(torch.broadcast_tensors(decay_H1 * far.unsqueeze(1), near.unsqueeze(1)), dim=2)
        # values get empty columns: fused kernels want q, k and v of one width
        qkv_NH3F = torch.cat([torch.cat([qk, columns], dim=-1), F.pad(v, (0, columns.shape[-1]))], dim=2)
        # a loss on forces differentiates their derivative again, which of the kernels only MATH can
        twice = self.training and far.requires_grad
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            y_NHF = places.attend(qkv_NH3F)[..., : v.shape[-1]]
        return y_NHF.unflatten(-1, (len(qkv_MNF), -1)).permute(2, 0, 1, 3).flatten(2)


class StructurePlaces:
    """Runs attention inside every structure, structures of like size in one call."""

    def __init__(self, positions: Tensor, is_open_N: Tensor, groups: list[Group]):
        self.groups = groups
        x = positions * is_open_N[:, None]  # no distance term in periodic systems
        one = is_open_N[:, None].to(x.dtype)
        square = x.square().sum(-1, keepdim=True)
        pad = torch.zeros_like(x)
        self.distance_columns = (torch.cat([square, one, x, pad], -1), torch.cat([-one, -square, 2 * x, pad], -1))

    def attend(self, qkv_NH3F: Tensor) -> Tensor:
        """Softmax attention inside each structure: [N, H, F]."""
        if len(self.groups) == 1:  # of all nodes, in order
            (group,) = self.groups
            if group.present is None:
                return _attention(qkv_NH3F.unflatten(0, group.node.shape), None).flatten(0, 1)
            return self._attend(qkv_NH3F, group)
        out = torch.zeros_like(qkv_NH3F[:, :, 0])
        for group in self.groups:
            index = group.node.flatten().index_select(0, group.taken)
            out = out.index_copy(0, index, self._attend(qkv_NH3F, group))
        return out

    @staticmethod
    def _attend(qkv_NH3F: Tensor, group: Group) -> Tensor:
        """Of the nodes of a group, row by row."""
        qkv_BnH3F = qkv_NH3F.index_select(0, group.node.flatten()).unflatten(0, group.node.shape)
        return _attention(qkv_BnH3F, group.present).flatten(0, 1).index_select(0, group.taken)


def _attention(qkv_BnH3F: Tensor, present_Bn: Tensor | None) -> Tensor:
    """[B, n, H, F]."""
    q, k, v = qkv_BnH3F.transpose(1, 2).unbind(3)
    mask = None if present_Bn is None else present_Bn[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2)


class TensorFeedForward(nn.Module):
    """Gated feed-forward with products of degrees, written with 3x3 matrices in place of Clebsch-Gordan tables.

    From two projections A, G of each degree: invariants <A_l, G_l>; and for l <= 2 the products M v, the symmetric
    traceless parts of v w^T and of M N + N M (all true tensors: parity (-1)^l). The condition of the structure shifts
    the scalars before their gate, and so scales every degree.
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        self.lmax = config.lmax
        channels, inner = config.hidden_size, config.hidden_size // 2
        self.hidden = nn.Linear(channels, 2 * channels)
        self.pair = DegreeLinear(channels, [inner, inner], config.lmax)
        self.mix = nn.Linear(inner * (config.lmax + 1), 2 * channels, bias=False)
        self.condition = ScaledLinear(channels, 2 * channels, bias=False, gain=0.0)
        self.gate = nn.Linear(channels, 2 * inner * config.lmax)
        widths = [channels, *[2 * inner] * config.lmax]
        self.out = nn.ModuleList(
            ScaledLinear(width, channels, bias=degree == 0, gain=0.1) for degree, width in enumerate(widths)
        )

    def forward(self, x_MNC: Tensor, condition_BC: Tensor, graph_index: Tensor) -> Tensor:
        slabs = by_degree(x_MNC, self.lmax)
        first, second = self.pair(slabs)
        invariants = [slab.sum(0) / math.sqrt(len(slab)) for slab in by_degree(first * second, self.lmax)]
        hidden = self.hidden(slabs[0].squeeze(0)) + self.mix(torch.cat(invariants, dim=-1))
        hidden = hidden + self.condition(condition_BC).index_select(0, graph_index)
        value, gate = hidden.chunk(2, dim=-1)
        scalar = value * F.silu(gate)
        gates = self.gate(scalar).chunk(self.lmax, dim=-1)
        a, g = by_degree(first, self.lmax), by_degree(second, self.lmax)
        with full_precision(x_MNC):
            products = self._products(a[1:], g[1:])
        out = [self.out[0](scalar).unsqueeze(0)]
        for degree in range(1, self.lmax + 1):
            both = torch.cat([a[degree], products[degree - 1]], dim=-1) * gates[degree - 1]
            out.append(self.out[degree](both))
        return torch.cat(out)

    def _products(self, a: tuple[Tensor, ...], g: tuple[Tensor, ...]) -> list[Tensor]:
        """Per degree l >= 1 a product of the projections: [2l+1, N, C/2]."""
        v, w = a[0], g[0]
        if self.lmax == 1:  # the only vector that two vectors give without a cross product: v |w|
            return [v * (w.square().mean(0) + 1e-6).sqrt()]
        basis = symmetric_basis(v).flatten(1)
        m, n = ((basis.T @ t.flatten(1)).view(3, 3, *t.shape[1:]) for t in (a[1], g[1]))
        vector = (m * w).sum(1) + (n * v).sum(1)
        matrix = v.unsqueeze(1) * w
        for column, row in zip(m.unbind(1), n.unbind(0), strict=True):
            matrix = torch.addcmul(matrix, column.unsqueeze(1), row)
        return [vector, (basis @ matrix.flatten(0, 1).flatten(1)).view_as(a[1])]  # takes the symmetric traceless part


class Block(nn.Module):
    """Local attention, beside it in some blocks global attention, then feed-forward."""

    def __init__(self, config: MoietyConfig, with_global: bool):
        super().__init__()
        self.lmax = config.lmax
        self.local_attention = LocalAttention(config)
        if with_global:
            self.global_attention = GlobalAttention(config)
        self.with_global = with_global
        self.feed_forward = TensorFeedForward(config)

    def forward(
        self, x_MNC: Tensor, neighbors: Neighbors, places: StructurePlaces, condition_BC: Tensor, graph_index: Tensor
    ) -> Tensor:
        y_MNC = merged_norm(x_MNC, self.lmax)
        x_MNC = x_MNC + self.local_attention(y_MNC, neighbors)
        if self.with_global:
            x_MNC = x_MNC + self.global_attention(y_MNC, places)
        return x_MNC + self.feed_forward(merged_norm(x_MNC, self.lmax), condition_BC, graph_index)
