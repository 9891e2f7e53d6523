"""Structures in, model inputs out: packing without padding, and neighbour lists with periodic images (by vesin)."""
# Shapes: B structures, N nodes over all of them, E directed edges.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin
from vesin import NeighborList

from .conversion_moiety import to_fields
from .vocabulary_moiety import DOMAIN_ID, node_scale

LARGEST_EXTENT = 1000.0  # Å


def pack(structures: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Concatenates structures (the dictionaries of `to_fields`) into the arrays of one batch, without edges.

    Returns node_type [N], positions [N,3] Å, graph_index [N], cell [B,3,3] Å, pbc [B,3], charge [B], spin [B],
    domain [B], role [N], node_vectors [N,4,3] Å. Arrays are float64 and int64.
    """
    sizes = [len(s["node_type"]) for s in structures]
    num_nodes = sum(sizes)
    cell = np.zeros((len(structures), 3, 3))
    pbc = np.zeros((len(structures), 3), dtype=bool)
    role = np.zeros(num_nodes, dtype=np.int64)
    node_vectors = np.zeros((num_nodes, 4, 3))
    start = 0
    for index, (structure, size) in enumerate(zip(structures, sizes, strict=True)):
        if structure.get("cell") is not None and structure.get("pbc") is not None:
            cell[index], pbc[index] = structure["cell"], structure["pbc"]
        if structure.get("role") is not None:
            role[start : start + size] = structure["role"]
        if structure.get("node_vectors") is not None:
            node_vectors[start : start + size] = structure["node_vectors"]
        start += size
    return {
        "node_type": np.concatenate([s["node_type"] for s in structures]).astype(np.int64),
        "positions": np.concatenate([s["positions"] for s in structures]).astype(np.float64),
        "graph_index": np.repeat(np.arange(len(structures)), sizes),
        "cell": cell,
        "pbc": pbc,
        "charge": np.array([s.get("charge") or 0 for s in structures], dtype=np.int64),
        "spin": np.array([s.get("spin") or 1 for s in structures], dtype=np.int64),
        "domain": np.array([DOMAIN_ID[s.get("domain") or "molecule"] for s in structures], dtype=np.int64),
        "role": role,
        "node_vectors": node_vectors,
    }


def neighbor_list(
    positions: np.ndarray,
    node_type: np.ndarray,
    graph_index: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    cutoff: float,
) -> tuple[np.ndarray, np.ndarray]:
    """All directed pairs with |positions[j] + shift - positions[i]| < cutoff * scale_ij, periodic images included.

    Args:
        positions: [N,3] Å.
        node_type: [N] vocabulary ids; residues double the cutoff.
        graph_index: [N], ascending.
        cell: [B,3,3] Å, rows.
        pbc: [B,3] bool.
        cutoff: Å, between two atoms.

    Returns:
        edge_index [2,E] (row 0 source j, row 1 destination i, sorted by i) and edge_shift [E,3] Å.
    """
    _refuse_vast(positions, graph_index, len(cell))
    scale = node_scale(node_type)
    reach = cutoff * float(scale.max(initial=1.0))
    search = NeighborList(cutoff=reach, full_list=True, sorted=True, n_threads=1)
    starts = np.searchsorted(graph_index, np.arange(len(cell) + 1))
    found: list[tuple[np.ndarray, ...]] = []
    for graph, start in enumerate(starts[:-1]):
        box = _full_cell(cell[graph], pbc[graph])
        i, j, images = search.compute(positions[start : starts[graph + 1]], box, pbc[graph], "ijS", copy=True)
        found.append((i + start, j + start, images @ box))
    i, j, shift = (np.concatenate(parts) for parts in zip(*found, strict=True))
    i, j = i.astype(np.int64), j.astype(np.int64)
    if reach > cutoff:
        distance = np.linalg.norm(positions[j] + shift - positions[i], axis=1)
        near = distance < cutoff * 0.5 * (scale[i] + scale[j])
        i, j, shift = i[near], j[near], shift[near]
    return np.stack([j, i]), shift


def _refuse_vast(positions: np.ndarray, graph_index: np.ndarray, num_graphs: int) -> None:
    """The search sets up a grid over the whole extent and ends the process where that grid is absurd."""
    low, high = np.full((num_graphs, 3), np.inf), np.full((num_graphs, 3), -np.inf)
    np.minimum.at(low, graph_index, positions)
    np.maximum.at(high, graph_index, positions)
    extent = (high - low).max(axis=1)
    if not np.isfinite(positions).all() or (extent > LARGEST_EXTENT).any():
        worst = int(np.argmax(np.nan_to_num(extent, nan=np.inf)))
        raise ValueError(
            f"structure {worst} of the batch spans {extent[worst]:.0f} Å or has coordinates that are not finite; "
            f"at most {LARGEST_EXTENT:.0f} Å are searched for neighbours: are the units Å, is the molecule whole?"
        )


def _full_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cell with zero rows allowed in directions that are not periodic, as the search wants it."""
    if pbc.all() or np.abs(np.linalg.det(cell)) > 1e-6:
        return cell
    if not pbc.any():
        return np.eye(3)
    full = np.array(cell)
    for axis in np.flatnonzero(~pbc):  # any vector out of the plane of the others will do
        normal = np.cross(full[(axis + 1) % 3], full[(axis + 2) % 3])
        length = np.linalg.norm(normal)
        full[axis] = normal / length if length > 1e-6 else np.eye(3)[axis]
    return full


class MoietyFeatureExtractor(FeatureExtractionMixin):
    """Turns structures (anything `to_fields` knows) into the tensors that Moiety models take."""

    model_input_names = ("node_type", "positions", "graph_index", "edge_index", "edge_shift")

    def __init__(self, cutoff: float = 5.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.cutoff = cutoff

    def __call__(self, structures: Any, dtype: torch.dtype = torch.float32, residues: bool = False) -> BatchFeature:
        """Packs one structure or a list of them.

        Args:
            structures: ase.Atoms, rdkit.Mol, pymatgen Structure/Molecule, biotite AtomArray, torch_geometric Data,
                moiety.Structure or a path; or a list of these.
            dtype: of the floating-point inputs.
            residues: make one node of each complete amino acid of a biotite AtomArray, instead of one per atom.

        Returns:
            The inputs of `forward`: node_type, positions, graph_index, edge_index, edge_shift, cell, pbc, charge, spin,
            domain, role, node_vectors.
        """
        objects = structures if isinstance(structures, list | tuple) else [structures]
        if not objects:
            raise ValueError("no structures were given")
        arrays = pack([to_fields(item, residues) for item in objects])
        edge_index, edge_shift = neighbor_list(
            arrays["positions"], arrays["node_type"], arrays["graph_index"], arrays["cell"], arrays["pbc"], self.cutoff
        )
        arrays |= {"edge_index": edge_index, "edge_shift": edge_shift}
        return BatchFeature(to_tensors(arrays, dtype))


def to_tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the arrays, floating-point ones cast to dtype."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


MoietyFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["MoietyFeatureExtractor", "neighbor_list", "pack", "to_tensors"]
