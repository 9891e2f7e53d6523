"""What denoising looks like: a few structures, the noise they were given, and the noise a model reads off them."""
# Shapes: B structures, N nodes.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moiety.data.structure import Structure
from moiety.tokens.batch import collate, with_neighbors


def denoising_examples(model: Any, structures: list[Structure], sigma: float, seed: int = 0) -> list[dict[str, Any]]:
    """Displaces every node by centred Gaussian noise and asks the model for it.

    Args:
        model: a `MoietyForPreTraining`.
        structures: each becomes one example.
        sigma: standard deviation of the noise, Å; the model is told.
        seed: of the noise.

    Returns:
        One JSON-ready dictionary per structure: domain, id, node_type [N], positions [N,3] Å (undisturbed), cell [3,3]
        Å or null, true_noise and predicted_noise [N,3] Å, sigma Å, error: mean squared error of the noise in units of
        sigma^2, per component (1 is what predicting nothing scores).
    """
    batch = collate(structures)
    clean = batch.positions
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise - _mean(noise, batch.graph_index, batch.num_structures)[batch.graph_index]
    level = torch.full((batch.num_structures,), sigma)
    noised = with_neighbors(batch.replace(positions=clean + sigma * noise, noise_level=level), model.config.cutoff)
    training = model.training
    with torch.no_grad():
        predicted = model.eval()(**noised.inputs()).noise
    model.train(training)
    error_B = _mean((predicted - noise).square().mean(-1), batch.graph_index, batch.num_structures)
    sizes = [structure.num_nodes for structure in structures]
    return [
        {
            "domain": structure.domain,
            "id": structure.id,
            "node_type": structure.node_type.tolist(),
            "positions": _rounded(structure.positions),
            "cell": _rounded(structure.cell) if structure.periodic else None,
            "true_noise": _rounded(sigma * true),
            "predicted_noise": _rounded(sigma * guess),
            "sigma": sigma,
            "error": float(error),
        }
        for structure, true, guess, error in zip(
            structures, noise.split(sizes), predicted.split(sizes), error_B, strict=True
        )
    ]


def _mean(values: Tensor, graph_index: Tensor, num_graphs: int) -> Tensor:
    """Mean over the nodes of each structure, [N, ...] -> [B, ...]."""
    total = values.new_zeros(num_graphs, *values.shape[1:]).index_add(0, graph_index, values)
    count = torch.bincount(graph_index, minlength=num_graphs).to(values.dtype)
    return total / count.reshape(-1, *[1] * (values.dim() - 1))


def _rounded(array: Any) -> list[Any]:
    return np.round(np.asarray(array, dtype=np.float64), 4).tolist()
