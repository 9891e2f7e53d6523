"""What a network with task heads says of the structures of a corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from moiety.adapters.tasks import Task
from moiety.data.structure import Array
from moiety.data.subset import Subset
from moiety.tokens.batch import collate, with_neighbors


@torch.no_grad()
def predict(
    model: nn.Module, cutoff: float, subset: Subset, tasks: Sequence[Task], batch_nodes: int = 4096
) -> dict[str, Array]:
    """Outputs of each task [items, ...], for the structures of a subset or for all their nodes, in its order."""
    model.eval()
    order = np.argsort(subset.num_nodes, kind="stable")  # like sizes together: less padding
    cuts = np.flatnonzero(np.diff(np.cumsum(subset.num_nodes[order]) // batch_nodes)) + 1
    parts: dict[str, list[Array]] = {task.name: [np.empty(0)] * len(subset) for task in tasks}
    for indices in np.split(order, cuts):
        batch = with_neighbors(collate(subset.read(indices)), cutoff)
        predictions = model(**batch.inputs()).predictions
        for task in tasks:
            sizes = subset.num_nodes[indices] if task.label.per_node else np.ones(len(indices), dtype=np.int64)
            values = np.split(predictions[task.name].double().numpy(), np.cumsum(sizes)[:-1])
            for index, part in zip(indices, values, strict=True):
                parts[task.name][index] = part
    return {name: np.concatenate(values) for name, values in parts.items()}
