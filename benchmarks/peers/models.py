"""Models of one size behind one call: TorchMD-NET, TensorNet, ViSNet, MACE, eSEN and Moiety.

Each is the published code with its own defaults for everything that is not width; edges are given to it, not searched.
A peer is imported only when it is built: no environment holds them all.
"""
# Shapes: B structures, N atoms, E edges, M = (lmax + 1)^2 components, C channels.

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from peers.systems import CUTOFF, Batch
from torch import Tensor, nn

TOLERANCE = 0.05  # of the number of parameters
TYPICAL_DEGREE = 30.0  # neighbours; a constant that MACE divides by

# Everything of Moiety but its width, as in pretrain/configs/tiny.yaml: few layers, but wide. edge_channels is a half of
# hidden_size, rounded to an even number.
MOIETY_SHAPES: dict[str, dict[str, Any]] = {
    "moiety-l1": {"lmax": 1, "num_layers": 3, "num_heads": 4, "global_every": 0},
    "moiety-l2": {"lmax": 2, "num_layers": 3, "num_heads": 4, "global_every": 0},
    "moiety-l1-global": {"lmax": 1, "num_layers": 3, "num_heads": 4, "global_every": 2},
    "moiety-l2-global": {"lmax": 2, "num_layers": 3, "num_heads": 4, "global_every": 2},
}


class PeerModel(nn.Module):
    """What a comparison asks of a model: a trunk, a head for energies, and `direct`, one for vectors."""

    trunk: Any

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        """Energy [B] of the batch's structures at `positions` [N,3] Å; can be differentiated twice."""
        raise NotImplementedError

    def intensive(self, batch: Batch) -> Tensor:
        """A property [B] that does not grow with the structure; a mean over atoms, where a model has no head for it."""
        return self.energy(batch, batch.positions, batch.edge_shift) / batch.num_nodes_B

    def vector(self, batch: Batch) -> Tensor:
        """One equivariant vector per atom [N,3], without a derivative."""
        raise NotImplementedError


class Given(nn.Module):
    """Stands in for a peer's own neighbour search: hands out the edges it was given, with a loop on every atom.

    Peers add over row 1 of the edges, or over row 0 (`to_first`), which is then the sorted one.
    """

    def __init__(self, to_first: bool = False):
        super().__init__()
        self.to_first = to_first
        self.edges: tuple[Tensor, Tensor, Tensor] | None = None

    def give(self, edge_index: Tensor, vector_E3: Tensor, num_nodes: int) -> None:
        loops = torch.arange(num_nodes, device=edge_index.device).expand(2, -1)
        if self.to_first:
            edge_index, vector_E3 = edge_index.flip(0), -vector_E3
        zero_N3 = vector_E3.new_zeros(num_nodes, 3)  # no distance of it is differentiated: the norm has a kink
        length_E = torch.cat([vector_E3.norm(dim=-1), zero_N3[:, 0]])
        self.edges = torch.cat([edge_index, loops], dim=1), length_E, torch.cat([vector_E3, zero_N3])

    def forward(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert self.edges is not None
        edges, self.edges = self.edges, None  # one call each, and no graph is kept alive
        return edges


class TorchMDNet(PeerModel):
    """Equivariant transformer of TorchMD-NET (Thölke and De Fabritiis 2022, arXiv 2202.02541)."""

    def __init__(self, width: int):
        super().__init__()
        from torchmdnet.models.output_modules import (  # pyright: ignore[reportMissingImports]
            EquivariantScalar,
            EquivariantVectorOutput,
        )
        from torchmdnet.models.torchmd_et import TorchMD_ET  # pyright: ignore[reportMissingImports]

        self.trunk = TorchMD_ET(hidden_channels=width, cutoff_upper=CUTOFF)
        self.trunk.distance = Given()
        self.scalar = EquivariantScalar(width)
        self.direct = EquivariantVectorOutput(width)

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        x, v, z, _, index = self._features(batch, positions, edge_shift)
        return sum_per_graph(self.scalar.pre_reduce(x, v, z, positions, index), batch)

    def vector(self, batch: Batch) -> Tensor:
        x, v, z, _, index = self._features(batch, batch.positions, batch.edge_shift)
        return self.direct.pre_reduce(x, v, z, batch.positions, index)

    def _features(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> tuple[Tensor, ...]:
        self.trunk.distance.give(batch.edge_index, edge_vectors(batch, positions, edge_shift), len(positions))
        return self.trunk(batch.node_type, positions, batch.graph_index)


class TensorNet(PeerModel):
    """TensorNet (Simeon and De Fabritiis 2023, arXiv 2306.06482), as TorchMD-NET has it.

    Its vector is read off the antisymmetric part of the last layer's matrices.
    """

    def __init__(self, width: int):
        super().__init__()
        from torchmdnet.models import tensornet  # pyright: ignore[reportMissingImports]

        self.trunk = tensornet.TensorNet(hidden_channels=width, cutoff_upper=CUTOFF, static_shapes=False)
        self.trunk.distance = Given(to_first=True)
        self.scalar = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1))
        self.direct = nn.Linear(width, 1, bias=False)
        self.trunk.layers[-1].register_forward_hook(self._keep)
        self.matrices: list[Tensor] = []

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.matrices.append(output)

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        scalars, _ = self._features(batch, positions, edge_shift)
        return sum_per_graph(self.scalar(scalars), batch)

    def vector(self, batch: Batch) -> Tensor:
        _, matrix_N33C = self._features(batch, batch.positions, batch.edge_shift)
        skew_N33 = self.direct(matrix_N33C - matrix_N33C.transpose(1, 2)).squeeze(-1)
        return torch.stack([skew_N33[:, 2, 1], skew_N33[:, 0, 2], skew_N33[:, 1, 0]], dim=-1) / 2

    def _features(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> tuple[Tensor, Tensor]:
        self.trunk.distance.give(batch.edge_index, edge_vectors(batch, positions, edge_shift), len(positions))
        scalars = self.trunk(batch.node_type, positions, batch.graph_index)[0]
        return scalars, self.matrices.pop()


class ViSNet(PeerModel):
    """ViSNet (Wang et al. 2024, arXiv 2210.16518), as PyTorch Geometric has it, lmax 1."""

    def __init__(self, width: int):
        super().__init__()
        from torch_geometric.nn.models import visnet  # pyright: ignore[reportMissingImports]

        heads = 8 if width % 8 == 0 else 4
        self.trunk = visnet.ViSNetBlock(hidden_channels=width, num_heads=heads, cutoff=CUTOFF)
        self.trunk.distance = Given()  # pyright: ignore[reportAttributeAccessIssue]
        self.scalar = visnet.EquivariantScalar(width)
        self.direct = nn.ModuleList(
            [
                visnet.GatedEquivariantBlock(width, width // 2, scalar_activation=True),
                visnet.GatedEquivariantBlock(width // 2, 1),
            ]
        )

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        return sum_per_graph(self.scalar.pre_reduce(*self._features(batch, positions, edge_shift)), batch)

    def vector(self, batch: Batch) -> Tensor:
        x, v = self._features(batch, batch.positions, batch.edge_shift)
        for block in self.direct:
            x, v = block(x, v)
        return v.squeeze(-1)

    def _features(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> tuple[Tensor, Tensor]:
        self.trunk.distance.give(batch.edge_index, edge_vectors(batch, positions, edge_shift), len(positions))
        return self.trunk(batch.node_type, positions, batch.graph_index)


class Mace(PeerModel):
    """MACE (Batatia et al. 2022, arXiv 2206.07697): two layers, scalars and vectors, correlation 3, 89 elements.

    As published its last layer keeps scalars alone, which leaves no vectors to read; `with_vectors` keeps both.
    """

    NUM_ELEMENTS = 89

    def __init__(self, width: int, with_vectors: bool):
        super().__init__()
        from e3nn import o3  # pyright: ignore[reportMissingImports]
        from mace import modules  # pyright: ignore[reportMissingImports]

        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.width = width
        self.trunk = modules.ScaleShiftMACE(
            atomic_inter_scale=1.0, atomic_inter_shift=0.0, r_max=CUTOFF, num_bessel=8, num_polynomial_cutoff=5,
            max_ell=3, interaction_cls=block, interaction_cls_first=block, num_interactions=2,
            num_elements=self.NUM_ELEMENTS, hidden_irreps=o3.Irreps(f"{width}x0e+{width}x1o"),
            MLP_irreps=o3.Irreps("16x0e"), atomic_energies=np.zeros(self.NUM_ELEMENTS),
            avg_num_neighbors=TYPICAL_DEGREE, atomic_numbers=list(range(1, self.NUM_ELEMENTS + 1)), correlation=3,
            gate=nn.functional.silu, keep_last_layer_irreps=with_vectors,
        )  # fmt: skip
        self.direct = nn.Linear(2 * width, 1, bias=False) if with_vectors else None

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        return self._run(batch, positions, edge_shift)["energy"]

    def vector(self, batch: Batch) -> Tensor:
        if self.direct is None:
            raise NotImplementedError("the last layer keeps no vectors")
        features = self._run(batch, batch.positions, batch.edge_shift)["node_feats"]
        layers = features.unflatten(-1, (2, 4 * self.width))[..., self.width :]
        return self.direct(layers.unflatten(-1, (self.width, 3)).flatten(1, 2).transpose(1, 2)).squeeze(-1)

    def _run(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> dict[str, Tensor]:
        one_hot = nn.functional.one_hot(batch.node_type - 1, self.NUM_ELEMENTS).to(positions.dtype)
        # it turns on the gradients of the positions it is given: the batch's own must stay as they are
        inputs = {"positions": positions.view_as(positions), "shifts": -edge_shift, "cell": batch.cell.flatten(0, 1)}
        inputs |= {"node_attrs": one_hot, "batch": batch.graph_index, "edge_index": batch.edge_index}
        inputs["ptr"] = nn.functional.pad(batch.num_nodes_B.cumsum(0), (1, 0))
        inputs["head"] = torch.zeros_like(inputs["ptr"][1:])
        return self.trunk(inputs, training=self.training, compute_force=False)


class ESen(PeerModel):
    """eSEN (Fu et al. 2025, arXiv 2502.12147): fairchem's backbone, shaped as the one of UMA-S but for its experts."""

    def __init__(self, width: int):
        super().__init__()
        from fairchem.core.models.uma.escn_md import (  # pyright: ignore[reportMissingImports]
            Linear_Force_Head,
            eSCNMDBackbone,
        )

        self.trunk = eSCNMDBackbone(
            sphere_channels=width, hidden_channels=width, edge_channels=width, num_distance_basis=64, lmax=2, mmax=2,
            num_layers=4, norm_type="rms_norm_sh", act_type="gate", ff_type="spectral", cutoff=CUTOFF,
            direct_forces=True, regress_forces=False, use_dataset_embedding=False, otf_graph=False,
        )  # fmt: skip
        self.trunk._generate_graph = self._given
        self.scalar = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.direct = Linear_Force_Head(self.trunk)

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        features = self.trunk(self._inputs(batch, positions, edge_shift))
        return sum_per_graph(self.scalar(features["node_embedding"][:, 0]), batch)

    def vector(self, batch: Batch) -> Tensor:
        inputs = self._inputs(batch, batch.positions, batch.edge_shift)
        return self.direct(inputs, self.trunk(inputs))["forces"]

    @staticmethod
    def _inputs(batch: Batch, positions: Tensor, edge_shift: Tensor) -> dict[str, Any]:
        neutral_B = torch.zeros(batch.num_graphs, dtype=torch.long, device=positions.device)
        inputs = Defaults(atomic_numbers=batch.node_type, pos=positions, batch=batch.graph_index)
        inputs |= {"natoms": batch.num_nodes_B, "charge": neutral_B, "spin": neutral_B}
        inputs["graph"] = batch.edge_index, edge_vectors(batch, positions, edge_shift)
        return inputs

    @staticmethod
    def _given(inputs: dict[str, Any]) -> dict[str, Tensor]:
        """In place of its neighbour search."""
        edge_index, vector_E3 = inputs["graph"]
        inputs["scatter_target"] = edge_index[1]
        return {"edge_index": edge_index, "edge_distance": vector_E3.norm(dim=-1), "edge_distance_vec": vector_E3}


class Defaults(dict[str, Any]):
    """A dict whose `get` takes its default by name, as fairchem's data objects do."""

    def get(self, key: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().get(key, default)


class Moiety(PeerModel):
    """This project's model, with its heads for energies and vectors."""

    def __init__(self, width: int, **shape: Any):
        super().__init__()
        from moiety.models.configuration_moiety import MoietyConfig
        from moiety.models.modeling_moiety import MoietyForPrediction

        tasks = {"energy": {"kind": "energy"}, "vector": {"kind": "vector"}, "mean": {"kind": "mean"}}
        edge_channels = max(round(width / 4), 1) * 2
        model = MoietyForPrediction(
            MoietyConfig(hidden_size=width, edge_channels=edge_channels, cutoff=CUTOFF, tasks=tasks, **shape)
        )
        self.trunk, self.scalar, self.direct = model.moiety, model.heads["energy"], model.heads["vector"]
        self.pooled = model.heads["mean"]

    def energy(self, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        return self._read(self.scalar, batch, positions, edge_shift)

    def intensive(self, batch: Batch) -> Tensor:
        return self._read(self.pooled, batch, batch.positions, batch.edge_shift)

    def vector(self, batch: Batch) -> Tensor:
        return self._read(self.direct, batch, batch.positions, batch.edge_shift)

    def use_global(self, wanted: bool) -> None:
        """Takes the attention over whole structures out, or puts it back where the shape has it."""
        for block in self.trunk.blocks:
            block.with_global = wanted and hasattr(block, "global_attention")

    def _read(self, head: nn.Module, batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
        trunk = self.trunk(
            node_type=batch.node_type, positions=positions, graph_index=batch.graph_index, edge_index=batch.edge_index,
            edge_shift=edge_shift, cell=batch.cell, pbc=batch.pbc,
        )  # fmt: skip
        return head(trunk.node_features, positions, batch.node_type, batch.graph_index, batch.num_graphs)


def edge_vectors(batch: Batch, positions: Tensor, edge_shift: Tensor) -> Tensor:
    """[E,3] Å from destination to source."""
    source, destination = batch.edge_index
    return positions.index_select(0, source) + edge_shift - positions.index_select(0, destination)


def sum_per_graph(x_N1: Tensor, batch: Batch) -> Tensor:
    return x_N1.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, x_N1.flatten())


Make = Callable[[int], PeerModel]
PEERS: dict[str, tuple[Make, tuple[int, ...]]] = {  # name -> maker from a width, what may divide the width, best first
    "torchmd-et": (TorchMDNet, (8,)),
    "tensornet": (TensorNet, (8, 4, 2)),
    "visnet": (ViSNet, (8, 4)),
    "mace": (partial(Mace, with_vectors=False), (8, 4, 2, 1)),
    "mace-vector": (partial(Mace, with_vectors=True), (8, 4, 2, 1)),
    "esen": (ESen, (8, 4, 2)),
    **{name: (partial(Moiety, **shape), (8, 4, 2)) for name, shape in MOIETY_SHAPES.items()},
}


def build(name: str, num_parameters: int) -> PeerModel:
    """The model of that name with about that many parameters in its trunk and energy head.

    Processors like widths that are multiples of 8; others are taken only where those are too coarse.
    """
    if name not in PEERS:
        raise ValueError(f"model {name!r} is not one of {', '.join(PEERS)}")
    make, steps = PEERS[name]
    count = cache(lambda width: count_parameters(make(width)))
    for step in steps:
        width = nearest_width(count, num_parameters, step)
        if abs(count(width) / num_parameters - 1) <= TOLERANCE:
            return make(width)
    raise ValueError(f"{name}: no width comes within {TOLERANCE:.0%} of {num_parameters:,} parameters")


def nearest_width(count: Callable[[int], int], wanted: int, step: int) -> int:
    """Among multiples of `step`, with few counts: they are nearly a parabola in the width."""
    known = (16, 32, 64)
    square, linear, constant = np.polyfit(known, [count(width) - wanted for width in known], 2)
    guess = (-linear + np.sqrt(max(linear**2 - 4 * square * constant, 0.0))) / (2 * square)
    near = round(guess / step) * step
    return min(
        (width for width in (near - step, near, near + step) if width > 0), key=lambda width: abs(count(width) - wanted)
    )


def count_parameters(model: nn.Module) -> int:
    """Trainable ones of trunk and energy head; those of other heads are left out: their size is nobody's choice."""
    others = ("direct.", "pooled.")
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith(others))
