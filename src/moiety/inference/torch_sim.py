"""A fine-tuned model for torch-sim: many structures at once, relaxed or in motion (extra `torch-sim`)."""
# Shapes: B systems, N atoms.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_sim.models.interface import ModelInterface  # pyright: ignore[reportMissingImports]
from torch_sim.state import SimState  # pyright: ignore[reportMissingImports]

from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.inference.predict import energy_adapter, load_predictor
from moiety.models.feature_extraction_moiety import neighbor_list
from moiety.models.vocabulary_moiety import DOMAIN_ID


class TorchSimModel(ModelInterface):
    """Energies (eV), forces (eV/Å) and stresses (eV/Å^3) of a torch-sim state, by a head of kind energy.

    Systems are uncharged singlets; periodic ones are crystals to the model, open ones molecules, whose stress is zero.
    """

    def __init__(
        self,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model_dir: an exported model.
            adapter: the directory of an adapter on it; default: one with energies in the model's own folder `adapters`.
            device: where the network runs; neighbours are found on the CPU.
            dtype: of the network, and of the states.

        Raises:
            InputError: no model, no adapter, or no energy among the tasks.
        """
        super().__init__()
        adapter = adapter or energy_adapter(model_dir)
        predictor = load_predictor(Path(model_dir), None if adapter is None else Path(adapter))
        energies = [name for name, task in predictor.tasks.items() if task["kind"] == "energy"]
        if not energies:
            raise InputError(
                f"{adapter or model_dir}: predicts {', '.join(predictor.tasks)}, no energy; fine-tune to one"
            )
        self.energy = energies[0]
        self.predictor = predictor
        self._device, self._dtype = torch.device(device), dtype
        self._compute_stress = self._compute_forces = True
        self.model = predictor.model.to(device=self._device, dtype=dtype)

    def forward(self, state: SimState | dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """energy [B], forces [N, 3], stress [B, 3, 3].

        Raises:
            InputError: an element whose energy the model does not know; it is named.
        """
        system: Any = SimState(**state) if isinstance(state, dict) else state
        numbers, cell = system.atomic_numbers, system.row_vector_cell
        structure = Structure(numbers.cpu().numpy(), system.positions.detach().cpu().numpy(), id="state")
        if missing := self.predictor.missing(structure):
            raise InputError(
                f"no reference energy of {', '.join(missing)}; fine-tune on labels that have these elements"
            )
        pbc = torch.full((system.n_systems, 3), bool(system.pbc))
        edge_index, edge_shift = neighbor_list(
            structure.positions,
            structure.node_type,
            system.system_idx.cpu().numpy(),
            cell.detach().double().cpu().numpy() if system.pbc else np.zeros((system.n_systems, 3, 3)),
            pbc.numpy(),
            self.model.config.cutoff,
        )
        domain = DOMAIN_ID["crystal" if system.pbc else "molecule"]
        output = self.model(
            node_type=numbers.long(),
            positions=system.positions,
            graph_index=system.system_idx,
            edge_index=torch.from_numpy(edge_index).to(self._device),
            edge_shift=torch.from_numpy(edge_shift).to(self._device, self._dtype),
            cell=cell,
            pbc=pbc.to(self._device),
            domain=torch.full((system.n_systems,), domain, device=self._device),
        ).predictions
        return {
            "energy": output[self.energy].to(self._dtype),
            "forces": output["forces"],
            "stress": output["stress"].nan_to_num(),
        }
