"""Laws of physics that a model of atoms should obey, measured on any model: one figure and one bound a law.

    from moiety.testing.physics import check, from_calculator
    report = check(from_calculator(calculator))     # any ASE calculator
    print(report.table())
    report.write("physics.json")

    python -m moiety.testing.physics runs/mine/export [--out physics.json]      # any export of moiety

A model is a function from a list of ase.Atoms to one mapping of arrays a structure: {"energy": eV, "forces": eV/Å
[N, 3], "stress": eV/Å^3 [3, 3], ...}, whichever it has. How an output turns with the structure stands in KINDS, or is
said in `kinds`. Laws that need an output the model lacks are left out and listed as such.
"""
# Shapes: N atoms, M components, C channels.

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import make_supercell, niggli_reduce
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

from moiety.errors import InputError
from moiety.testing.figures import Figure, Report
from moiety.testing.models import (
    KINDS,
    Array,
    Kind,
    Model,
    ModelCalculator,
    Outputs,
    apart,
    from_calculator,
    from_model,
    sample_pair,
    sample_structures,
)

__all__ = ["Figure", "Kind", "Model", "Report", "check", "from_calculator", "from_model", "sample_structures"]

BATCH = 32  # structures asked for at a time
SCAN_STEP = 0.02  # Å
SUSPECTS = 5  # places of a scan that are looked at closely


@dataclass(frozen=True)
class Subject:
    """What the laws are given: the model, how its outputs turn, and the structures by name."""

    model: Model
    structures: Mapping[str, Atoms]
    kinds: Mapping[str, Kind]
    tolerance: float

    def __call__(self, atoms: Atoms) -> Outputs:
        return self.model([atoms])[0]

    def compared(self, law: str, name: str, found: Outputs, expected: Mapping[str, Array]) -> Iterator[Figure]:
        """max |found - expected| / max |expected| of every output."""
        for output, value in expected.items():
            scale = max(float(np.abs(value).max()), np.finfo(np.float64).tiny)
            error = float(np.abs(np.asarray(found[output]) - value).max()) / scale
            yield Figure(law, output, name, error, self.tolerance)


def check(
    model: Model,
    structures: Mapping[str, Atoms] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    tolerance: float = 1e-8,
    low_precision: Model | None = None,
    md_steps: int = 200,
) -> Report:
    """Measures every law.

    Args:
        model: what is checked; in double precision if the bounds are to mean something.
        structures: name -> structure, of both molecules and periodic ones; `sample_structures()` when not given.
        kinds: of outputs beyond KINDS.
        tolerance: relative, of the laws that hold exactly.
        low_precision: the same model in bfloat16, compared with `model` within 5 %.
        md_steps: of the trajectory whose energy is watched, 0.5 fs each.
    """
    subject = Subject(model, structures or sample_structures(), KINDS | dict(kinds or {}), tolerance)
    report = Report()
    outputs = {name for outputs in model(list(subject.structures.values())) for name in outputs}
    unknown = outputs - set(subject.kinds)
    if unknown:
        raise ValueError(f"outputs {', '.join(sorted(unknown))}: say in `kinds` how they turn")
    for law, needs in LAWS.items():
        if missing := needs - outputs:
            report.left_out[law.__name__.replace("_", " ")] = f"the model gives no {' or '.join(sorted(missing))}"
        else:
            report.figures += law(subject)
    if outputs >= {"energy", "forces"} and md_steps:
        report.figures += drift(subject, md_steps)
    if low_precision is not None:
        report.figures += precision(subject, low_precision)
    return report


# The laws. Each yields its figures.


def rotation(subject: Subject) -> Iterator[Figure]:
    """Scalars stay, vectors and matrices turn along."""
    yield from _turned(subject, "rotation", _orthogonal(reflect=False))


def reflection(subject: Subject) -> Iterator[Figure]:
    """The same under a rotation with inversion: no output is a pseudo-tensor."""
    yield from _turned(subject, "reflection", _orthogonal(reflect=True))


def _turned(subject: Subject, law: str, matrix: Array) -> Iterator[Figure]:
    for name, atoms in subject.structures.items():
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        expected = {
            output: _rotate(np.asarray(value), matrix, subject.kinds[output].rank)
            for output, value in subject(atoms).items()
        }
        yield from subject.compared(law, name, subject(turned), expected)


def translation(subject: Subject) -> Iterator[Figure]:
    """Nothing depends on where the structure stands; atoms of a crystal may leave the cell."""
    for name, atoms in subject.structures.items():
        moved = atoms.copy()
        moved.positions += (3.0, -40.0, 11.0)
        yield from subject.compared("translation", name, subject(moved), subject(atoms))


def permutation(subject: Subject) -> Iterator[Figure]:
    """What stands for an atom follows it; the rest does not depend on the order."""
    for name, atoms in subject.structures.items():
        order = np.random.default_rng(3).permutation(len(atoms))
        expected = {
            output: np.asarray(value)[order] if subject.kinds[output].per_atom else value
            for output, value in subject(atoms).items()
        }
        yield from subject.compared("permutation", name, subject(atoms[order]), expected)


def images(subject: Subject) -> Iterator[Figure]:
    """An atom and any of its periodic images are one."""
    for name, atoms in _periodic(subject):
        moved = atoms.copy()
        steps = np.random.default_rng(4).integers(-2, 3, size=(len(atoms), 3)) * atoms.pbc
        moved.positions += steps @ atoms.cell.array
        yield from subject.compared("images", name, subject(moved), subject(atoms))


def supercell(subject: Subject) -> Iterator[Figure]:
    """Two cells have twice the energy, the same stress, and every copy of an atom the same force."""
    for name, atoms in _periodic(subject):
        axis = int(np.argmax(atoms.pbc))
        repeats = np.where(np.arange(3) == axis, 2, 1)
        expected = {}
        for output, value in subject(atoms).items():
            kind = subject.kinds[output]
            tiled = np.concatenate([value, value]) if kind.per_atom else np.asarray(value) * (1 + kind.extensive)
            expected[output] = tiled
        yield from subject.compared("supercell", name, subject(atoms.repeat(repeats)), expected)


def cell_choice(subject: Subject) -> Iterator[Figure]:
    """A reduced and a skewed cell of the same crystal are the same crystal."""
    for name, atoms in _periodic(subject):
        if not atoms.pbc.all():
            continue
        reference = subject(atoms)
        skewed = make_supercell(atoms, [[1, 0, 0], [2, 1, 0], [-1, 1, 1]], wrap=False)
        yield from subject.compared("cell choice", f"{name}, skewed", subject(skewed), reference)
        reduced = atoms.copy()
        niggli_reduce(reduced)  # turns the crystal: scalars alone can be compared
        scalars = {output: value for output, value in reference.items() if subject.kinds[output].rank == 0}
        yield from subject.compared("cell choice", f"{name}, reduced", subject(reduced), scalars)


def batch(subject: Subject) -> Iterator[Figure]:
    """Structures that are calculated together do not know of each other."""
    together = subject.model(list(subject.structures.values()))
    for (name, atoms), found in zip(subject.structures.items(), together, strict=True):
        yield from subject.compared("batch", name, found, subject(atoms))


def smoothness(subject: Subject) -> Iterator[Figure]:
    """Neither the energy nor its slope jumps while two molecules part and neighbours leave the cutoff.

    Fourth differences of a scan from 2.5 to 14 Å show where a jump may be; bisection goes there, and what does not
    vanish with the interval is a jump. The cutoff need not be known.
    """
    first, second = sample_pair()

    def energies(distances: Array) -> Array:
        found = []
        for start in range(0, len(distances), BATCH):
            structures = [apart(first, second, float(distance)) for distance in distances[start : start + BATCH]]
            found += [float(outputs["energy"]) for outputs in subject.model(structures)]
        return np.array(found)

    def slope(distance: float, step: float = 2e-4) -> float:
        low, high = energies(np.array([distance - step, distance + step]))
        return (high - low) / (2 * step)

    grid = np.arange(2.5, 14.0, SCAN_STEP)
    scan = energies(grid)
    suspicion = np.abs(np.diff(scan, n=4))
    steepest = float(np.abs(np.diff(scan)).max()) / SCAN_STEP
    jumps, kinks = [], []
    for _ in range(SUSPECTS):
        index = int(np.argmax(suspicion))
        suspicion[max(index - 5, 0) : index + 6] = 0.0
        place = _most_bent(energies, grid[index], grid[index + 4])
        jumps.append(_left_over(lambda x: float(energies(np.array([x]))[0]), place))
        kinks.append(_left_over(slope, place))
    yield Figure("smoothness", "energy", "ethanol and water", 1e3 * max(jumps), 1e-2, "meV")
    yield Figure("smoothness", "slope of energy", "ethanol and water", max(kinks) / steepest, 1e-4, "of the steepest")


def extensivity(subject: Subject) -> Iterator[Figure]:
    """Two molecules 100 Å apart have the sum of their energies."""
    first, second = sample_pair()
    both = apart(first, second, 100.0)
    energies = [float(outputs["energy"]) for outputs in subject.model([both, first, second])]
    error = abs(energies[0] - energies[1] - energies[2]) / len(both)
    yield Figure("extensivity", "energy", "ethanol and water", 1e3 * error, 1e-3, "meV/atom")


def finite_difference_forces(subject: Subject, step: float = 1e-3) -> Iterator[Figure]:
    """Forces are minus the derivative of the energy along random directions."""
    for name, atoms in subject.structures.items():
        rng = np.random.default_rng(5)
        forces = subject(atoms)["forces"]
        for _ in range(3):
            direction = rng.normal(size=(len(atoms), 3))
            direction /= np.linalg.norm(direction)
            slope = _slope(lambda h, atoms=atoms, d=direction: subject(_moved(atoms, h * d))["energy"], step)
            error = abs(slope + float((forces * direction).sum())) / max(float(np.linalg.norm(forces)), 1e-12)
            yield Figure("finite difference forces", "forces", name, error, 1e-5)


def finite_difference_stress(subject: Subject, step: float = 1e-4) -> Iterator[Figure]:
    """Stress is the derivative of the energy by strain, over the volume; positive under tension."""
    for name, atoms in _periodic(subject):
        if not atoms.pbc.all():
            continue
        stress = subject(atoms)["stress"]
        for a, b in ((0, 0), (1, 1), (0, 1), (1, 2)):
            strain = np.zeros((3, 3))
            strain[a, b] = strain[b, a] = 0.5 if a != b else 1.0
            slope = _slope(lambda h, atoms=atoms, e=strain: subject(_strained(atoms, h * e))["energy"], step)
            error = abs(slope / atoms.get_volume() - float((stress * strain).sum()))
            yield Figure(
                "finite difference stress", "stress", name, error / max(float(np.abs(stress).max()), 1e-12), 1e-5
            )


def drift(subject: Subject, steps: int) -> Iterator[Figure]:
    """Energy is conserved along a short trajectory at constant energy, started at 300 K, in steps of 0.5 fs."""
    atoms = next(iter(subject.structures.values())).copy()
    atoms.calc = ModelCalculator(subject.model)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(6))
    Stationary(atoms)
    energies = []
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(steps)
    slope = np.polyfit(0.5e-3 * np.arange(len(energies)), energies, 1)[0]
    name = next(iter(subject.structures))
    yield Figure("energy drift", "energy", name, 1e3 * abs(float(slope)) / len(atoms), 1.0, "meV/atom/ps")


def precision(subject: Subject, low_precision: Model) -> Iterator[Figure]:
    """Root mean square difference of bfloat16 from full precision, relative to that of the output in all structures.

    In one structure a single number may happen to be next to nothing.
    """
    full = {name: subject(atoms) for name, atoms in subject.structures.items()}
    squares: dict[str, list[float]] = {}
    for outputs in full.values():
        for output, value in outputs.items():
            squares.setdefault(output, []).append(_mean_square(value))
    for name, atoms in subject.structures.items():
        low = low_precision([atoms])[0]
        for output, value in full[name].items():
            error = _mean_square(np.asarray(low[output], dtype=np.float64) - value)
            scale = max(float(np.mean(squares[output])), 1e-24)
            yield Figure("bfloat16", output, name, math.sqrt(error / scale), 0.05)


def _mean_square(value: Any) -> float:
    return float(np.square(value).mean())


LAWS: dict[Callable[[Subject], Iterator[Figure]], set[str]] = {  # and the outputs that each needs
    rotation: set(), reflection: set(), translation: set(), permutation: set(), images: set(), supercell: set(),
    cell_choice: set(), batch: set(), smoothness: {"energy"}, extensivity: {"energy"},
    finite_difference_forces: {"energy", "forces"}, finite_difference_stress: {"energy", "stress"},
}  # fmt: skip


def _periodic(subject: Subject) -> Iterator[tuple[str, Atoms]]:
    return ((name, atoms) for name, atoms in subject.structures.items() if atoms.pbc.any())


def _orthogonal(reflect: bool) -> Array:
    """A random rotation, or one followed by inversion."""
    q, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q)) * (-1 if reflect else 1)


def _rotate(value: Array, matrix: Array, rank: int) -> Array:
    if rank == 0:
        return value
    return value @ matrix.T if rank == 1 else matrix @ value @ matrix.T


def _moved(atoms: Atoms, displacement: Array) -> Atoms:
    moved = atoms.copy()
    moved.positions += displacement
    return moved


def _strained(atoms: Atoms, strain: Array) -> Atoms:
    strained = atoms.copy()
    strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return strained


def _slope(function: Callable[[float], Any], step: float) -> float:
    """Derivative at 0: central differences of two steps, extrapolated (error of order step^4)."""
    near, far = (float(function(h)) - float(function(-h)) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def _most_bent(energies: Callable[[Array], Array], low: float, high: float, until: float = 1e-3) -> float:
    """The place in [low, high] Å where the energy bends most, to within `until`."""
    while high - low > until:
        middle = (low + high) / 2
        e = energies(np.array([low, (low + middle) / 2, middle, (middle + high) / 2, high]))
        if abs(e[0] - 2 * e[1] + e[2]) >= abs(e[2] - 2 * e[3] + e[4]):
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _left_over(function: Callable[[float], float], place: float, width: float = 8e-3) -> float:
    """|change| across a place as the interval shrinks to nothing: of a smooth function 0."""
    wide, narrow = (function(place + w / 2) - function(place - w / 2) for w in (width, width / 4))
    return abs(4 * narrow - wide) / 3


def main(argv: Sequence[str] | None = None) -> int:
    """Checks an export of moiety; 0 if every law holds, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m moiety.testing.physics", description=main.__doc__)
    parser.add_argument("model", type=Path, help="export directory of a run")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)
    from transformers import AutoProcessor

    from moiety.inference.loading import read_model_config
    from moiety.models.modeling_moiety import MoietyForPrediction, MoietyModel

    try:
        config = read_model_config(args.model)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    kind = MoietyForPrediction if "MoietyForPrediction" in (config.get("architectures") or []) else MoietyModel
    exported, processor = kind.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    model, kinds = from_model(exported, processor)
    low_precision, _ = from_model(exported, processor, torch.bfloat16)
    report = check(model, kinds=kinds, low_precision=low_precision)
    print(report.table())
    if args.out:
        report.write(args.out)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
