"""The block: local enveloped attention, global attention, tensor feed-forward, each behind one merged norm.

Every map that mixes channels is a plain `nn.Linear` over the last axis, one per degree, with bias at l = 0 alone.
So any low-rank update of any of them keeps the model equivariant.
"""
# Shapes: B structures, N nodes, K neighbours, M = (lmax + 1)^2 components, C channels, D edge channels, H heads.
# A steerable feature is a list, degree l -> [N, 2l + 1, C]: each degree lies contiguous, one GEMM a degree.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_moiety import MoietyConfig
from .geometry_moiety import Neighbors, symmetric_basis

Steerable = list[Tensor]

TYPICAL_DEGREE = 16.0  # a constant: dividing by the actual number of neighbours would jump at the cutoff
LONGEST_REACH = 12.0  # Å: global attention between two atoms falls at least as exp(-r^2 / (2 * 12^2))


class ScaledLinear(nn.Linear):
    """`nn.Linear` whose initial weights are `gain` times the usual size."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gain: float = 1.0):
        super().__init__(in_features, out_features, bias)
        self.gain = gain


class DegreeLinear(nn.Module):
    """One `nn.Linear` per degree: [N, 2l+1, C_in] -> [N, 2l+1, C_out[l]]."""

    def __init__(self, in_channels: int, out_channels: list[int], gain: float = 1.0):
        super().__init__()
        self.degrees = nn.ModuleList(
            ScaledLinear(in_channels, channels, bias=degree == 0, gain=gain)
            for degree, channels in enumerate(out_channels)
        )

    def forward(self, x: Steerable) -> Steerable:
        return [linear(x_l) for linear, x_l in zip(self.degrees, x, strict=True)]


class MergedNorm(nn.Module):
    """RMS norm with one variance over all degrees (each degree weighs the same), scalars centred first.

    A norm per degree would blow noise up at sites whose symmetry makes a degree vanish.
    """

    def __init__(self, channels: int, lmax: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Steerable) -> Steerable:
        centred = [x[0] - x[0].mean(-1, keepdim=True), *x[1:]]
        variance = torch.stack([x_l.square().mean(dim=(1, 2)) for x_l in centred]).mean(0)[:, None, None]
        scale = torch.rsqrt(variance + 1e-6)
        y = [x_l * scale * self.weight[degree] for degree, x_l in enumerate(centred)]
        y[0] = y[0] + self.bias
        return y


def rms_normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def join(x: Steerable) -> Tensor:
    """[N, M, C] of a steerable feature."""
    return torch.cat(x, dim=1)


def split(x_NMC: Tensor, lmax: int) -> Steerable:
    return list(x_NMC.split([2 * degree + 1 for degree in range(lmax + 1)], dim=1))


class LocalAttention(nn.Module):
    """Geometric attention over neighbours.

    A_i = sum_j u_ij Y_ij (x) phi_ij builds new directions from filters, T_i = sum_j alpha_ij V_j moves the steerable
    features of the neighbours. alpha_ij = u_ij exp(a_ij) / (exp(b) + sum_k u_ik exp(a_ik)) is smooth when a neighbour
    enters or leaves. P_ij = Y_ij . X_i is the angle between the edge and what the centre already knows.
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        self.lmax, self.num_heads = config.lmax, config.num_heads
        channels, edge_channels = config.hidden_size, config.edge_channels
        higher = [2 * edge_channels] * config.lmax
        self.project = DegreeLinear(channels, [5 * edge_channels, *higher])  # l=0: q k g v a, l>0: v a
        self.filter = nn.Linear(config.num_radial, edge_channels, bias=False)
        self.radial_logit = nn.Linear(config.num_radial, self.num_heads, bias=False)
        self.angle_logit = nn.Linear(edge_channels, self.num_heads, bias=False)
        self.sink = nn.Parameter(torch.zeros(self.num_heads))
        self.out = DegreeLinear(2 * edge_channels, [channels] * (config.lmax + 1), gain=0.5)

    def forward(self, x: Steerable, neighbors: Neighbors) -> Steerable:
        num_nodes, _, width = neighbors.harmonics.shape
        heads = self.num_heads
        scalars, *higher = self.project(x)
        q, k, g, v0, a0 = scalars.chunk(5, dim=-1)
        moved, angles = zip(*[(v0, a0), *(y.chunk(2, dim=-1) for y in higher)], strict=True)
        angle_NMD = torch.cat(angles, dim=1)
        channels = angle_NMD.shape[-1]

        q, k = (rms_normalize(t.view(num_nodes, heads, -1)) for t in (q, k))
        g_j = neighbors.gather(g.squeeze(1))

        angle_NKD = torch.bmm(neighbors.harmonics, angle_NMD) / math.sqrt(width)
        logit_NKH = self.radial_logit(neighbors.radial) + self.angle_logit(angle_NKD)
        logit_NKH = logit_NKH + neighbors.dot(q, k) / math.sqrt(channels // heads)
        alpha_NKH = self._weights(logit_NKH, neighbors.envelope)
        transported = neighbors.transport(alpha_NKH, torch.cat(moved, dim=1))

        message_NKD = (self.filter(neighbors.radial) + angle_NKD) * g_j
        built = torch.bmm(neighbors.fading_harmonics, message_NKD) / math.sqrt(TYPICAL_DEGREE)
        return self.out(split(torch.cat([built, transported], dim=-1), self.lmax))

    def _weights(self, logit_NKH: Tensor, envelope_NK: Tensor) -> Tensor:
        peak = torch.maximum(logit_NKH.amax(1, keepdim=True), self.sink).detach()
        weight = envelope_NK.unsqueeze(-1) * torch.exp(logit_NKH - peak)
        return weight / (torch.exp(self.sink - peak) + weight.sum(1, keepdim=True))


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
        channels, width = config.hidden_size, config.edge_channels
        self.project = DegreeLinear(channels, [3 * width] * (config.lmax + 1))
        self.reach = nn.Parameter(torch.zeros(self.num_heads))
        self.out = DegreeLinear(width, [channels] * (config.lmax + 1), gain=0.5)

    def forward(self, x: Steerable, places: StructurePlaces) -> Steerable:
        heads = self.num_heads
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(2)  # [N, H, M * d]
            for part in join(self.project(x)).chunk(3, dim=-1)
        )
        width = v.shape[-1]
        q, k = rms_normalize(q), rms_normalize(k)
        q, k = q / width**0.25, k / width**0.25
        decay_H1 = (torch.sigmoid(self.reach) * 3 + 1)[:, None] / (2 * LONGEST_REACH**2)
        far, near = places.distance_columns
        q = torch.cat([q, decay_H1 * far.unsqueeze(1)], dim=-1)
        k = torch.cat([k, near.unsqueeze(1).expand(-1, heads, -1)], dim=-1)
        y_NHF = places.attend(q, k, v)
        y_NMD = y_NHF.unflatten(-1, ((self.lmax + 1) ** 2, -1)).transpose(1, 2).flatten(2)
        return self.out(split(y_NMD, self.lmax))


class StructurePlaces:
    """Which nodes belong together: runs attention inside every structure, structures of like size in one call."""

    def __init__(self, positions: Tensor, graph_index: Tensor, is_open_B: Tensor):
        count_B = torch.bincount(graph_index, minlength=len(is_open_B))
        start_B = count_B.cumsum(0) - count_B
        bucket_B = torch.log2(count_B.clamp(min=4).double()).mul(2).ceil()  # sizes within a factor of sqrt(2)
        self.groups: list[tuple[Tensor, Tensor | None]] = []
        for bucket in bucket_B.unique():
            graphs = (bucket_B == bucket).nonzero().squeeze(1)
            most = int(count_B[graphs].max())
            slot = torch.arange(most, device=positions.device)
            present = slot < count_B[graphs, None]  # [b, n]
            node = torch.where(present, start_B[graphs, None] + slot, start_B[graphs, None])
            self.groups.append((node, None if bool(present.all()) else present))
        x = positions * is_open_B[graph_index, None]  # no distance term in periodic systems
        one = is_open_B[graph_index, None].to(x.dtype)
        square = x.square().sum(-1, keepdim=True)
        pad = x.new_zeros(len(x), 3)  # kernels like widths that are multiples of 8
        self.distance_columns = (torch.cat([square, one, x, pad], -1), torch.cat([-one, -square, 2 * x, pad], -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of [N, H, F] queries, keys and values inside each structure: [N, H, F]."""
        out = torch.zeros_like(v)
        for node, present in self.groups:
            flat = node.flatten()
            q_g, k_g, v_g = (t.index_select(0, flat).unflatten(0, node.shape).transpose(1, 2) for t in (q, k, v))
            mask = None if present is None else present[:, None, None, :]
            y = F.scaled_dot_product_attention(q_g, k_g, v_g, attn_mask=mask, scale=1.0).transpose(1, 2)
            index, rows = (flat, y.flatten(0, 1)) if present is None else (node[present], y[present])
            out = out.index_copy(0, index, rows)
        return out


class TensorFeedForward(nn.Module):
    """Gated feed-forward with products of degrees, written with 3x3 matrices in place of Clebsch-Gordan tables.

    From two projections A, G of each degree: invariants <A_l, G_l>; and for l <= 2 the products M v, the symmetric
    traceless parts of v w^T and of M N + N M (all true tensors: parity (-1)^l).
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        self.lmax = config.lmax
        channels, inner = config.hidden_size, config.hidden_size // 2
        self.inner = inner
        self.project = DegreeLinear(channels, [2 * channels + 2 * inner, *[2 * inner] * config.lmax])
        self.mix = nn.Linear(inner * (config.lmax + 1), 2 * channels)
        self.gate = nn.Linear(channels, 2 * inner * config.lmax)
        products = [channels, *[2 * inner] * config.lmax]
        self.out = nn.ModuleList(
            ScaledLinear(width, channels, bias=degree == 0, gain=0.5) for degree, width in enumerate(products)
        )

    def forward(self, x: Steerable) -> Steerable:
        scalars, *higher = self.project(x)
        hidden, first, second = scalars.split([2 * x[0].shape[-1], self.inner, self.inner], dim=-1)
        pairs = [(first, second), *(y.chunk(2, dim=-1) for y in higher)]
        invariants = [(a * g).sum(1, keepdim=True) / math.sqrt(a.shape[1]) for a, g in pairs]
        value, gate = (hidden + self.mix(torch.cat(invariants, dim=-1))).chunk(2, dim=-1)
        scalar = value * F.silu(gate)
        gates = self.gate(scalar).chunk(self.lmax, dim=-1)
        products = self._products(pairs[1:])
        out = [self.out[0](scalar)]
        for degree in range(1, self.lmax + 1):
            own, _ = pairs[degree]
            joined = torch.cat([own, products[degree - 1]], dim=-1) * gates[degree - 1]
            out.append(self.out[degree](joined))
        return out

    def _products(self, pairs: list[tuple[Tensor, Tensor]]) -> Steerable:
        """Per degree l >= 1 a product of the projections: [N, 2l+1, C/2]."""
        v, w = pairs[0]
        if self.lmax == 1:  # the only vector that two vectors give without a cross product: v |w|
            return [v * (w.square().mean(1, keepdim=True) + 1e-6).sqrt()]
        basis = symmetric_basis(v)
        m, n = (torch.einsum("sab,nsc->nabc", basis, t) for t in pairs[1])
        vector = (m * w.unsqueeze(1)).sum(2) + (n * v.unsqueeze(1)).sum(2)
        matrix = v.unsqueeze(2) * w.unsqueeze(1) + torch.einsum("nabc,nbdc->nadc", m, n)
        return [vector, torch.einsum("sab,nabc->nsc", basis, matrix)]  # the basis takes the symmetric traceless part


class Block(nn.Module):
    """Local attention, global attention (in some blocks), feed-forward; conditioning enters before the last."""

    def __init__(self, config: MoietyConfig, with_global: bool):
        super().__init__()
        channels, lmax = config.hidden_size, config.lmax
        self.local_norm = MergedNorm(channels, lmax)
        self.local_attention = LocalAttention(config)
        if with_global:
            self.global_norm = MergedNorm(channels, lmax)
            self.global_attention = GlobalAttention(config)
        self.with_global = with_global
        self.film = ScaledLinear(channels, (lmax + 2) * channels, gain=0.0)
        self.feed_norm = MergedNorm(channels, lmax)
        self.feed_forward = TensorFeedForward(config)

    def forward(
        self, x: Steerable, neighbors: Neighbors, places: StructurePlaces, condition_BC: Tensor, graph_index: Tensor
    ) -> Steerable:
        x = add(x, self.local_attention(self.local_norm(x), neighbors))
        if self.with_global:
            x = add(x, self.global_attention(self.global_norm(x), places))
        shift, *scales = self.film(condition_BC)[graph_index].unsqueeze(1).chunk(len(x) + 1, dim=-1)
        y = [y_l * (1 + scale) for y_l, scale in zip(self.feed_norm(x), scales, strict=True)]
        y[0] = y[0] + shift
        return add(x, self.feed_forward(y))


def add(x: Steerable, y: Steerable) -> Steerable:
    return [a + b for a, b in zip(x, y, strict=True)]
