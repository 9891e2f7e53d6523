"""A fine-tuned model as an ASE calculator: relaxation, dynamics, phonons, whatever ASE drives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from moiety.data.convert import from_object
from moiety.errors import InputError
from moiety.inference.predict import energy_adapter, load_predictor


class MoietyCalculator(Calculator):
    """Energy (eV), forces (eV/Å) and, for bulk, stress (eV/Å^3), as far as the model has heads for them.

    Forces are exact derivatives where there is a head of kind energy, and read off the nodes where there is one of kind
    vector called forces. What else the model predicts stands in `results` under the name of its task. Total charge and
    multiplicity come from `atoms.info["charge"]` and `atoms.info["spin"]`.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        """
        Args:
            model_dir: an exported model.
            adapter: the directory of an adapter on it; default: one with energies in the model's own folder `adapters`.
            dtype: of the network; float64 for phonons and long dynamics at small time steps.
            **options: of ASE's Calculator.

        Raises:
            InputError: no model, no adapter, or neither energy nor forces among the tasks.
        """
        super().__init__(**options)
        adapter = adapter or energy_adapter(model_dir)
        self.predictor = load_predictor(Path(model_dir), None if adapter is None else Path(adapter))
        tasks = self.predictor.tasks
        self.energy = next((name for name, task in tasks.items() if task["kind"] == "energy"), None)
        if self.energy is None and tasks.get("forces", {}).get("kind") != "vector":
            raise InputError(
                f"{adapter or model_dir}: predicts {', '.join(tasks) or 'nothing'}, neither an energy nor forces; "
                "fine-tune with a task of kind energy"
            )
        self.dtype = dtype
        self.predictor.model.to(dtype)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """All there is in one pass, into `results`.

        Raises:
            InputError: an element whose energy the model does not know; it is named.
        """
        super().calculate(atoms, properties, system_changes)
        structure = from_object(self.atoms)
        if missing := self.predictor.missing(structure):
            raise InputError(
                f"no reference energy of {', '.join(missing)}: the training labels of this model have none; fine-tune "
                "on labels that do"
            )
        inputs = self.predictor.processor([structure], dtype=self.dtype)
        output = self.predictor.model(**inputs).predictions
        found = {name: value.detach().double().numpy() for name, value in output.items()}
        if self.energy is not None:
            self.results["energy"] = self.results["free_energy"] = float(found.pop(self.energy)[0])
            stress = found.pop("stress")[0]
            if structure.pbc is not None and structure.pbc.all():
                self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
        if "forces" in found:
            self.results["forces"] = found.pop("forces")
        self.results |= found
        for name in properties:
            if name not in self.results:
                raise PropertyNotImplementedError(f"{name}: the model has no head for it, or the structure is not bulk")
