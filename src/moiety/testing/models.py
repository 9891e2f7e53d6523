"""What is checked: models of any make behind one call, and structures to try them on."""
# Shapes: N atoms, M components, C channels.

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.spacegroup import crystal
from numpy.typing import NDArray

from moiety.models.geometry_moiety import symmetric_basis

Array = NDArray[Any]
Outputs = Mapping[str, Array]


class Model(Protocol):
    """What is checked."""

    def __call__(self, structures: Sequence[Atoms], /) -> list[Outputs]: ...


@dataclass(frozen=True)
class Kind:
    """How an output turns with the structure and grows with it."""

    rank: int = 0  # 0 scalar, 1 vector, 2 matrix
    per_atom: bool = False
    extensive: bool = False  # of several copies it is the sum


KINDS = {
    "energy": Kind(extensive=True),
    "forces": Kind(rank=1, per_atom=True),
    "stress": Kind(rank=2),
}

FEATURE_KINDS = {
    "scalars": Kind(per_atom=True),
    "vectors": Kind(rank=1, per_atom=True),
    "matrices": Kind(rank=2, per_atom=True),
    "graph_features": Kind(),
}
TASK_KINDS = {  # of the heads of MoietyForPrediction
    "energy": Kind(extensive=True), "sum": Kind(extensive=True), "mean": Kind(), "average": Kind(),
    "interaction": Kind(extensive=True), "dipole_norm": Kind(), "node": Kind(per_atom=True),
    "vector": Kind(rank=1, per_atom=True),
}  # fmt: skip


def from_calculator(calculator: Calculator) -> Model:
    """A model out of an ASE calculator; it is asked for energy, forces and stress as far as it has them."""

    def model(structures: Sequence[Atoms]) -> list[Outputs]:
        found = []
        for atoms in structures:
            names = [n for n in KINDS if n in calculator.implemented_properties and (n != "stress" or atoms.pbc.all())]
            outputs = {name: np.array(calculator.get_property(name, atoms), dtype=np.float64) for name in names}
            if "stress" in outputs:
                xx, yy, zz, yz, xz, xy = outputs["stress"]
                outputs["stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
            found.append(outputs)
        return found

    return model


def from_model(model: Any, processor: Any, dtype: torch.dtype = torch.float64) -> tuple[Model, dict[str, Kind]]:
    """A model out of a Moiety model and its processor, and the kinds of its outputs.

    Its outputs are the predictions of its heads if it has any, and the features of the trunk: scalars [N, C], vectors
    [N, C, 3] and matrices [N, C, 3, 3] of the nodes, `graph_features` [C] of the structure.

    Args:
        model: MoietyModel or MoietyForPrediction; a copy of it is used.
        processor: its processor.
        dtype: of weights and positions; bfloat16 as in training: both in single precision, autocast on.
    """
    low = dtype == torch.bfloat16
    dtype = torch.float32 if low else dtype
    model = copy.deepcopy(model).to(dtype).eval()
    tasks = model.config.tasks or {}
    kinds = FEATURE_KINDS | {name: TASK_KINDS[spec["kind"]] for name, spec in tasks.items()}

    def called(structures: Sequence[Atoms]) -> list[Outputs]:
        inputs = processor(list(structures), dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = model(**inputs)
        arrays = _features(output.node_features.double()) | {"graph_features": output.graph_features.double().numpy()}
        predictions: dict[str, torch.Tensor] = getattr(output, "predictions", None) or {}
        arrays |= {name: value.double().numpy() for name, value in predictions.items()}
        stops = np.cumsum([len(atoms) for atoms in structures])[:-1]
        parts = {
            name: np.split(value, stops) if (KINDS | kinds)[name].per_atom else list(value)
            for name, value in arrays.items()
        }
        return [
            {name: part[b] for name, part in parts.items() if _is_defined(name, atoms)}
            for b, atoms in enumerate(structures)
        ]

    def _is_defined(name: str, atoms: Atoms) -> bool:
        if name == "stress":
            return bool(atoms.pbc.all())
        return not (name in tasks and tasks[name]["kind"] in ("dipole_norm", "interaction") and atoms.pbc.any())

    return called, kinds


def _features(features_NMC: torch.Tensor) -> dict[str, Array]:
    found = {"scalars": features_NMC[:, 0], "vectors": features_NMC[:, 1:4].mT}
    if features_NMC.shape[1] == 9:
        basis = symmetric_basis(features_NMC)
        found["matrices"] = torch.einsum("sab,nsc->ncab", basis, features_NMC[:, 4:])
    return {name: value.numpy() for name, value in found.items()}


def sample_structures() -> dict[str, Atoms]:
    """Molecules, crystals and a slab, all rattled off their symmetric points."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    add_adsorbate(slab, "O", 1.2, "fcc")
    rutile = crystal(
        ("Ti", "O"), [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136, cellpar=[4.59, 4.59, 2.96, 90, 90, 90]
    )
    found = {
        "ethanol": molecule("CH3CH2OH"),
        "benzene": molecule("C6H6"),
        "silicon": bulk("Si"),
        "rutile": Atoms(rutile.numbers, rutile.positions, cell=rutile.cell, pbc=True),
        "oxygen on copper": slab,
    }
    for seed, atoms in enumerate(found.values()):
        atoms.positions += np.random.default_rng(seed).normal(0, 0.05, size=(len(atoms), 3))
    return found


def sample_pair() -> tuple[Atoms, Atoms]:
    """Ethanol and water, rattled."""
    pair = molecule("CH3CH2OH"), molecule("H2O")
    for seed, atoms in enumerate(pair):
        atoms.positions += np.random.default_rng(10 + seed).normal(0, 0.03, size=(len(atoms), 3))
    return pair


def apart(first: Atoms, second: Atoms, distance: float) -> Atoms:
    """Both molecules, their closest atoms along x `distance` Å from each other."""
    moved = second.copy()
    moved.positions[:, 0] += first.positions[:, 0].max() - second.positions[:, 0].min() + distance
    return first + moved


class ModelCalculator(Calculator):
    """Energy and forces of a model, for ASE's dynamics."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        outputs = self.model([atoms])[0]
        self.results = {"energy": float(outputs["energy"]), "forces": np.asarray(outputs["forces"])}
