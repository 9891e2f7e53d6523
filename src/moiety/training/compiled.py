"""Training steps through torch.compile: block by block, or in one graph where forces are derivatives.

What torch.compile makes can be differentiated once; a loss on forces does so twice. There the inner derivative is first
written out as a graph of plain operations, which the compiler then takes as it takes any other (the way of NequIP:
Tan et al. 2025, arXiv 2504.16068).
"""
# Shapes: B structures, N nodes, E edges, K most neighbours of a node, n most nodes of a structure,
# F edges between residues.

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moiety.models.geometry_moiety import Group, Layout
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyModel, MoietyPredictionOutput

SHAPES: dict[str, tuple[str | int, ...]] = {  # inputs of the model and tensors of its layout
    "node_type": ("N",),
    "positions": ("N", 3),
    "graph_index": ("N",),
    "edge_index": (2, "E"),
    "edge_shift": ("E", 3),
    "cell": ("B", 3, 3),
    "pbc": ("B", 3),
    "charge": ("B",),
    "spin": ("B",),
    "domain": ("B",),
    "role": ("N",),
    "node_vectors": ("N", 4, 3),
    "noise_level": ("B",),
    "source": ("N", "K"),
    "place": ("E",),
    "framed": ("F",),
    "node": ("B", "n"),
    "present": ("B", "n"),
    "taken": ("N",),
}

Graph = Callable[[list[Tensor], list[Tensor]], tuple[dict[str, Tensor], Tensor, Tensor]]


def compile_model(model: nn.Module) -> None:
    """Compiles a model's training steps in place; names of weights stay as they are.

    Minutes go by at the first step, once for all sizes of batches (and once more for batches of one structure).
    """
    conservative = [m for m in model.modules() if isinstance(m, MoietyForPrediction) and m.derives]
    for predictor in conservative:
        predictor.forward = WrittenOut(predictor)
    if not conservative:
        for trunk in (m for m in model.modules() if isinstance(m, MoietyModel)):
            trunk.for_compiler = True
            for block in trunk.blocks:
                block.compile(dynamic=True)


class WrittenOut:
    """Stands in for `MoietyForPrediction.forward`; outside of training the model itself answers."""

    def __init__(self, model: MoietyForPrediction, compiler: Callable[..., Any] = torch.compile):
        self.model, self.plain, self.compiler = model, model.forward, compiler
        self.graphs: dict[Any, Graph] = {}

    def __call__(self, positions: Tensor, **inputs: Any) -> MoietyPredictionOutput:
        inputs["positions"] = positions
        if not self.model.training:
            return self.plain(**inputs)
        given: dict[str, Tensor] = {name: inputs[name] for name in SHAPES if inputs.get(name) is not None}
        layout = Layout.build(
            given["edge_index"],
            given["graph_index"],
            given.get("node_vectors"),
            len(given["cell"]),
            self.model.config.num_weights,
            for_compiler=True,
        )
        tensors = given | {"source": layout.source, "place": layout.place} | vars(layout.groups[0])
        if layout.framed is not None:
            tensors["framed"] = layout.framed
        weights = dict(self.model.named_parameters())
        device = positions.device.type
        key = (*((name, tensor.dtype) for name, tensor in tensors.items()), torch.is_autocast_enabled(device))
        if key not in self.graphs:
            graph = write_out(self, weights, tensors)
            self.graphs[key] = self.compiler(graph, dynamic=True, fullgraph=True)
        with torch.autocast(device, enabled=False):  # the graph holds the casts already
            predictions, node_features, graph_features = self.graphs[key]([*weights.values()], [*tensors.values()])
        return MoietyPredictionOutput(
            predictions=predictions,
            node_features=node_features,
            graph_features=graph_features,
            graph_index=given["graph_index"],
        )


def write_out(
    stand_in: WrittenOut, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> torch.fx.GraphModule:
    """The model's training forward pass, derivatives included, as a graph from lists of weights and inputs.

    Its sizes are symbols. Values of `tensors` do not matter, their names and types do.
    """
    model = stand_in.model

    def forward(weight_values: list[Tensor], values: list[Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        inputs: dict[str, Any] = dict(zip(tensors, values, strict=True))
        source, place, *group = (inputs.pop(name) for name in ("source", "place", "node", "present", "taken"))
        inputs["layout"] = Layout(source, place, inputs.pop("framed", None), None, [Group(*group)])
        output = torch.func.functional_call(model, dict(zip(weights, weight_values, strict=True)), (), inputs)
        return output.predictions, output.node_features, output.graph_features

    # sizes that are equal in the example are taken for one: these differ from each other and from all of the weights
    widths = {size for weight in weights.values() for size in weight.shape}
    sizes = dict(zip("BNEKnF", (size for size in itertools.count(101) if size not in widths), strict=False))
    shapes = [[size if isinstance(size, int) else sizes[size] for size in SHAPES[name]] for name in tensors]
    example = [tensor.new_empty(shape) for tensor, shape in zip(tensors.values(), shapes, strict=True)]
    try:
        model.forward = stand_in.plain
        trace = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        graph = trace([weight.detach().requires_grad_() for weight in weights.values()], example)
    finally:
        model.forward = stand_in
    for node in list(graph.graph.nodes):
        # autograd saves detached tensors, which would end the second derivative; the model's own detached ones are
        # its positions, where the derivative ends anyway, and the peak of a softmax, whose derivative is zero
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:  # right for the strides seen here; a compiler chooses others
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph
