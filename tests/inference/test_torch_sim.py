"""The model behind torch-sim says what it says behind ASE, for many structures at once. Needs the extra `torch-sim`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from moiety.errors import InputError
from moiety.inference import MoietyCalculator
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction
from moiety.training.export import save_model

torch_sim = pytest.importorskip("torch_sim")
ENERGY = {"energy": {"kind": "energy", "std": 0.3, "unit": "eV"}}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8, tasks=ENERGY)
    save_model(MoietyForPrediction(config), folder)
    return folder


def test_torch_sim_takes_the_model_for_one_of_its_own(export: Path):
    from torch_sim.models.interface import validate_model_outputs  # pyright: ignore[reportMissingImports]

    from moiety.inference.torch_sim import TorchSimModel

    validate_model_outputs(TorchSimModel(export, dtype=torch.float64), torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("open_", [True, False])
def test_a_batch_has_the_energies_forces_and_stresses_of_ase(export: Path, open_: bool):
    from moiety.inference.torch_sim import TorchSimModel

    several = (
        [molecule("CH3CH2OH"), molecule("H2O")] if open_ else [bulk("Si", cubic=True), bulk("NaCl", "rocksalt", 5.6)]
    )
    for number, atoms in enumerate(several):
        atoms.rattle(0.05, seed=number)
    state = torch_sim.io.atoms_to_state(several, torch.device("cpu"), torch.float64)
    found = TorchSimModel(export, dtype=torch.float64)(state)
    for number, atoms in enumerate(several):
        atoms.calc = MoietyCalculator(export, dtype=torch.float64)
        assert found["energy"][number].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        assert np.allclose(found["forces"][state.system_idx == number], atoms.get_forces(), atol=1e-8)
        if not open_:
            assert np.allclose(found["stress"][number], atoms.get_stress(voigt=False), atol=1e-8)


def test_a_model_without_energy_is_refused(tmp_path: Path):
    from moiety.inference.torch_sim import TorchSimModel

    config = MoietyConfig(hidden_size=16, num_layers=1, num_heads=2, edge_channels=8, tasks={"gap": {"kind": "mean"}})
    save_model(MoietyForPrediction(config), tmp_path / "gap")
    with pytest.raises(InputError, match="no energy"):
        TorchSimModel(tmp_path / "gap")
