"""Numbers that a copy of a structure cannot hide from: the same after any motion, reordering or choice of cell.

Both fingerprints change smoothly, by no more than the atoms moved, so copies are looked for within a distance and never
in bins: nothing is lost at an edge.

Open systems: distances to the centroid, sorted within each element. For two structures whose best superposition has the
root mean square deviation d, the fingerprints differ by at most d (the triangle inequality for each atom; sorting
minimises a sum of squares), so a search within d is complete. Mirror images share a fingerprint.

Crystals: for each ordered pair of elements the mean distance to the first, second, ... K-th neighbour (average minimum
distances; Widdowson et al., MATCH Commun. Math. Comput. Chem. 87, 529 (2022), here by pairs of elements). A supercell,
another origin and a skewed cell have the same neighbours, hence the same numbers; if no atom moves further than d, no
entry changes by more than 2 d.
"""
# Shapes: N nodes, n and m structures of one composition, D entries of a fingerprint, K neighbours.

from __future__ import annotations

from itertools import product
from math import gcd

import numpy as np
from scipy.spatial import KDTree

from moiety.data.structure import Array, Structure

NUM_NEIGHBOURS = 8  # K
VACUUM = 15.0  # Å
NUM_BLOCKS = 16  # dimensions of the tree: more are slower, not sharper


def composition(structure: Structure) -> tuple[int, ...]:
    """Types and counts, flat; the counts of a periodic structure reduced, and marked by a leading 1 (open: 0)."""
    types, counts = np.unique(structure.node_type, return_counts=True)
    if structure.periodic:
        counts = counts // gcd(*counts.tolist())
    return (int(structure.periodic), *np.stack([types, counts], axis=1).reshape(-1).tolist())


def fingerprint(structure: Structure) -> Array:
    """[D] in Å, scaled so that Euclidean distance is a root mean square; D depends on the composition alone."""
    profile = _neighbour_profile(structure) if structure.periodic else _radial_profile(structure)
    return profile / np.sqrt(len(profile))


def within(first: Array, second: Array, reach: float) -> list[list[int]]:
    """For each row of second [m, D], the rows of first [n, D] within reach, nearest first.

    Averages of neighbouring entries, which lie no further apart than the rows, go through a tree; what it finds is
    checked in full.
    """
    found = KDTree(in_blocks(second)).query_ball_tree(KDTree(in_blocks(first)), reach)
    near = []
    for row, candidates in zip(second, found, strict=True):
        distance = np.linalg.norm(first[candidates] - row, axis=1)
        order = np.argsort(distance, kind="stable")
        near.append([candidates[place] for place in order if distance[place] <= reach])
    return near


def in_blocks(rows: Array, num_blocks: int = NUM_BLOCKS) -> Array:
    """[n, at most num_blocks]: projections on normalised runs of columns. No distance between rows grows by it."""
    size = rows.shape[1]
    if size <= num_blocks:
        return rows
    starts = np.linspace(0, size, num_blocks, endpoint=False).astype(int)
    return np.add.reduceat(rows, starts, axis=1) / np.sqrt(np.diff(starts, append=size))


def _radial_profile(structure: Structure) -> Array:
    radius_N = np.linalg.norm(structure.positions - structure.positions.mean(axis=0), axis=1)
    return radius_N[np.lexsort((radius_N, structure.node_type))]


def _neighbour_profile(structure: Structure) -> Array:
    """[types * types * K] Å."""
    types = np.unique(structure.node_type)
    reach = 3.0 * _spacing(structure)
    while True:
        images, image_type = _images(structure, reach)
        distance = np.stack([_nearest(structure.positions, images[image_type == other]) for other in types], axis=1)
        if distance.max() <= reach:  # every image this near is there
            return np.concatenate([distance[structure.node_type == kind].mean(axis=0).reshape(-1) for kind in types])
        reach *= 1.5


def _nearest(positions: Array, images: Array) -> Array:
    """[N, K] Å to the nearest images, the node itself left out; inf where there are too few."""
    distance = KDTree(images).query(positions, NUM_NEIGHBOURS + 1)[0]
    own = distance[:, :1] < 1e-9  # a node is its own first image where it is of the type asked for
    return np.where(own, distance[:, 1:], distance[:, :-1])


def _spacing(structure: Structure) -> float:
    """Å, the edge of the cube that one node has to itself (vacuum included: the search only starts there)."""
    vectors = lattice(structure)
    return float(np.cbrt(abs(np.linalg.det(vectors)) / structure.num_nodes))


def _images(structure: Structure, reach: float) -> tuple[Array, Array]:
    """All nodes, and their periodic images within reach of any node: positions and types."""
    vectors = lattice(structure)
    inverse = np.linalg.inv(vectors)
    fractions = structure.positions @ inverse
    spread = np.ptp(fractions, axis=0)
    heights = 1 / np.linalg.norm(inverse, axis=0)
    pbc = np.asarray(structure.pbc, dtype=bool)
    num = np.where(pbc, np.ceil(reach / heights + spread), 0).astype(int)
    shifts = np.array(list(product(*(range(-count, count + 1) for count in num))))
    shifts = shifts[np.argsort(np.abs(shifts).sum(axis=1), kind="stable")]
    images = (structure.positions + (shifts @ vectors)[:, None]).reshape(-1, 3)
    image_type = np.tile(structure.node_type, len(shifts))
    low, high = structure.positions.min(axis=0) - reach, structure.positions.max(axis=0) + reach
    inside = ((images >= low - 1e-9) & (images <= high + 1e-9)).all(axis=1)
    return images[inside], image_type[inside]


def lattice(structure: Structure) -> Array:
    """[3, 3] Å, the cell; directions that are not periodic get a vector at right angles to the others, and vacuum."""
    assert structure.cell is not None and structure.pbc is not None
    pbc = np.asarray(structure.pbc, dtype=bool)
    vectors = np.array(structure.cell, dtype=np.float64)
    if pbc.all():
        return vectors
    _, _, directions = np.linalg.svd(vectors[pbc])
    for axis, direction in zip(np.flatnonzero(~pbc), directions[pbc.sum() :], strict=True):
        vectors[axis] = direction * (np.ptp(structure.positions @ direction) + VACUUM)
    return vectors
