"""Predictions for files: every structure gets its line, in order; a broken one gets a line that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moiety.adapters.references import unknown_elements
from moiety.data.structure import Structure
from moiety.data.validate import Verdict
from moiety.errors import InputError
from moiety.inference.loading import batches, read_model_config
from moiety.models.heads_moiety import TaskHead
from moiety.models.modeling_moiety import MoietyForPrediction
from moiety.models.vocabulary_moiety import AMINO_ACIDS

ADAPTERS = "adapters"  # folder of a model with what is adapted to it
PER_NODE = {kind for kind, (per_node, _) in TaskHead.KINDS.items() if per_node}
DERIVED = {  # what a head of kind "energy" brings along
    "forces": {"kind": "vector", "unit": "eV/Å"},
    "stress": {"kind": "stress", "unit": "eV/Å^3"},
}
NO_DIPOLE = {"value": None, "unit": "", "note": "a periodic structure has no dipole moment of its own"}
NO_STRESS = {"value": None, "unit": "", "note": "only a structure that is periodic in all directions has a stress"}


@dataclass(frozen=True)
class Predictor:
    """A model with task heads, ready to be called on structures."""

    model: Any  # MoietyForPrediction, possibly wrapped by peft
    processor: Any  # MoietyProcessor
    tasks: dict[str, Any]  # name -> {"kind", "unit", ...}, as in MoietyConfig.tasks
    adapters: dict[str, list[str]] = field(default_factory=dict)  # name -> its tasks, where there are several

    def missing(self, structure: Structure, tasks: Iterable[str] | None = None) -> list[str]:
        """Elements of a structure whose energy is not known, so that it can have no total energy.

        With several adapters on the trunk, ask for the tasks of one.
        """
        asked = self.tasks if tasks is None else tasks
        known = [self.tasks[name]["references"] for name in asked if self.tasks[name].get("references")]
        return unknown_elements(structure, known[0]) if known else []

    def _switch(self, adapter: str | None) -> set[str]:
        """Makes an adapter answer; the names of what it predicts."""
        if not self.adapters:
            return set(self.tasks | DERIVED)
        if adapter not in self.adapters:
            raise InputError(f"adapter is {adapter!r}; the trunk has {', '.join(self.adapters)}: name one of them")
        self.model.set_adapter(adapter)
        return self._with_derived(self.adapters[adapter])

    def _with_derived(self, tasks: Iterable[str]) -> set[str]:
        return {*tasks, *(DERIVED if any(self.tasks[name]["kind"] == "energy" for name in tasks) else {})}

    def __call__(self, structures: list[Structure], adapter: str | None = None) -> list[dict[str, Any]]:
        """Predictions of one batch: for each structure {task: {"value": number or nested list, "unit": str}}.

        With several adapters on the trunk, `adapter` names the one that answers.
        Classes are told by name, with the "probability" that the model gives them.
        What a structure does not have (the dipole moment of a crystal, the stress of a molecule) is None, with a note.
        """
        asked = self._switch(adapter)
        with torch.no_grad():
            output = self.model(**self.processor(structures))
        sizes = [structure.num_nodes for structure in structures]
        tasks = self.tasks | DERIVED
        parts = {
            name: value.split(sizes) if tasks[name]["kind"] in PER_NODE else value
            for name, value in output.predictions.items()
            if name in asked
        }
        return [
            {name: _told(structure, tasks[name], values[b]) for name, values in parts.items()}
            for b, structure in enumerate(structures)
        ]

    def all_answers(self, structures: list[Structure]) -> list[dict[str, Any]]:
        """Predictions of every adapter together; a total energy that cannot be told is None, with a note."""
        if not self.adapters:
            return self(structures)
        together: list[dict[str, Any]] = [{} for _ in structures]
        for adapter, tasks in self.adapters.items():
            missing = [self.missing(structure, tasks) for structure in structures]
            able = [structure for structure, elements in zip(structures, missing, strict=True) if not elements]
            answers = iter(self(able, adapter) if able else [])
            for answer, elements in zip(together, missing, strict=True):
                unknown = {"value": None, "unit": "", "note": f"no reference energy of {', '.join(elements)}"}
                answer |= dict.fromkeys(self._with_derived(tasks), unknown) if elements else next(answers)
        return together


def _told(structure: Structure, task: dict[str, Any], value: torch.Tensor) -> dict[str, Any]:
    if task["kind"] == "dipole_norm" and structure.periodic:
        return NO_DIPOLE
    if task["kind"] == "stress" and (structure.pbc is None or not structure.pbc.all()):
        return NO_STRESS
    if task["kind"] in ("classes", "residues"):
        probability_N, best_N = value.softmax(-1).max(-1)
        classes = task.get("classes", AMINO_ACIDS)
        names = [classes[index] for index in best_N.tolist()]
        return {"value": names, "unit": "", "probability": probability_N.tolist()}
    return {"value": value.tolist(), "unit": task.get("unit", "")}


def load_predictor(model_dir: Path, adapter: Path | Mapping[str, Path] | None = None) -> Predictor:
    """Loads an exported model with task heads, or any export with an adapter that brings them, or several by name.

    Without either, the adapters in the model's own folder `adapters` answer.

    Raises:
        InputError: a directory is not what it should be, or nothing here predicts a property.
    """
    config = read_model_config(model_dir)
    has_heads = "MoietyForPrediction" in (config.get("architectures") or [])
    if adapter is None and not has_heads and (model_dir / ADAPTERS).is_dir():
        adapter = {path.name: path for path in sorted((model_dir / ADAPTERS).iterdir())}
    adapters: dict[str, list[str]] = {}
    if adapter is not None:
        from moiety.adapters.adapter import adapter_facts, load_adapted

        model, processor = load_adapted(model_dir, adapter)
        if isinstance(adapter, Mapping):
            adapters = {name: list(adapter_facts(directory)["tasks"]) for name, directory in adapter.items()}
    else:
        if not has_heads:
            kind = ", ".join(config.get("architectures") or ["bare trunk"])
            raise InputError(
                f"{model_dir}: this model has no task head (it is a {kind}); "
                "fine-tune it with finetune/lora.py and pass --adapter DIR, or use `moiety embed`"
            )
        from moiety.models.processing_moiety import MoietyProcessor

        model = MoietyForPrediction.from_pretrained(model_dir)
        processor = MoietyProcessor.from_pretrained(model_dir)
    return Predictor(model.eval(), processor, model.config.tasks or {}, adapters)


def energy_adapter(model_dir: str | Path) -> Path | None:
    """The first of the adapters in a model's own folder that tells energies."""
    from moiety.adapters.adapter import adapter_facts

    for path in sorted((Path(model_dir) / ADAPTERS).glob("*")):
        if any(task["kind"] == "energy" for task in adapter_facts(path)["tasks"].values()):
            return path
    return None


def predict_files(
    predictor: Predictor, paths: Iterable[Path], batch_nodes: int = 2048, all_atom: bool = False
) -> Iterator[dict[str, Any]]:
    """One JSON-ready dictionary per structure of the files and folders, in order.

    Yields:
        {file, index, id, ok: True, predictions: {task: {value, unit}}} or
        {file, index, id, ok: False, error: {code, reason, remedy}}.
    """
    for read in batches(paths, batch_nodes, all_atom):
        chunk = [_refused(predictor, verdict) for verdict in read]
        structures = [verdict.structure for verdict in chunk if verdict.structure is not None]
        predicted = iter(predictor.all_answers(structures) if structures else [])
        for verdict in chunk:
            yield _line(verdict, None if verdict.structure is None else next(predicted))


def _refused(predictor: Predictor, verdict: Verdict) -> Verdict:
    """The verdict, or why the model cannot answer for its structure."""
    if predictor.adapters or verdict.structure is None or not (missing := predictor.missing(verdict.structure)):
        return verdict
    return dataclasses.replace(
        verdict,
        ok=False,
        code="no_reference_energy",
        reason=f"no reference energy of {', '.join(missing)}: the training labels of this model have none",
        remedy="fine-tune on labels that have these elements, or leave the structure out",
        structure=None,
    )


def _line(verdict: Verdict, predictions: dict[str, Any] | None) -> dict[str, Any]:
    name = verdict.structure.id if verdict.structure is not None else ""
    line = {
        "file": str(verdict.file),
        "index": verdict.index,
        "id": name or f"{Path(verdict.file).stem}-{verdict.index}",
        "ok": predictions is not None,
    }
    if predictions is not None:
        return {**line, "predictions": predictions}
    return {**line, "error": {"code": verdict.code, "reason": verdict.reason, "remedy": verdict.remedy}}
