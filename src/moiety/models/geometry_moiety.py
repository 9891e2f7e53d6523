"""Closed forms on edges: harmonics, radial basis, envelope; and the neighbours of every node as one dense table."""
# Shapes: B structures, N nodes, E edges, K most neighbours of a node, M = (lmax + 1)^2 components, R radial functions,
# C channels.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .sparse_moiety import Pattern, available, sparse_product

TYPICAL_DEGREE = 16.0  # a constant: dividing by the actual number of neighbours would jump at the cutoff
STRETCHED = 1.25  # sums of covalent radii: a bond. Bonds of `interactions` and S22 reach 1.12, contacts begin at 1.31
FRAME_DISTANCES = 16  # from N, C, O and CB of one residue to those of another


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


def frame_basis(vector_E3: Tensor, node_vectors: Tensor, ends: Tensor, cutoff: float, num_radial: int) -> Tensor:
    """Radial functions of the distances between N, C, O and CB of one residue and those of another: [E, 16 R].

    Args:
        vector_E3: from destination to source, Å.
        node_vectors: [N,4,3] offsets of the four atoms, Å.
        ends: [2,E] source and destination of each edge.
        cutoff: of the distance between the two residues, Å; their atoms may be further apart, or closer.
    """
    there_E43, here_E43 = node_vectors[ends[0]], node_vectors[ends[1]]
    apart_E443 = vector_E3[:, None, None] + there_E43[:, None] - here_E43[:, :, None]
    x = (apart_E443.norm(dim=-1) / cutoff).clamp(min=0.05)  # a broken model may have two atoms in one place
    return radial_basis(x.flatten(), num_radial).view(x.shape[0], -1)


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


def molecule_of(edge_index: Tensor, length_E: Tensor, radius_N: Tensor) -> Tensor:
    """The first atom of the molecule of each node: [N]. Bonds are edges up to 1.25 times the sum of two radii.

    Args:
        edge_index: [2,E] both directions of every edge.
        length_E: Å.
        radius_N: covalent radii, Å; NaN where a node has no bonds.
    """
    source, destination = edge_index[:, length_E < STRETCHED * radius_N[edge_index].sum(0)]
    first_N = torch.arange(radius_N.shape[0], device=radius_N.device)
    while True:  # some log N times, for what is found out reaches all that is known to hang together
        lower_N = first_N.scatter_reduce(0, destination, first_N[source], "amin")
        lower_N = lower_N[lower_N]
        if torch.equal(lower_N, first_N):
            return first_N
        first_N = lower_N


def mean_per_graph(x_N: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Mean of x [N, ...] over the nodes of each structure: [B, ...]."""
    count_B = sum_per_graph(torch.ones_like(graph_index, dtype=x_N.dtype), graph_index, num_graphs).clamp(min=1)
    return sum_per_graph(x_N, graph_index, num_graphs) / count_B.view(-1, *[1] * (x_N.dim() - 1))


def softmax_per_graph(logit_NH: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Weights of the nodes of each structure, which add up to 1 in every column: [N,H]."""
    of_node = graph_index[:, None].expand_as(logit_NH)
    top_BH = logit_NH.new_full((num_graphs, logit_NH.shape[1]), -math.inf)
    top_BH = top_BH.scatter_reduce(0, of_node, logit_NH.detach(), "amax")
    weight_NH = (logit_NH - top_BH[graph_index]).exp()
    return weight_NH / sum_per_graph(weight_NH, graph_index, num_graphs)[graph_index]


def sum_per_graph(x_N: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Sum of x [N, ...] over the nodes of each structure: [B, ...]."""
    return x_N.new_zeros(num_graphs, *x_N.shape[1:]).index_add(0, graph_index, x_N)


@dataclass
class Group:
    """Structures of like size, one a row.

    Attributes:
        node: [b,n] their nodes; the first node again in empty places.
        present: [b,n] whether a place is taken; None where all are.
        taken: [N of them] the taken places among the b*n.
    """

    node: Tensor
    present: Tensor | None
    taken: Tensor


@dataclass
class Layout:
    """Which nodes meet: indices alone, whose sizes depend on the data. What is computed from them has a fixed form.

    Attributes:
        source: [N,K] node at the other end of each edge; the node itself in empty places.
        place: [E] where each edge stands in a table [N*K].
        framed: [E of them] the edges between two residues with backbones; None where there are none.
        pattern: of all attention weights of the edges; None where values are gathered.
        groups: all structures, those of like size together.
    """

    source: Tensor
    place: Tensor
    framed: Tensor | None
    pattern: Pattern | None
    groups: list[Group]

    @classmethod
    def build(
        cls,
        edge_index: Tensor,
        graph_index: Tensor,
        node_vectors: Tensor | None,
        num_graphs: int,
        num_weights: int,
        for_compiler: bool = False,
    ) -> Layout:
        """From edges sorted by destination (row 1 of edge_index).

        Args:
            node_vectors: [N,4,3] offsets of backbone atoms, zero where there are none.
            for_compiler: one padded group and no sparse products, so that every batch is computed by the same graph.
        """
        device, num_nodes = edge_index.device, len(graph_index)
        source, destination = edge_index
        degree_N = torch.bincount(destination, minlength=num_nodes)
        most = max(int(degree_N.max()), 1)
        first_edge_N = degree_N.cumsum(0) - degree_N
        place_E = destination * most + torch.arange(len(source), device=device) - first_edge_N[destination]
        own = torch.arange(num_nodes, device=device).repeat_interleave(most)
        source = own.index_copy(0, place_E, source)
        framed_E = source[:0] if node_vectors is None else _framed(edge_index, node_vectors)
        # torch cuts a pattern that has more places than its matrix: a small cell with many images gathers
        sparse = not for_compiler and available(device) and most <= num_nodes
        return cls(
            source=source.view(num_nodes, most),
            place=place_E,
            framed=framed_E if len(framed_E) else None,
            pattern=Pattern.build(source, most, num_weights) if sparse else None,
            groups=_groups(graph_index, num_graphs, one=for_compiler),
        )


def _framed(edge_index: Tensor, node_vectors: Tensor) -> Tensor:
    """Edges whose two ends have backbones."""
    return node_vectors.flatten(1).any(1)[edge_index].all(0).nonzero().squeeze(1)


def _groups(graph_index: Tensor, num_graphs: int, one: bool) -> list[Group]:
    """Structures whose sizes are within a factor of sqrt(2); or all in `one`."""
    count_B = torch.bincount(graph_index, minlength=num_graphs)
    start_B = count_B.cumsum(0) - count_B
    bucket_B = torch.zeros_like(count_B) if one else torch.log2(count_B.clamp(min=4).double()).mul(2).ceil()
    groups = []
    for bucket in bucket_B.unique():
        graphs = (bucket_B == bucket).nonzero().squeeze(1)
        slot = torch.arange(int(count_B[graphs].max()), device=graph_index.device)
        present = slot < count_B[graphs, None]  # [b, n]
        node = torch.where(present, start_B[graphs, None] + slot, start_B[graphs, None])
        taken = present.flatten().nonzero().squeeze(1)
        groups.append(Group(node, present if one or len(taken) < node.numel() else None, taken))
    return groups


@dataclass
class Neighbors:
    """What the blocks need of the edges, as dense [N, K, ...] tables; empty places are zero.

    A node's neighbours are then rows of a small matrix, and both aggregations of a block are matrix products.
    """

    layout: Layout
    radial: Tensor  # [N, K, R] radial functions times the envelope over sqrt(TYPICAL_DEGREE)
    harmonics: Tensor  # [N, K, M] times the same
    directions: Tensor  # [N, M, K] harmonics alone
    frames: Tensor | None  # [F, 16 R] times the same: of the edges in `layout.framed`, which are few of the places

    @classmethod
    def build(
        cls, layout: Layout, vector_E3: Tensor, x_E: Tensor, num_radial: int, lmax: int, frames: Tensor | None
    ) -> Neighbors:
        """Tables of edges.

        Args:
            vector_E3: from destination to source, Å.
            x_E: length of each edge as a share of its cutoff.
            frames: `frame_basis` of the edges in `layout.framed`.
        """
        harmonics_EM = spherical_harmonics(vector_E3 / vector_E3.norm(dim=-1, keepdim=True), lmax)
        fade_E1 = envelope(x_E)[:, None] / math.sqrt(TYPICAL_DEGREE)
        features_E = torch.cat([radial_basis(x_E, num_radial) * fade_E1, harmonics_EM * fade_E1, harmonics_EM], dim=-1)
        table = features_E.new_zeros(layout.source.numel(), features_E.shape[-1])
        table = table.index_copy(0, layout.place, features_E).view(*layout.source.shape, -1)
        radial, harmonics, directions = table.split([num_radial, *[(lmax + 1) ** 2] * 2], dim=-1)
        if frames is not None:
            frames = frames * fade_E1[layout.framed]
        tables = (radial.contiguous(), harmonics.contiguous(), directions.transpose(1, 2).contiguous())
        return cls(layout, *tables, frames)

    def framed_table(self, values_FX: Tensor) -> Tensor:
        """[N, K, X] values of the edges between two residues, and zero elsewhere."""
        source, place = self.layout.source, self.layout.place[self.layout.framed]
        table = values_FX.new_zeros(source.numel(), values_FX.shape[-1])
        return table.index_copy(0, place, values_FX).view(*source.shape, -1)

    def transport(self, weight_HNK: Tensor, value_HNF: Tensor) -> Tensor:
        """sum_j weight_ij value_j for each of the H weights of an edge: [H, N, F]."""
        source, pattern = self.layout.source, self.layout.pattern
        if pattern is not None:
            moved = sparse_product(weight_HNK.flatten(), value_HNF.flatten(0, 1), pattern)
            return moved.view_as(value_HNF)
        value_HNKF = value_HNF.index_select(1, source.flatten()).unflatten(1, source.shape)
        return (weight_HNK.unsqueeze(-1) * value_HNKF).sum(2)
