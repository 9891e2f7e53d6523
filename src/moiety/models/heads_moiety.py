"""What is read off the nodes of the trunk: noise, strain, properties."""
# Shapes: B structures, N nodes, M = (lmax + 1)^2 components, C channels, H heads, F channels of a head.

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .blocks_moiety import ScaledLinear
from .configuration_moiety import MoietyConfig
from .geometry_moiety import mean_per_graph, softmax_per_graph, sum_per_graph, symmetric_basis
from .vocabulary_moiety import AMINO_ACIDS, ELEMENTS


class VectorHead(nn.Module):
    """Equivariant vector per node: gated channels of l = 1. [N,M,C] -> [N,3]."""

    def __init__(self, config: MoietyConfig):
        super().__init__()
        channels, inner = config.hidden_size, config.hidden_size // 2
        self.gate = nn.Sequential(nn.Linear(channels, inner), nn.SiLU(), nn.Linear(inner, inner))
        self.vector = nn.Linear(channels, inner, bias=False)
        self.weigh = ScaledLinear(inner, 1, bias=False, gain=0.3)

    def forward(self, features_NMC: Tensor) -> Tensor:
        gate = self.gate(features_NMC[:, :1])
        return self.weigh(self.vector(features_NMC[:, 1:4]) * gate).squeeze(-1)


class StrainHead(nn.Module):
    """Symmetric matrix per structure from l = 0 (its trace) and l = 2: [N,M,C] -> [B,3,3]."""

    def __init__(self, config: MoietyConfig):
        super().__init__()
        channels = config.hidden_size
        self.lmax = config.lmax
        self.trace = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        self.gate = nn.Linear(channels, channels)
        self.tensor = nn.Linear(channels, channels if config.lmax == 2 else 2 * channels, bias=False)
        self.weigh = ScaledLinear(channels, 1, bias=False, gain=0.3)

    def forward(self, features_NMC: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
        return mean_per_graph(self.of_nodes(features_NMC), graph_index, num_graphs)

    def of_nodes(self, features_NMC: Tensor) -> Tensor:
        """[N,3,3], the part of each node."""
        scalars = features_NMC[:, 0]
        basis = symmetric_basis(features_NMC)
        if self.lmax == 2:
            tensor_N5C = self.tensor(features_NMC[:, 4:9])
        else:
            v, w = self.tensor(features_NMC[:, 1:4]).chunk(2, dim=-1)
            tensor_N5C = torch.einsum("sab,nac,nbc->nsc", basis, v, w)
        tensor_N5 = self.weigh(tensor_N5C * self.gate(scalars).unsqueeze(1)).squeeze(-1)
        identity = torch.eye(3, dtype=basis.dtype, device=basis.device) / math.sqrt(3)
        return torch.einsum("ns,sab->nab", tensor_N5, basis) + self.trace(scalars).unsqueeze(-1) * identity


class PoolingHead(nn.Module):
    """Invariant scalar per structure, of weighted means over its nodes: [N,M,C] -> [B].

    Every head of the attention weighs the nodes on its own (Lee et al. 2019, arXiv 1810.00825, without its queries): a
    gap is decided by a few atoms. What comes twice counts as once, so the scalar is intensive.
    """

    def __init__(self, config: MoietyConfig):
        super().__init__()
        channels, inner = config.hidden_size, config.hidden_size // 2
        width = config.num_heads * math.ceil(channels / config.num_heads)
        self.weigh = nn.Linear(channels, config.num_heads)
        self.value = nn.Sequential(nn.Linear(channels, width), nn.SiLU())
        self.scalar = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), ScaledLinear(inner, 1, gain=0.1))

    def forward(self, features_NMC: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
        scalars = features_NMC[:, 0]
        weight_NH = softmax_per_graph(self.weigh(scalars), graph_index, num_graphs)
        value_NHF = self.value(scalars).unflatten(-1, (weight_NH.shape[1], -1))
        pooled_BHF = sum_per_graph(weight_NH.unsqueeze(-1) * value_NHF, graph_index, num_graphs)
        return self.scalar(pooled_BHF.flatten(1)).squeeze(-1)


class TaskHead(nn.Module):
    """One predicted property, `kind` says how it is read off the nodes:

    - mean: invariant scalar per structure, of weighted means over nodes (intensive) [B]
    - sum: invariant scalar per structure, sum over nodes of a scalar and of `references`, the part of each element
      (symbol -> value), which are NaN where an element has none [B]
    - average: the same, a mean over nodes in place of the sum: a formation energy an atom [B]
    - interaction: invariant scalar per structure, sum over nodes, less that of each molecule alone: 0 for one
      molecule, NaN for what is periodic or has residues; `MoietyForPrediction` takes the molecules apart [B]
    - dipole_norm: |sum_i (q_i (r_i - centre) + v_i)| [B]
    - tensor: symmetric matrix per structure, sum over nodes (a polarizability) [B,3,3]
    - node: invariant scalar per node [N]
    - classes: a logit per node of each of the named `classes` [N,K]
    - residues: a logit per node of each amino acid [N,20]; `MoietyForPrediction` hides them from the trunk
    - vector: vector per node [N,3]
    - energy: the same, in eV; `MoietyForPrediction` takes forces and stress from its derivatives [B]

    The network works in standard units; the prediction is mean + std * output, in the task's unit (sums: of a node;
    tensor: the mean is that of its diagonal). Logits have no unit.
    """

    KINDS: ClassVar[dict[str, tuple[bool, tuple[int, ...]]]] = {  # one value a node; shape of a value
        "mean": (False, ()),
        "sum": (False, ()),
        "average": (False, ()),
        "interaction": (False, ()),
        "dipole_norm": (False, ()),
        "tensor": (False, (3, 3)),
        "node": (True, ()),
        "classes": (True, ()),
        "residues": (True, ()),
        "vector": (True, (3,)),
        "energy": (False, ()),
    }
    WITH_REFERENCES = ("sum", "average", "energy")

    def __init__(
        self,
        config: MoietyConfig,
        kind: str,
        mean: float = 0.0,
        std: float = 1.0,
        unit: str = "",
        references: dict[str, float] | None = None,
        classes: list[str] | None = None,
    ):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"task kind {kind!r} is not one of {', '.join(self.KINDS)}")
        channels, inner = config.hidden_size, config.hidden_size // 2
        if references and kind not in self.WITH_REFERENCES:
            raise ValueError(f"a task of kind {kind!r} has no references; those are parts of a sum over atoms")
        self.kind, self.mean, self.std, self.unit = kind, mean, std, unit
        self.references: list[float] | None = None  # by node type
        if references:
            of_elements = [references.get(symbol, math.nan) for symbol in ELEMENTS]
            self.references = [math.nan, *of_elements, *[math.nan] * (config.vocab_size - 1 - len(of_elements))]
        if (kind == "classes") != bool(classes):
            raise ValueError(f"a task of kind {kind!r} with classes {classes}: those belong to the kind 'classes'")
        if kind == "mean":
            self.pooled = PoolingHead(config)
        elif kind == "tensor":
            self.tensor = StrainHead(config)
        elif kind in ("classes", "residues"):
            num_classes = len(classes or AMINO_ACIDS)
            self.logits = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, num_classes))
        elif kind != "vector":
            # predictions start near the mean. The sign of a dipole does not show in its norm: charges start at none and
            # follow the atoms' vectors, or those of some seeds pull against these and stay in a poor minimum
            gain = 0.0 if kind == "dipole_norm" else 0.1
            self.scalar = nn.Sequential(nn.Linear(channels, inner), nn.SiLU(), ScaledLinear(inner, 1, gain=gain))
        if kind in ("vector", "dipole_norm"):
            self.vector = VectorHead(config)

    def forward(
        self, features: Tensor, positions: Tensor, node_type: Tensor, graph_index: Tensor, num_graphs: int
    ) -> Tensor:
        if self.kind == "vector":
            return self.std * self.vector(features)
        if self.kind == "mean":
            return self.mean + self.std * self.pooled(features, graph_index, num_graphs)
        if self.kind == "tensor":
            value_B33 = sum_per_graph(self.tensor.of_nodes(features), graph_index, num_graphs)
            return self.mean * torch.eye(3, dtype=features.dtype, device=features.device) + self.std * value_B33
        if self.kind in ("classes", "residues"):
            return self.logits(features[:, 0])
        scalar_N = self.scalar(features[:, 0]).squeeze(-1)
        if self.kind == "interaction":
            return self.std * sum_per_graph(scalar_N, graph_index, num_graphs)
        if self.kind in self.WITH_REFERENCES:
            over_nodes = mean_per_graph if self.kind == "average" else sum_per_graph
            learned_B = over_nodes(self.mean + self.std * scalar_N, graph_index, num_graphs)
            if self.references is None:
                return learned_B
            # a total energy of 1e5 eV has an error of .01 eV in fp32
            reference_N = positions.new_tensor(self.references, dtype=torch.float64)[node_type]
            return learned_B + over_nodes(reference_N, graph_index, num_graphs)
        if self.kind == "node":
            value = scalar_N
        else:
            charge_N = scalar_N - mean_per_graph(scalar_N, graph_index, num_graphs)[graph_index]  # neutral: no origin
            vector_N3 = charge_N[:, None] * positions + self.vector(features)
            dipole_B3 = sum_per_graph(vector_N3, graph_index, num_graphs)
            return self.std * (dipole_B3.square().sum(-1) + 1e-6).sqrt()
        return self.mean + self.std * value


__all__ = ["StrainHead", "TaskHead", "VectorHead"]
