"""The model behind ASE and behind a transformers pipeline: exact forces, stress, conserved energy, named errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from transformers import pipeline

from moiety.adapters.adapter import AdapterSettings, add_adapter, load_base, save_adapter
from moiety.errors import InputError
from moiety.inference import MoietyCalculator
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.training.export import save_model

ENERGY = {
    "energy": {"kind": "energy", "std": 0.3, "unit": "eV", "references": {"H": -13.6, "C": -1030.0, "O": -2041.0}}
}
SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "edge_channels": 8}


def exported(folder: Path, tasks: dict[str, Any] | None) -> Path:
    torch.manual_seed(0)
    config = MoietyConfig(**SMALL, tasks=tasks)
    save_model(MoietyForPrediction(config) if tasks else MoietyForPreTraining(config), folder)
    return folder


@pytest.fixture(scope="module")
def force_field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("force_field"), ENERGY)


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def test_forces_and_stress_are_slopes_of_the_energy(force_field: Path):
    atoms = ethanol()
    atoms.calc = MoietyCalculator(force_field, dtype=torch.float64)
    assert np.allclose(atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), atol=1e-6)
    crystal = bulk("C", cubic=True)
    crystal.rattle(0.05, seed=2)
    crystal.calc = atoms.calc
    assert np.allclose(crystal.get_stress(), calculate_numerical_stress(crystal, 1e-5), atol=1e-6)
    assert crystal.get_potential_energy() == pytest.approx(8 * -1030, rel=0.01)


def test_dynamics_conserve_the_energy(force_field: Path):
    """A random network is a rugged landscape: what drifts here is the derivative, not the chemistry."""
    atoms = ethanol()
    atoms.calc = MoietyCalculator(force_field, dtype=torch.float64)
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    totals, kinetic = [], []
    dynamics = VelocityVerlet(atoms, 0.1 * units.fs)
    dynamics.attach(lambda: totals.append(atoms.get_total_energy()))
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy()))
    dynamics.run(100)
    assert np.ptp(kinetic) > 1e-2 and np.ptp(totals) < 0.01 * np.ptp(kinetic)


def test_relaxation_goes_downhill(force_field: Path):
    atoms = ethanol()
    atoms.calc = MoietyCalculator(force_field, dtype=torch.float64)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=20)
    assert atoms.get_potential_energy() < before


def test_what_the_model_cannot_say_is_an_error(force_field: Path, tmp_path: Path):
    xenon, water = Atoms("Xe", calculator=MoietyCalculator(force_field)), molecule("H2O")
    with pytest.raises(InputError, match="no reference energy of Xe"):
        xenon.get_potential_energy()
    water.calc = xenon.calc
    with pytest.raises(PropertyNotImplementedError, match="not bulk"):
        water.get_stress()
    with pytest.raises(InputError, match="neither an energy nor forces"):
        MoietyCalculator(exported(tmp_path / "gap", {"gap": {"kind": "mean"}}))
    direct = MoietyCalculator(exported(tmp_path / "direct", {"forces": {"kind": "vector"}}))
    water.calc = direct
    assert water.get_forces().shape == (3, 3)
    with pytest.raises(PropertyNotImplementedError):
        water.get_potential_energy()


def test_a_pipeline_says_what_the_calculator_says(force_field: Path, tmp_path: Path):
    pipe = pipeline("structure-property", model=str(force_field))
    atoms = ethanol()
    one, two = pipe([atoms, molecule("H2O")])
    atoms.calc = MoietyCalculator(force_field)
    assert one["energy"]["value"] == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
    assert two["stress"]["value"] is None and np.shape(one["forces"]["value"]) == (9, 3)

    base = exported(tmp_path / "base", None)
    gap = {"gap": {"kind": "mean", "unit": "eV"}}
    save_adapter(add_adapter(load_base(base, gap), AdapterSettings()), tmp_path / "adapter", base, gap)
    adapted = pipeline("structure-property", model=str(base), adapter=str(tmp_path / "adapter"))
    assert adapted(atoms)["gap"]["unit"] == "eV"
