"""Moiety: a strictly O(3)-equivariant transformer with local and global attention over atoms and residues."""
# Shapes: B structures, N nodes, E edges, M = (lmax + 1)^2 components, C channels, V vocabulary.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .blocks_moiety import (
    Block,
    GlobalAttention,
    ScaledLinear,
    StructurePlaces,
    ZeroLinear,
    full_precision,
    merged_norm,
)
from .configuration_moiety import MoietyConfig
from .geometry_moiety import Layout, Neighbors, frame_basis, mean_per_graph, molecule_of
from .heads_moiety import StrainHead, TaskHead, VectorHead
from .vocabulary_moiety import COVALENT_RADII, DOMAINS, FIRST_RESIDUE, RESIDUE_MASK, ROLES, node_scale

NOISE_UNIT = 0.05  # Å: where the logarithm of the noise level is zero


@dataclass
class MoietyOutput(ModelOutput):
    """node_features [N,M,C] steerable (l=0; l=1 as x, y, z; l=2), graph_features [B,C] invariant, graph_index [N]."""

    node_features: Tensor | None = None
    graph_features: Tensor | None = None
    graph_index: Tensor | None = None


@dataclass
class MoietyPreTrainingOutput(ModelOutput):
    """noise [N,3] Å/sigma, type_logits [N,V], strain [B,3,3] in units of its sigma; loss only if targets were given.

    predictions: as in `MoietyPredictionOutput`, of the labels that pretraining learned beside.
    """

    loss: Tensor | None = None
    noise: Tensor | None = None
    type_logits: Tensor | None = None
    strain: Tensor | None = None
    predictions: dict[str, Tensor] | None = None
    graph_features: Tensor | None = None


@dataclass
class MoietyPredictionOutput(ModelOutput):
    """predictions: task name -> [B], [B,3], [N], ... in the task's unit."""

    predictions: dict[str, Tensor] | None = None
    node_features: Tensor | None = None
    graph_features: Tensor | None = None
    graph_index: Tensor | None = None


class MoietyPreTrainedModel(PreTrainedModel):
    config_class = MoietyConfig
    base_model_prefix = "moiety"
    main_input_name = "positions"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _keys_to_ignore_on_load_missing = [r"\.frames\.weight$"]  # exports from before there were any: zero changes nothing
    _keys_to_ignore_on_load_unexpected = [r"^(noise_head|type_head|strain_head|heads)\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            gain = module.gain if isinstance(module, ScaledLinear) else 1.0
            init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, GlobalAttention):
            init.zeros_(module.reach)


class InputEmbedding(nn.Module):
    """First node features, and the invariant condition of each structure (charge, spin, domain, noise level)."""

    def __init__(self, config: MoietyConfig):
        super().__init__()
        channels = config.hidden_size
        self.lmax = config.lmax
        self.node_type = nn.Embedding(config.vocab_size, channels)
        self.role = nn.Embedding(len(ROLES), channels)
        self.domain = nn.Embedding(len(DOMAINS), channels)
        self.charge_spin = nn.Linear(2, channels)
        self.noise_level = nn.Sequential(nn.Linear(3, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(channels, channels))
        self.to_node = nn.Linear(channels, channels)
        self.vectors = nn.Linear(4, channels, bias=False)

    def forward(
        self, inputs: dict[str, Tensor], dtype: torch.dtype, hint_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        charge_spin = torch.stack([inputs["charge"].clamp(-10, 10), (inputs["spin"] - 1).clamp(0, 10)], dim=-1)
        level = inputs["noise_level"]
        told = ~level.isnan()
        log_level = torch.where(told, level, NOISE_UNIT).clamp(min=1e-4).div(NOISE_UNIT).log()
        level_features = torch.stack([told.to(dtype), log_level, log_level.square()], dim=-1).to(dtype)
        given_BC = (
            self.domain(inputs["domain"])
            + self.charge_spin(charge_spin.to(dtype) / 2)
            + self.noise_level(level_features)
        )
        condition_BC = self.condition(given_BC if hint_BC is None else given_BC + hint_BC)
        scalars = self.node_type(inputs["node_type"]) + self.role(inputs["role"])
        scalars = scalars + self.to_node(condition_BC)[inputs["graph_index"]]
        vectors = self.vectors(inputs["node_vectors"].permute(2, 0, 1))
        x = [scalars.unsqueeze(0), vectors]
        if self.lmax == 2:
            x.append(vectors.new_zeros(5, *vectors.shape[1:]))
        return torch.cat(x), condition_BC


class MoietyModel(MoietyPreTrainedModel):
    """The trunk. Inputs as the processor returns them; see `forward`."""

    def __init__(self, config: MoietyConfig):
        super().__init__(config)
        self.embedding = InputEmbedding(config)
        every = config.global_every
        self.blocks = nn.ModuleList(
            Block(config, with_global=bool(every) and (index + 1) % every == 0) for index in range(config.num_layers)
        )
        self.gradient_checkpointing = False  # `activation_checkpointing_enable` sets it, and the function below
        self.for_compiler = False  # set by whoever compiles the blocks
        self.post_init()

    def forward(
        self,
        node_type: Tensor,
        positions: Tensor,
        graph_index: Tensor,
        edge_index: Tensor,
        edge_shift: Tensor,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        charge: Tensor | None = None,
        spin: Tensor | None = None,
        domain: Tensor | None = None,
        role: Tensor | None = None,
        node_vectors: Tensor | None = None,
        noise_level: Tensor | None = None,
        hint: Tensor | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> MoietyOutput:
        """Steerable node features and invariant structure features.

        Args:
            node_type: [N] vocabulary ids (atomic number, or residue type).
            positions: [N,3] Å.
            graph_index: [N] structure of each node, ascending from 0.
            edge_index: [2,E] source j and destination i, sorted by destination.
            edge_shift: [E,3] Å, r_ij = positions[j] + edge_shift - positions[i].
            cell: [B,3,3] Å, rows; not used beyond edge_shift.
            pbc: [B,3] bool; default open.
            charge: [B] e; default 0.
            spin: [B] multiplicity; default 1.
            domain: [B] index into DOMAINS; default molecule.
            role: [N] index into ROLES; default unspecified.
            node_vectors: [N,4,3] Å, residue offsets N, C, O, CB; default zero.
            noise_level: [B] Å, NaN where it is not told; default not told.
            hint: [B,C] what is known of the structure (see arXiv 2603.17196); default nothing.
            layout: of edge_index and graph_index, where it is known already.
        """
        num_graphs = next((t.shape[0] for t in (domain, charge, spin, pbc, cell) if t is not None), None)
        if num_graphs is None:
            num_graphs = int(graph_index[-1]) + 1
        per_graph = {"dtype": torch.long, "device": positions.device}
        inputs = {
            "node_type": node_type,
            "graph_index": graph_index,
            "charge": charge if charge is not None else torch.zeros(num_graphs, **per_graph),
            "spin": spin if spin is not None else torch.ones(num_graphs, **per_graph),
            "domain": domain if domain is not None else torch.zeros(num_graphs, **per_graph),
            "role": role if role is not None else torch.zeros_like(node_type),
            "node_vectors": node_vectors if node_vectors is not None else positions.new_zeros(positions.shape[0], 4, 3),
            "noise_level": noise_level if noise_level is not None else positions.new_full((num_graphs,), math.nan),
        }
        is_open = ~pbc.any(-1) if pbc is not None else torch.ones(num_graphs, dtype=torch.bool, device=positions.device)
        # coordinates relative to the structure's centre keep the distance columns small, hence exact
        centred = positions - mean_per_graph(positions, graph_index, num_graphs)[graph_index]
        config, (source, destination) = self.config, edge_index
        vector_E3 = positions[source] + edge_shift - positions[destination]
        scale = node_scale(node_type).to(positions.dtype)
        x_E = vector_E3.norm(dim=-1) / (0.5 * config.cutoff * (scale[source] + scale[destination]))
        if layout is None:
            layout = Layout.build(
                edge_index, graph_index, node_vectors, num_graphs, config.num_weights, self.for_compiler
            )
        frames = None
        if (framed := layout.framed) is not None:
            between = vector_E3[framed], inputs["node_vectors"], edge_index[:, framed]
            frames = frame_basis(*between, 2 * config.cutoff, config.num_radial)
        neighbors = Neighbors.build(layout, vector_E3, x_E, config.num_radial, config.lmax, frames)
        places = StructurePlaces(centred, is_open[graph_index], layout.groups)
        with full_precision(positions):
            x, condition = self.embedding(inputs, positions.dtype, hint)
        for block in self.blocks:
            again = self.gradient_checkpointing and self.training
            run = partial(self._gradient_checkpointing_func, block) if again else block
            x = run(x, neighbors, places, condition, graph_index)
        x = merged_norm(x, config.lmax)
        pooled = mean_per_graph(x[0], graph_index, num_graphs)
        return MoietyOutput(node_features=x.transpose(0, 1), graph_features=pooled, graph_index=graph_index)


def task_heads(config: MoietyConfig) -> nn.ModuleDict:
    """Those named in `config.tasks`, in its order."""
    return nn.ModuleDict({name: TaskHead(config, **spec) for name, spec in (config.tasks or {}).items()})


class MoietyForPreTraining(MoietyPreTrainedModel):
    """Trunk with the denoising heads, and those of the labels in `config.tasks` that were learned beside.

    Every head runs for every structure: all ranks build the same graph.
    """

    def __init__(self, config: MoietyConfig):
        super().__init__(config)
        channels = config.hidden_size
        self.moiety = MoietyModel(config)
        self.noise_head = VectorHead(config)
        self.type_head = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, config.vocab_size))
        self.strain_head = StrainHead(config)
        self.heads = task_heads(config)
        self.post_init()

    def forward(
        self, noise_target: Tensor | None = None, hint_positions: Tensor | None = None, **inputs: Any
    ) -> MoietyPreTrainingOutput:
        """Takes the inputs of `MoietyModel`; with `noise_target` [N,3] (unit variance) it has a loss.

        With `hint_positions` [N,3] Å of a nearly clean copy, its pooled features are the hint of the trunk.
        """
        if hint_positions is not None:
            inputs["hint"] = self._hint(hint_positions, **inputs)
        trunk = self.moiety(**inputs)
        features, graph_index = trunk.node_features, trunk.graph_index
        with full_precision(features):
            noise = self.noise_head(features)
            type_logits = self.type_head(features[:, 0])
            strain = self.strain_head(features, graph_index, trunk.graph_features.shape[0])
            read = (inputs["positions"], inputs["node_type"], graph_index, trunk.graph_features.shape[0])
            predictions = {name: head(features, *read) for name, head in self.heads.items()}
        return MoietyPreTrainingOutput(
            loss=F.mse_loss(noise, noise_target) if noise_target is not None else None,
            noise=noise,
            type_logits=type_logits,
            strain=strain,
            predictions=predictions or None,
            graph_features=trunk.graph_features,
        )

    @torch.no_grad()
    def _hint(self, hint_positions: Tensor, positions: Tensor, graph_index: Tensor, **inputs: Any) -> Tensor:
        """[B,C], zero where a structure has none; the copy has the neighbours of the structure itself."""
        shown_N1 = ~hint_positions.isnan().any(-1, keepdim=True)
        copy_N3 = torch.where(shown_N1, hint_positions, positions)
        seen = self.moiety(positions=copy_N3, graph_index=graph_index, **(inputs | {"noise_level": None}))
        features = seen.graph_features
        return features * mean_per_graph(shown_N1.to(features.dtype), graph_index, features.shape[0])


class MoietyForPrediction(MoietyPreTrainedModel):
    """Trunk with the task heads named in `config.tasks`; all of them run, in the order of the config.

    With a head of kind "residues" the trunk sees residues without their types, from which they are to be told.
    With a head of kind "interaction" it sees every structure twice: whole, and each of its molecules alone.
    With a head of kind "energy" the predictions also hold its exact derivatives: "forces" [N,3] eV/Å and, for
    structures periodic in three directions, "stress" [B,3,3] eV/Å^3 (positive under tension; else NaN).
    """

    def __init__(self, config: MoietyConfig):
        super().__init__(config)
        tasks = config.tasks or {}
        energies = [name for name, spec in tasks.items() if spec.get("kind") == "energy"]
        if len(energies) > 1:
            raise ValueError(f"tasks {', '.join(energies)}: one head of kind energy, or whose forces are meant?")
        if energies and (taken := {"forces", "stress"} & set(tasks)):
            raise ValueError(
                f"task {', '.join(sorted(taken))}: is the derivative of {energies[0]}; leave one of them out"
            )
        self.energy = energies[0] if energies else None
        self.derives = self.energy is not None  # to be set False by who needs no derivatives: a third of the work
        self.interactions = [name for name, spec in tasks.items() if spec.get("kind") == "interaction"]
        self.hides_residues = any(spec.get("kind") == "residues" for spec in tasks.values())
        self.moiety = MoietyModel(config)
        self.heads = task_heads(config)
        self.post_init()

    def forward(self, positions: Tensor, **inputs: Any) -> MoietyPredictionOutput:
        """Takes the inputs of `MoietyModel`; `predictions` maps each task to its values, in the task's unit."""
        if self.energy is None or not self.derives:
            return self._read(positions, **inputs)
        return self._conservative(self.energy, positions, **inputs)

    def _read(self, positions: Tensor, node_type: Tensor, **inputs: Any) -> MoietyPredictionOutput:
        if self.hides_residues:
            is_residue = (node_type >= FIRST_RESIDUE) & (node_type < RESIDUE_MASK)
            node_type = torch.where(is_residue, RESIDUE_MASK, node_type)
        trunk = self.moiety(positions=positions, node_type=node_type, **inputs)
        read = (trunk.node_features, positions, node_type, trunk.graph_index, trunk.graph_features.shape[0])
        with full_precision(positions):
            predictions = {name: head(*read) for name, head in self.heads.items()}
        if self.interactions:
            alone = self._molecules_alone(read[-1], positions, node_type, **inputs)
            predictions |= {name: predictions[name] - alone[name] for name in self.interactions}
        return MoietyPredictionOutput(predictions=predictions, **trunk)

    def _molecules_alone(
        self,
        num_graphs: int,
        positions: Tensor,
        node_type: Tensor,
        graph_index: Tensor,
        edge_index: Tensor,
        edge_shift: Tensor,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """What the heads of kind "interaction" say of the molecules of each structure, without each other: [B].

        A molecule is what is bonded together; it is taken to be neutral and closed-shell. NaN where a structure is
        periodic or has residues.
        """
        with torch.no_grad():
            source, destination = edge_index
            length_E = (positions[source] + edge_shift - positions[destination]).norm(dim=-1)
            radius_N = positions.new_tensor(COVALENT_RADII)[node_type]
            first_P, part_N = molecule_of(edge_index, length_E, radius_N).unique(return_inverse=True)
            order, owner_P = part_N.argsort(stable=True), graph_index[first_P]
            inside = part_N[source] == part_N[destination]
            ends, shift_E3 = order.argsort()[edge_index[:, inside]], edge_shift[inside]
            by_destination = ends[1].argsort(stable=True)
            nodes = {name: inputs[name][order] for name in ("role", "node_vectors") if name in inputs}
            graphs = {name: inputs[name][owner_P] for name in ("domain", "noise_level") if name in inputs}
            undefined_B = mean_per_graph(radius_N, graph_index, num_graphs).isnan()
            if "pbc" in inputs:
                undefined_B = undefined_B | inputs["pbc"].any(-1)
        trunk = self.moiety(
            node_type=node_type[order],
            positions=positions[order],
            graph_index=part_N[order],
            edge_index=ends[:, by_destination],
            edge_shift=shift_E3[by_destination],
            **nodes,
            **graphs,
        )
        read = (trunk.node_features, positions[order], node_type[order], graph_index[order], num_graphs)
        with full_precision(positions):
            alone = {name: self.heads[name](*read) for name in self.interactions}
        return {name: torch.where(undefined_B, math.nan, value) for name, value in alone.items()}

    def _conservative(
        self,
        energy: str,
        positions: Tensor,
        graph_index: Tensor,
        edge_index: Tensor,
        edge_shift: Tensor,
        cell: Tensor,
        pbc: Tensor,
        **inputs: Any,
    ) -> MoietyPredictionOutput:
        """Differentiates the energy by positions and strain inside the forward pass: the engine sees one backward.

        Stress is dE/d(strain) / volume (Knuth et al. 2015, doi:10.1016/j.cpc.2015.01.003), the strain applied to
        positions and lattice alike. In training the derivatives can be differentiated again.
        """
        with torch.enable_grad():
            at = positions.detach().requires_grad_()
            strain_B33 = positions.new_zeros(cell.shape[0], 3, 3).requires_grad_()
            symmetric_B33 = (strain_B33 + strain_B33.mT) / 2
            output = self._read(
                at + torch.einsum("na,nab->nb", at, symmetric_B33[graph_index]),
                graph_index=graph_index,
                edge_index=edge_index,
                edge_shift=edge_shift
                + torch.einsum("ea,eab->eb", edge_shift, symmetric_B33[graph_index[edge_index[1]]]),
                cell=cell,
                pbc=pbc,
                **inputs,
            )
            assert output.predictions and output.node_features is not None and output.graph_features is not None
            slope_N3, virial_B33 = torch.autograd.grad(
                output.predictions[energy].sum(), (at, strain_B33), create_graph=self.training
            )
        bulk_B11 = pbc.all(-1)[:, None, None]
        volume_B11 = torch.linalg.det(cell).abs()[:, None, None]
        stress_B33 = virial_B33 / torch.where(bulk_B11, volume_B11, 1.0)  # dividing by NaN would spoil all gradients
        stress_B33 = torch.where(bulk_B11, stress_B33, math.nan)
        predictions = output.predictions | {"forces": -slope_N3, "stress": stress_B33}
        if self.training:
            return MoietyPredictionOutput(**(output | {"predictions": predictions}))
        return MoietyPredictionOutput(
            predictions={name: value.detach() for name, value in predictions.items()},
            node_features=output.node_features.detach(),
            graph_features=output.graph_features.detach(),
            graph_index=output.graph_index,
        )


MoietyModel.register_for_auto_class("AutoModel")
MoietyForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = [
    "MoietyForPreTraining",
    "MoietyForPrediction",
    "MoietyModel",
    "MoietyPreTrainedModel",
]
