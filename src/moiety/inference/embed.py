"""Embeddings of files: arrays in one .npz that loads with `numpy.load(path)`, no pickle."""
# Shapes: B structures, N nodes, M spherical components, C channels.

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moiety.data.validate import Verdict
from moiety.errors import InputError
from moiety.inference.loading import batches, read_model_config


def load_encoder(model_dir: Path) -> tuple[Any, Any]:
    """The trunk (`MoietyModel`) of any Moiety export and its processor."""
    read_model_config(model_dir)
    from moiety.models.modeling_moiety import MoietyModel
    from moiety.models.processing_moiety import MoietyProcessor

    return MoietyModel.from_pretrained(model_dir).eval(), MoietyProcessor.from_pretrained(model_dir)


def embed_files(
    encoder: tuple[Any, Any],
    paths: Iterable[Path],
    level: Literal["graph", "node"],
    out: Path,
    batch_nodes: int = 2048,
    all_atom: bool = False,
) -> list[Verdict]:
    """Writes `out` (.npz): files [B], index [B], ids [B] (unicode) and features.

    Level graph: features [B, C], invariant. Level node: features [N, M, C], steerable (l=0; l=1 as x, y, z; l=2), of
    all structures one after the other, and offsets [B+1]: structure b owns features[offsets[b]:offsets[b+1]].

    Returns:
        The verdicts of the broken structures, which are left out.

    Raises:
        InputError: not one structure was valid.
    """
    model, processor = encoder
    features, sizes, broken = [], [], []
    kept: list[Verdict] = []
    for chunk in batches(paths, batch_nodes, all_atom):
        good = [verdict for verdict in chunk if verdict.structure is not None]
        broken += [verdict for verdict in chunk if verdict.structure is None]
        if not good:
            continue
        with torch.no_grad():
            output = model(**processor([verdict.structure for verdict in good]))
        features.append((output.graph_features if level == "graph" else output.node_features).numpy())
        sizes += [verdict.structure.num_nodes for verdict in good if verdict.structure is not None]
        kept += good
    if not kept:
        raise InputError(f"no valid structure among {len(broken)}; `moiety data check` names what is wrong with each")
    arrays = {
        "files": np.array([str(verdict.file) for verdict in kept]),
        "index": np.array([verdict.index for verdict in kept]),
        "ids": np.array([verdict.structure.id for verdict in kept if verdict.structure is not None]),
        "features": np.concatenate(features),
    }
    if level == "node":
        arrays["offsets"] = np.concatenate([[0], np.cumsum(sizes)])
    with Path(out).open("wb") as sink:  # a file object, or numpy would add .npz to the name the user chose
        np.savez(sink, **arrays)
    return broken
