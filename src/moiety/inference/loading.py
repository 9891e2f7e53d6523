"""From directories and files on disk to models and batches of valid structures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moiety.data.readers import structure_files
from moiety.data.validate import Verdict, verdicts
from moiety.errors import InputError


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """The config.json of an exported Moiety model.

    Raises:
        InputError: the directory is not one.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{model_dir}: no model here (config.json is missing); give the `export` directory of a run, "
            "for example runs/quickstart/export"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); export the model again") from error
    if config.get("model_type") != "moiety":
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}, expected 'moiety'; give another --model")
    if not any(Path(model_dir).glob("model*.safetensors")):
        raise InputError(f"{model_dir}: no model.safetensors beside config.json; export the model again")
    return config


def batches(paths: Iterable[Path], batch_nodes: int, all_atom: bool = False) -> Iterator[list[Verdict]]:
    """Verdicts in the order of the files, cut so that the valid structures of a list fill at most one batch.

    A structure larger than `batch_nodes` gets a list of its own; broken structures cost nothing and stay in order.
    """
    pending: list[Verdict] = []
    num_nodes = 0
    for path in structure_files(paths):
        for verdict in verdicts(path, all_atom=all_atom):
            size = verdict.structure.num_nodes if verdict.structure is not None else 0
            if num_nodes and num_nodes + size > batch_nodes:
                yield pending
                pending, num_nodes = [], 0
            pending.append(verdict)
            num_nodes += size
    if pending:
        yield pending
