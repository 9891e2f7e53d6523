"""Closed forms on edges: harmonics, radial basis, envelope; and the neighbours of every node as one dense table."""
# Shapes: N nodes, E edges, K most neighbours of a node, M = (lmax + 1)^2 components, R radial functions, C channels.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_PAIRS_PER_NEIGHBOR = 8  # above this ratio copying each neighbour's values is cheaper than a product over all pairs


def spherical_harmonics(unit_E3: Tensor, lmax: int) -> Tensor:
    """Real spherical harmonics [E,M], component-normalised: the squares of each degree sum to 2l + 1.

    Order: 1; (x, y, z); (xy, yz, 3z^2 - 1, xz, x^2 - y^2).
    """
    x, y, z = unit_E3.unbind(-1)
    parts = [torch.ones_like(x), math.sqrt(3) * x, math.sqrt(3) * y, math.sqrt(3) * z]
    if lmax == 2:
        s15 = math.sqrt(15)
        parts += [s15 * x * y, s15 * y * z, math.sqrt(5) / 2 * (3 * z * z - 1), s15 * x * z, s15 / 2 * (x * x - y * y)]
    return torch.stack(parts, dim=-1)


def radial_basis(x_E: Tensor, num_radial: int) -> Tensor:
    """sqrt(2) sin(n pi x) / x on (0, 1), n = 1..R (DimeNet, arXiv 2003.03123, eq. 7). [E,R]."""
    n = torch.arange(1, num_radial + 1, device=x_E.device, dtype=x_E.dtype)
    return math.sqrt(2) * torch.sin(math.pi * n * x_E[:, None]) / x_E[:, None]


def envelope(x_E: Tensor, p: int = 5) -> Tensor:
    """Polynomial that falls from 1 at x = 0 to 0 at x = 1 with two vanishing derivatives (DimeNet, eq. 8)."""
    u = 1 - (p + 1) * (p + 2) / 2 * x_E**p + p * (p + 2) * x_E ** (p + 1) - p * (p + 1) / 2 * x_E ** (p + 2)
    return u * (x_E < 1)


def symmetric_basis(like: Tensor) -> Tensor:
    """[5,3,3] orthonormal basis of the symmetric traceless matrices, in the order of the l = 2 harmonics."""
    a, b, c = 1 / math.sqrt(2), 1 / math.sqrt(6), 2 / math.sqrt(6)
    basis = [
        [[0, a, 0], [a, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, a], [0, a, 0]],
        [[-b, 0, 0], [0, -b, 0], [0, 0, c]],
        [[0, 0, a], [0, 0, 0], [a, 0, 0]],
        [[a, 0, 0], [0, -a, 0], [0, 0, 0]],
    ]
    return torch.tensor(basis, dtype=like.dtype, device=like.device)


def mean_per_graph(x_N: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Mean of x [N, ...] over the nodes of each structure: [B, ...]."""
    count_B = torch.bincount(graph_index, minlength=num_graphs).clamp(min=1).to(x_N.dtype)
    return sum_per_graph(x_N, graph_index, num_graphs) / count_B.view(-1, *[1] * (x_N.dim() - 1))


def sum_per_graph(x_N: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Sum of x [N, ...] over the nodes of each structure: [B, ...]."""
    return x_N.new_zeros(num_graphs, *x_N.shape[1:]).index_add(0, graph_index, x_N)


@dataclass
class Pairs:
    """Structures padded to the largest, for products over all pairs of nodes; n nodes in the largest."""

    node: Tensor  # [B, n] node in each place (the first node where the place is empty)
    place: Tensor  # [N] place of each node, in B * n
    pair: Tensor  # [N*K] place of each neighbour entry, in B * n * n

    @classmethod
    def build(cls, graph_index: Tensor, source: Tensor, most: int) -> Pairs | None:
        """None where the structures are so large that pairs would far outnumber neighbours."""
        num_nodes = len(graph_index)
        count_B = torch.bincount(graph_index)
        largest = int(count_B.max())
        if len(count_B) * largest**2 > MOST_PAIRS_PER_NEIGHBOR * num_nodes * most:
            return None
        start_B = count_B.cumsum(0) - count_B
        slot = torch.arange(largest, device=source.device)
        node_Bn = torch.where(slot < count_B[:, None], start_B[:, None] + slot, start_B[:, None])
        place_N = (
            torch.arange(num_nodes, device=source.device)
            + (largest * torch.arange(len(count_B)).to(source) - start_B)[graph_index]
        )
        column = (place_N % largest)[source]
        return cls(node=node_Bn, place=place_N, pair=(place_N * largest).repeat_interleave(most) + column)


@dataclass
class Neighbors:
    """What the blocks need of the edges, as dense [N, K, ...] tables; empty places have envelope 0.

    A node's neighbours are then rows of a small matrix, and both aggregations of a block are matrix products.
    """

    source: Tensor  # [N*K] node at the other end; the node itself in empty places
    radial: Tensor  # [N, K, R]
    harmonics: Tensor  # [N, K, M]
    envelope: Tensor  # [N, K]
    fading_harmonics: Tensor  # [N, M, K] harmonics times envelope
    pairs: Pairs | None

    @classmethod
    def build(
        cls,
        vector_E3: Tensor,
        x_E: Tensor,
        edge_index: Tensor,
        graph_index: Tensor,
        num_radial: int,
        lmax: int,
    ) -> Neighbors:
        """Tables from edges sorted by destination (row 1 of edge_index).

        Args:
            vector_E3: from destination to source, Å.
            x_E: length of each edge as a share of its cutoff.
        """
        num_nodes = len(graph_index)
        source, destination = edge_index
        degree_N = torch.bincount(destination, minlength=num_nodes)
        most = max(int(degree_N.max()), 1)
        first_edge_N = degree_N.cumsum(0) - degree_N
        place_E = destination * most + torch.arange(len(source), device=source.device) - first_edge_N[destination]
        unit_E3 = vector_E3 / vector_E3.norm(dim=-1, keepdim=True)
        features_E = torch.cat(
            [radial_basis(x_E, num_radial), spherical_harmonics(unit_E3, lmax), envelope(x_E)[:, None]], dim=-1
        )
        table = features_E.new_zeros(num_nodes * most, features_E.shape[-1]).index_copy(0, place_E, features_E)
        radial, harmonics, u = table.view(num_nodes, most, -1).split([num_radial, (lmax + 1) ** 2, 1], dim=-1)
        own = torch.arange(num_nodes, device=source.device).repeat_interleave(most)
        source = own.index_copy(0, place_E, source)
        u, harmonics = u.squeeze(-1).contiguous(), harmonics.contiguous()
        return cls(
            source=source,
            radial=radial.contiguous(),
            harmonics=harmonics,
            envelope=u,
            fading_harmonics=(harmonics * u.unsqueeze(-1)).transpose(1, 2).contiguous(),
            pairs=Pairs.build(graph_index, source, most),
        )

    def gather(self, x_ND: Tensor) -> Tensor:
        """[N, K, D] features of the neighbours."""
        return x_ND.index_select(0, self.source).view(*self.envelope.shape, -1)

    def dot(self, q_NHd: Tensor, k_NHd: Tensor) -> Tensor:
        """Inner products q_i . k_j of every node with its neighbours [N, K, H]; by pairs where structures are small."""
        if self.pairs is None:
            return torch.einsum("nhd,nkhd->nkh", q_NHd, self.gather(k_NHd.flatten(1)).unflatten(-1, k_NHd.shape[1:]))
        node_Bn = self.pairs.node
        q, k = (t.index_select(0, node_Bn.flatten()).unflatten(0, node_Bn.shape) for t in (q_NHd, k_NHd))
        product_BnnH = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).permute(0, 2, 3, 1)
        return product_BnnH.flatten(0, 2).index_select(0, self.pairs.pair).view(*self.envelope.shape, -1)

    def transport(self, alpha_NKH: Tensor, value_NMD: Tensor) -> Tensor:
        """sum_j alpha_ij^h value_j [N, M, D], head h acting on the h-th part of the channels.

        Periodic images of one neighbour carry the same value, so where structures are small their weights are added
        up to a matrix over pairs of nodes and no value is copied (1.4 times faster on small molecules); large
        structures gather.
        """
        heads, width = alpha_NKH.shape[-1], value_NMD.shape[1]
        if self.pairs is None:
            value_j = self.gather(value_NMD.flatten(1)).unflatten(-1, (width, heads, -1))
            return torch.einsum("nkh,nkmhd->nmhd", alpha_NKH, value_j).flatten(2)
        num_graphs, largest = self.pairs.node.shape
        alpha = alpha_NKH.new_zeros(num_graphs * largest**2, heads).index_add(
            0, self.pairs.pair, alpha_NKH.flatten(0, 1)
        )
        alpha = alpha.view(num_graphs, largest, largest, heads).permute(0, 3, 1, 2)
        value = value_NMD.index_select(0, self.pairs.node.flatten()).view(num_graphs, largest, width, heads, -1)
        moved = (alpha @ value.permute(0, 3, 1, 2, 4).flatten(3)).unflatten(-1, (width, -1))  # [B, H, n, M, d]
        return moved.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1).index_select(0, self.pairs.place)
