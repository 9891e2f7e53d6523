"""The trained model in Hub layout: weights, configuration, its own code, processor, model card, and a probe.

The probe is two small structures and what the trainer's model says about them. Whoever loads the export, anywhere, can
see whether it still says the same; the exporter itself is the first to look.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.models.processing_moiety import MoietyProcessor
from moiety.threads import one_thread
from moiety.training.card import model_card
from moiety.training.files import write_json, write_text
from moiety.training.mixture import Mixture
from moiety.training.multitask import base_weights
from moiety.training.probe import PROBE, probe_structures
from moiety.training.run import Run

AUTO_MAP = {
    "AutoConfig": "configuration_moiety.MoietyConfig",
    "AutoModel": "modeling_moiety.MoietyModel",
    "AutoModelForPreTraining": "modeling_moiety.MoietyForPreTraining",
    "AutoFeatureExtractor": "feature_extraction_moiety.MoietyFeatureExtractor",
    "AutoProcessor": "processing_moiety.MoietyProcessor",
}


def export(run: Run, mixture: Mixture) -> Path:
    """Writes the run's model (averaged weights where there are any) to its `export` directory; every process calls it.

    Raises:
        RuntimeError: what was written does not load to the same numbers.
    """
    assert run.engine is not None, "fit comes first"
    weights = run.weights()
    folder = run.path / "export"
    if weights is not None:
        aside = run.path / "export.partial"
        shutil.rmtree(aside, ignore_errors=True)
        weights, config = base_weights(weights), copy.deepcopy(run.engine.module.config)
        write_export(weights, config, aside)
        write_text(aside / "README.md", model_card(run, mixture, sum(w.numel() for w in weights.values())))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    distributed.barrier()
    return folder


def write_export(weights: dict[str, Tensor], config: MoietyConfig, folder: Path) -> None:
    """A pretraining model's state dict as a directory that plain `from_pretrained` loads; checked by loading it."""
    model = MoietyForPreTraining(config)
    model.load_state_dict(weights)
    save_model(model, folder)
    outputs = probe_outputs(model.moiety, MoietyFeatureExtractor(cutoff=config.cutoff))
    write_json(folder / "probe.json", {"structures": PROBE, "outputs": "probe.safetensors", "threads": 1})
    save_file(outputs, folder / "probe.safetensors")
    check_export(folder)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Any Moiety model in Hub layout: weights, configuration, the files of its code, processor."""
    model.config.auto_map = AUTO_MAP
    model.save_pretrained(folder)
    MoietyProcessor(MoietyFeatureExtractor(cutoff=model.config.cutoff)).save_pretrained(folder)


def check_export(folder: Path) -> None:
    """Loads an export through the Auto classes and compares the probe's outputs bit by bit.

    Raises:
        RuntimeError: they differ.
    """
    from transformers import AutoModel, AutoProcessor

    outputs = probe_outputs(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
    for name, expected in load_file(folder / "probe.safetensors").items():
        if not torch.equal(outputs[name], expected):
            error = float((outputs[name] - expected).abs().max())
            raise RuntimeError(f"{folder}: the reloaded model's {name} differ from the trainer's by up to {error:.2e}")


@torch.no_grad()
def probe_outputs(model: Any, processor: Any) -> dict[str, Tensor]:
    """node_features [N,M,C] and graph_features [B,C] of the probe structures, on one CPU thread."""
    with one_thread():
        output = model.to("cpu").eval()(**processor(probe_structures()))
    return {"node_features": output.node_features.contiguous(), "graph_features": output.graph_features.contiguous()}
