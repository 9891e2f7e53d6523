"""Structures as solid 3-D figures: atoms as CPK-coloured spheres, bonds, unit cells, CA traces, displacement arrows.

Everything is a triangle mesh (plotly `Mesh3d`), so that sizes are in Å and a figure looks the same at every zoom.
"""
# Shapes: N nodes, P points of a mesh, F faces.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import plotly.graph_objects as go
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from scipy.spatial import ConvexHull, KDTree

from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import FIRST_RESIDUE, MASK, TOKENS

Mesh = tuple[np.ndarray, np.ndarray]  # points [P,3], faces [F,3]

TRUE_COLOR, PREDICTED_COLOR = "#0c9a5b", "#c2288f"
BOND_COLOR, CELL_COLOR, TRACE_COLOR = "#a9a8a2", "#898781", "#b9c7dc"
RESIDUE_COLORS = {
    "hydrophobic": ("#8d8b84", "ALA VAL LEU ILE MET PHE TRP PRO GLY CYS"),
    "polar": ("#4aa3c7", "SER THR ASN GLN TYR HIS SEC PYL UNK"),
    "acidic": ("#e34948", "ASP GLU"),
    "basic": ("#2a78d6", "LYS ARG"),
}
LIGHT = {"ambient": 0.55, "diffuse": 0.75, "specular": 0.25, "roughness": 0.45, "fresnel": 0.1}
BOND_SLACK = 0.3  # Å
FAINTEST = 0.05  # share of the largest weight from which on a halo is drawn
MAX_CA_STEP = 4.6  # Å: a longer step along the chain is a break


def structure_figure(example: dict[str, Any], height: int = 360) -> tuple[go.Figure, float]:
    """Draws one denoising example (see `moiety.inference.examples`) and the way back to the undisturbed structure.

    Returns:
        The figure, and by which factor its arrows are longer than the displacements.
    """
    node_type = np.asarray(example["node_type"])
    true = np.asarray(example["true_noise"], dtype=float)
    predicted = np.asarray(example["predicted_noise"], dtype=float)
    places = np.asarray(example["positions"], dtype=float) + true  # as the model sees it: displaced
    cell = None if example["cell"] is None else np.asarray(example["cell"], dtype=float)
    traces = _solid(node_type, places, cell, np.asarray(example["positions"], dtype=float))
    all_residues = is_residue(node_type).all()
    length = 2.6 if all_residues else 1.25
    factor = float(length / max(np.sqrt((true**2).sum(1).mean()), 1e-9))
    width = 0.13 if all_residues else 0.05
    for name, noise, color in (("true", true, TRUE_COLOR), ("predicted", predicted, PREDICTED_COLOR)):
        mesh = _merge(_arrow(p, p - factor * d, width) for p, d in zip(places, noise, strict=True))
        traces.append(_mesh3d(mesh, color, name))
    return _scene(traces, places, height), factor


def weighed_figure(structure: Structure, weights: Sequence[float], height: int = 420) -> go.Figure:
    """Draws a structure with a halo around its nodes, as large and as opaque as their weights are.

    Args:
        structure: any.
        weights: [N], of which the largest has the fullest halo.
        height: px.
    """
    shares = np.asarray(weights) / max(np.max(weights), 1e-30)
    traces = _solid(structure.node_type, structure.positions, structure.cell, structure.positions)
    ball = _sphere(1)
    size = 1.6 if is_residue(structure.node_type).all() else 0.75
    for place, share, weight in zip(structure.positions, shares, weights, strict=True):
        if share > FAINTEST:
            mesh = (place + size * share ** (1 / 3) * ball[0], ball[1])
            halo = _mesh3d(mesh, PREDICTED_COLOR, f"weight {weight:.0%}")
            halo.opacity = 0.12 + 0.4 * share
            traces.append(halo)
    return _scene(traces, structure.positions, height)


def is_residue(node_type: np.ndarray) -> np.ndarray:
    """[N] bool."""
    return (node_type >= FIRST_RESIDUE) & (node_type < MASK)


def _solid(
    node_type: np.ndarray, places: np.ndarray, cell: np.ndarray | None, undisturbed: np.ndarray
) -> list[go.Mesh3d]:
    """Atoms with their bonds, chains, the unit cell; atoms on its border stand on all sides of it."""
    residue = is_residue(node_type)
    traces = []
    if residue.any():
        traces += _chain(places[residue], node_type[residue])
    if (~residue).any() and cell is None:
        traces += _atoms(places[~residue], node_type[~residue])
    elif cell is not None:
        copies, shifts = _copies_on_the_border(undisturbed, cell)
        traces.append(_cell(cell))
        traces += _atoms(places[copies] + shifts, node_type[copies])
    return traces


def _scene(traces: list[Any], places: np.ndarray, height: int) -> go.Figure:
    """A figure that holds all traces, without axes."""
    figure = go.Figure(traces)
    points = np.concatenate([np.stack([trace.x, trace.y, trace.z], axis=1) for trace in traces])
    centre = (points.min(0) + points.max(0)) / 2
    radius = float(np.linalg.norm(points - centre, axis=1).max())
    axes = {
        f"{axis}axis": {"visible": False, "range": [middle - radius, middle + radius]}
        for axis, middle in zip("xyz", centre, strict=True)
    }
    figure.update_layout(
        height=height,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        scene={**axes, "aspectmode": "cube", "camera": _camera(places)},
    )
    return figure


def _camera(places: np.ndarray) -> dict[str, Any]:
    """Looks along the direction in which the structure is thinnest."""
    axes = np.linalg.svd(places - places.mean(0), full_matrices=True)[2]
    eye = 1.4 * axes[2] + 0.3 * axes[1]
    return {"eye": dict(zip("xyz", eye, strict=True)), "up": dict(zip("xyz", axes[1], strict=True))}


def _atoms(places: np.ndarray, numbers: np.ndarray) -> list[go.Mesh3d]:
    """Spheres by element, and bonds between atoms closer than the sum of their covalent radii and 0.3 Å."""
    ball = _sphere(2 if len(places) <= 80 else 1)
    known = np.where(numbers < len(covalent_radii), numbers, 0)
    traces = []
    for number in np.unique(numbers):
        chosen = numbers == number
        size = 0.14 + 0.24 * covalent_radii[known[chosen][0]]
        mesh = _merge((p + size * ball[0], ball[1]) for p in places[chosen])
        red, green, blue = (255 * jmol_colors[min(number, len(jmol_colors) - 1)]).astype(int)
        traces.append(_mesh3d(mesh, f"rgb({red},{green},{blue})", TOKENS[number]))
    pairs = KDTree(places).query_pairs(2 * covalent_radii[known].max() + BOND_SLACK, output_type="ndarray")
    radii = covalent_radii[known]
    distance = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1)
    bonds = pairs[distance < radii[pairs[:, 0]] + radii[pairs[:, 1]] + BOND_SLACK]
    if len(bonds):
        traces.append(_mesh3d(_merge(_tube(places[i], places[j], 0.08) for i, j in bonds), BOND_COLOR, "bond"))
    return traces


def _chain(places: np.ndarray, node_type: np.ndarray) -> list[go.Mesh3d]:
    """A smooth tube through the CA atoms and a bead for each residue, coloured by its chemistry."""
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    segments = np.split(places, np.flatnonzero(steps > MAX_CA_STEP) + 1)
    curves = [_smooth(segment) for segment in segments if len(segment) > 1]
    traces = []
    if curves:
        tubes = (_tube(a, b, 0.32) for curve in curves for a, b in pairwise(curve))
        traces.append(_mesh3d(_merge(tubes), TRACE_COLOR, "CA trace"))
    ball = _sphere(1)
    for kind, (color, names) in RESIDUE_COLORS.items():
        chosen = [p for p, t in zip(places, node_type, strict=True) if TOKENS[t].strip("<>") in names.split()]
        if chosen:
            traces.append(_mesh3d(_merge((p + 0.62 * ball[0], ball[1]) for p in chosen), color, kind))
    return traces


def _copies_on_the_border(positions: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All atoms, and again those on a face of the cell where they stand on the face opposite: indices, shifts in Å."""
    fractional = positions @ np.linalg.inv(cell)
    indices, shifts = [], []
    for shift in product((0, 1), repeat=3):
        chosen = np.flatnonzero((np.abs(fractional) < 0.01)[:, np.array(shift, dtype=bool)].all(1))
        indices.append(chosen)
        shifts.append(np.tile(np.array(shift) @ cell, (len(chosen), 1)))
    return np.concatenate(indices), np.concatenate(shifts)


def _cell(cell: np.ndarray) -> go.Mesh3d:
    """The twelve edges of the unit cell; rows of `cell` are its vectors."""
    corners = [np.array(c) for c in product((0, 1), repeat=3)]
    edges = [(a, b) for a in corners for b in corners if (b - a).sum() == 1 and np.abs(b - a).sum() == 1]
    return _mesh3d(_merge(_tube(a @ cell, b @ cell, 0.035) for a, b in edges), CELL_COLOR, "unit cell")


def _mesh3d(mesh: Mesh, color: str, name: str) -> go.Mesh3d:
    (x, y, z), (i, j, k) = mesh[0].astype(np.float32).T, mesh[1].astype(np.int32).T
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, color=color, name=name, hoverinfo="name", lighting=LIGHT,
        lightposition={"x": 2000, "y": 4000, "z": 6000},
    )  # fmt: skip


def _merge(meshes: Iterable[Mesh]) -> Mesh:
    points, faces, start = [], [], 0
    for mesh_points, mesh_faces in meshes:
        points.append(mesh_points)
        faces.append(mesh_faces + start)
        start += len(mesh_points)
    return np.concatenate(points), np.concatenate(faces)


def _sphere(subdivisions: int) -> Mesh:
    """Unit sphere from an icosahedron whose faces are split in four `subdivisions` times."""
    golden = (1 + 5**0.5) / 2
    points = np.array([p for a in (-1, 1) for b in (-golden, golden) for p in ((0, a, b), (a, b, 0), (b, 0, a))])
    points = points / np.linalg.norm(points[0])
    for _ in range(subdivisions):
        faces = ConvexHull(points).simplices
        edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)), axis=0)
        middles = points[edges].mean(1)
        points = np.concatenate([points, middles / np.linalg.norm(middles, axis=1, keepdims=True)])
    return points, _outward(points, ConvexHull(points).simplices)


def _outward(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces of a convex mesh around the origin, wound so that their normals point out."""
    a, b, c = (points[faces[:, corner]] for corner in range(3))
    inward = (np.cross(b - a, c - a) * a).sum(1) < 0
    return np.where(inward[:, None], faces[:, ::-1], faces)


def _tube(start: np.ndarray, end: np.ndarray, radius: float, end_radius: float | None = None, sides: int = 8) -> Mesh:
    """An open cylinder, or a cone where `end_radius` is given."""
    axis = end - start
    across = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
    across = across / max(np.linalg.norm(across), 1e-12)
    other = np.cross(axis, across) / max(np.linalg.norm(axis), 1e-12)
    angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)[:, None]
    ring = np.cos(angle) * across + np.sin(angle) * other
    points = np.concatenate([start + radius * ring, end + (radius if end_radius is None else end_radius) * ring])
    here = np.arange(sides)
    there = (here + 1) % sides
    faces = np.concatenate(
        [np.stack([here, there, here + sides], 1), np.stack([there, there + sides, here + sides], 1)]
    )
    return points, faces


def _arrow(start: np.ndarray, end: np.ndarray, radius: float) -> Mesh:
    """A shaft and a head of at most 40 % of the arrow's length."""
    length = max(float(np.linalg.norm(end - start)), 1e-9)
    neck = end - (end - start) * min(0.4, 6 * radius / length)
    return _merge([_tube(start, neck, radius), _tube(neck, end, 2.4 * radius, 0.0)])


def _smooth(points: np.ndarray, pieces: int = 4) -> np.ndarray:
    """Catmull-Rom curve through the points, `pieces` segments between neighbours."""
    padded = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
    t = np.linspace(0, 1, pieces, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return np.concatenate([curve.reshape(-1, 3), points[-1:]])
