"""A trained bridge in Hub layout, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from moiety.adapters.adapter import quietly
from moiety.errors import InputError
from moiety.models.modeling_bridge_moiety import MoietyForConditionalGeneration
from moiety.models.processing_bridge_moiety import MoietyBridgeProcessor


def save_bridge(model: nn.Module, processor: MoietyBridgeProcessor, folder: Path) -> None:
    """The bridge with its LoRA merged: weights, configuration, the files of its code, processor.

    The adapter itself, a plain peft directory, stands beside it where there is one.
    """
    whole: Any = model
    if isinstance(model, PeftModel):
        with quietly():
            model.save_pretrained(str(folder / "adapter"))
            whole = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    whole.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_bridge(folder: str | Path) -> tuple[MoietyForConditionalGeneration, MoietyBridgeProcessor]:
    """What `save_bridge` wrote.

    Raises:
        InputError: there is none.
    """
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder}: no bridge here; train one: finetune/bridge.py")
    with quietly():
        model = MoietyForConditionalGeneration.from_pretrained(folder)
        processor = MoietyBridgeProcessor.from_pretrained(folder)
    return model, processor
