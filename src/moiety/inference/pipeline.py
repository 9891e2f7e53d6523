"""`transformers.pipeline("structure-property", model=DIR)`: structures in, properties with units out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Pipeline

from moiety.data.convert import from_object
from moiety.data.structure import Structure
from moiety.inference.predict import load_predictor
from moiety.models.modeling_moiety import MoietyForPrediction


class StructurePropertyPipeline(Pipeline):
    """Takes what `MoietyProcessor` takes, one or a list; gives {task: {"value", "unit"}} for each.

    `pipeline("structure-property", model=DIR, adapter=DIR)` puts an adapter on a base that has no heads of its own.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: MoietyForPrediction, adapter: str | Path | None = None, **options: Any) -> None:
        self.predictor = load_predictor(Path(str(model.name_or_path)), None if adapter is None else Path(adapter))
        super().__init__(model=self.predictor.model, **options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if options:
            raise TypeError(f"structure-property takes no option {', '.join(options)}")
        return {}, {}, {}

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        return {"structure": _structure(input_)}

    def _forward(self, input_tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
        return self.predictor.all_answers([input_tensors["structure"]])[0]

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        return model_outputs


def _structure(thing: Any) -> Structure:
    if isinstance(thing, str | Path):
        from moiety.data.readers import read_one

        return read_one(thing)
    return from_object(thing)
