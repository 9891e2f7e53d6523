"""Decaying two-dimensional flows in a periodic square, as velocities at scattered points.

The vorticity w of an incompressible flow obeys dw/dt + u . grad w = nu laplace w, with u the curl of the stream
function and laplace psi = -w. It is solved in Fourier space: 2/3 dealiasing, the viscous term exactly (integrating
factor), the rest by the classical Runge-Kutta scheme. The period is 2 pi, the initial speed 1 (root mean square).

A structure is a cloud of points with the velocity there and, an interval later, again. Points are nodes: the plane is
scaled so that a point has about 16 neighbours within the 5 Å of the neighbour list. One Å is no length of the flow. The
velocity is also the first of the four vectors of a node, where a model sees it; the change of it is what it may learn.
"""
# Shapes: G grid points a side, K = G // 2 + 1 stored wave numbers, N points.

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from moiety.data.download import Archive
from moiety.data.splits import place, select, split_of
from moiety.data.structure import Array, Structure
from moiety.models.vocabulary_moiety import POINT

GRID = 64
STEP = 0.01  # time
INTERVAL = 0.25  # time, between snapshots
SNAPSHOTS = 4  # of a trajectory
PEAK = 4.0  # wave number at which the initial spectrum is largest
VISCOSITIES = (1e-3, 3e-3, 1e-2)
POINTS = 16  # a side of the jittered lattice of points
SPACING = 2.2  # Å, of that lattice
JITTER = 0.35  # of the spacing: no two points come closer than 0.3 spacings
THICKNESS = 10.0  # Å, of the cell across the plane, which is not periodic
THEORY = "Navier-Stokes, incompressible, decaying, pseudo-spectral"

WAVE_Y, WAVE_X = np.fft.fftfreq(GRID, 1 / GRID)[:, None], np.fft.rfftfreq(GRID, 1 / GRID)[None, :]
SQUARE = WAVE_X**2 + WAVE_Y**2
INVERSE = np.where(SQUARE > 0, 1 / np.where(SQUARE > 0, SQUARE, 1), 0)
KEPT = (np.abs(WAVE_X) <= GRID / 3) & (np.abs(WAVE_Y) <= GRID / 3)


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields snapshots of `options["fields"]` initial fields; a field and all that follows from it have one split."""
    names = [f"flow{number:05d}" for number in range(options["fields"])]
    splits = [split_of(name, salt="flows", val=0.1, test=0.1) for name in names for _ in range(SNAPSHOTS)]
    wanted = set(select(splits, options))
    for number, name in enumerate(names):
        snapshots = [index for index in range(SNAPSHOTS) if number * SNAPSHOTS + index in wanted]
        if not snapshots:
            continue
        rng = np.random.default_rng(int(place(name, "flows") * 2**53))
        viscosity = VISCOSITIES[number % len(VISCOSITIES)]
        trajectory = [random_vorticity(rng)]
        for _ in range(SNAPSHOTS):
            trajectory.append(advance(trajectory[-1], viscosity, INTERVAL))
        for index in range(SNAPSHOTS):
            points = scattered(rng)  # drawn for every snapshot, wanted or not: a prefix stays a prefix
            if index in snapshots:
                yield _structure(f"{name}:{index}", trajectory[index : index + 2], points, viscosity, index, splits)


def _structure(
    identity: str, vorticities: list[Array], points: Array, viscosity: float, index: int, splits: list[str]
) -> Structure:
    name = identity.split(":")[0]
    period = POINTS * SPACING
    flat = np.zeros((len(points), 1))
    now, later = (np.hstack([velocity_at(vorticity, points), flat]) for vorticity in vorticities)
    vectors = np.zeros((len(points), 4, 3))
    vectors[:, 0] = now
    return Structure(
        node_type=np.full(len(points), POINT),
        positions=np.hstack([points * period / (2 * np.pi), flat]),
        domain="field",
        id=identity,
        source="flows",
        node_vectors=vectors,
        cell=np.diag([period, period, THICKNESS]),
        pbc=np.array([True, True, False]),
        scalars={"viscosity": viscosity, "time": index * INTERVAL, "interval": INTERVAL},
        node_tensors={"velocity": now, "next_velocity": later, "velocity_change": later - now},
        theory=THEORY,
        groups={"split": splits[int(name.removeprefix("flow")) * SNAPSHOTS], "field": name},
    )


def scattered(rng: np.random.Generator) -> Array:
    """[N, 2] points of the square [0, 2 pi): a lattice, every point moved within its cell."""
    lattice = np.stack(np.meshgrid(np.arange(POINTS), np.arange(POINTS)), axis=-1).reshape(-1, 2) + 0.5
    return (lattice + rng.uniform(-JITTER, JITTER, lattice.shape)) * (2 * np.pi / POINTS)


def random_vorticity(rng: np.random.Generator) -> Array:
    """[G, K] transform of a Gaussian random field around wave number PEAK, of root mean square speed 1."""
    noise = np.fft.rfft2(rng.standard_normal((GRID, GRID)))
    envelope = SQUARE * np.exp(-SQUARE / PEAK**2)
    vorticity = noise * envelope * KEPT
    speed = np.sqrt(np.mean(sum(component**2 for component in velocity(vorticity))))
    return vorticity / speed


def velocity(vorticity: Array) -> tuple[Array, Array]:
    """The components x and y of the velocity on the grid, [G, G] each (rows are y)."""
    stream = vorticity * INVERSE
    return np.fft.irfft2(1j * WAVE_Y * stream), np.fft.irfft2(-1j * WAVE_X * stream)


def velocity_at(vorticity: Array, points: Array) -> Array:
    """[N, 2] velocity at points [N, 2] = (x, y), by the Fourier sum itself: no interpolation."""
    stream = vorticity * INVERSE / GRID**2 * np.where((WAVE_X > 0) & (WAVE_X < GRID / 2), 2, 1)  # halves not stored
    along_y = np.exp(1j * points[:, 1:] * WAVE_Y.T)  # [N, G]
    along_x = np.exp(1j * points[:, :1] * WAVE_X)  # [N, K]
    components = [((along_y @ (factor * stream)) * along_x).sum(axis=1).real for factor in (1j * WAVE_Y, -1j * WAVE_X)]
    return np.stack(components, axis=-1)


def advance(vorticity: Array, viscosity: float, duration: float) -> Array:
    """The vorticity [G, K] a duration later."""
    steps = max(round(duration / STEP), 1)
    step = duration / steps
    half = np.exp(-viscosity * SQUARE * step / 2)  # decay by viscosity in half a step
    for _ in range(steps):
        first = _transport(vorticity)
        second = _transport(half * (vorticity + step / 2 * first))
        third = _transport(half * vorticity + step / 2 * second)
        fourth = _transport(half * (half * vorticity + step * third))
        vorticity = half * (half * (vorticity + step / 6 * first) + step / 3 * (second + third)) + step / 6 * fourth
    return vorticity


def _transport(vorticity: Array) -> Array:
    """-u . grad w, dealiased."""
    x, y = velocity(vorticity)
    slope_x, slope_y = np.fft.irfft2(1j * WAVE_X * vorticity), np.fft.irfft2(1j * WAVE_Y * vorticity)
    return -np.fft.rfft2(x * slope_x + y * slope_y) * KEPT
