"""Writes down beside a finished run what its report needs and its log does not hold."""
# Shapes: n structures, N nodes.

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.inference.examples import denoising_examples
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import Objective, build_objectives

EXAMPLES = "denoising_examples.json"
EXAMPLE_NODES = {"molecule": (14, 36), "protein": (60, 140)}  # how large a structure is easy to look at
MAX_CANDIDATES = 200  # structures of a corpus among which an example is looked for
DEFAULT_EXAMPLE_NODES = (4, 40)


def needs_description(run_dir: Path) -> bool:
    """Whether a pretraining run has an export that was not described yet."""
    weights = Path(run_dir) / "export" / "model.safetensors"
    examples = Path(run_dir) / EXAMPLES
    if not weights.exists() or "objectives" not in _config(run_dir):
        return False
    return not examples.exists() or examples.stat().st_mtime < weights.stat().st_mtime


def describe_run(run_dir: Path, sigma: float = 0.1, seed: int = 0, num_nodes: int = 100_000) -> None:
    """Writes trivial.json and denoising_examples.json (see `moiety.inference.run_files`).

    The exported model denoises one structure of each domain, from the validation split where there is one; the corpora
    are those of the run's config.json.

    Args:
        run_dir: directory of a pretraining run that has been exported.
        sigma: noise of the examples, Å.
        seed: of all random choices.
        num_nodes: how many nodes, drawn in the proportions of the mixture, tell what a trivial predictor scores.

    Raises:
        InputError: a corpus of the run is not there any more.
    """
    run_dir = Path(run_dir)
    config = _config(run_dir)
    model = MoietyForPreTraining.from_pretrained(run_dir / "export")
    sources = config["data"]["sources"]
    corpora = [Corpus.open(source["path"], config["data"]["split"]) for source in sources]
    objectives = build_objectives(config["objectives"])
    rng = np.random.default_rng(seed)
    seen: dict[str, list[Structure]] = {}
    held_out: dict[str, list[Structure]] = {}
    for corpus, source in zip(corpora, sources, strict=True):
        order = rng.permutation(len(corpus))
        wanted = num_nodes * source["weight"] / sum(source["weight"] for source in sources)
        chosen = order[: 1 + np.searchsorted(np.cumsum(corpus.num_nodes[order]), wanted)]
        seen.setdefault(corpus.domain, []).extend(corpus.read(chosen))
        if "val" in corpus.manifest["splits"]:
            unseen = Corpus.open(corpus.path, "val")
            held_out.setdefault(corpus.domain, []).extend(unseen.read(rng.permutation(len(unseen))[:MAX_CANDIDATES]))
    shown = [_easy_to_see(domain, held_out.get(domain, structures)) for domain, structures in seen.items()]
    _write(run_dir / "trivial.json", {domain: trivial_losses(found, objectives) for domain, found in seen.items()})
    _write(run_dir / EXAMPLES, denoising_examples(model, shown, sigma, seed))  # last: says that all is complete


def _config(run_dir: Path) -> dict[str, Any]:
    path = Path(run_dir) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def trivial_losses(structures: Sequence[Structure], objectives: Sequence[Objective]) -> dict[str, float]:
    """Objective -> what the best answer that ignores the geometry scores on structures like these."""
    node_type = torch.from_numpy(np.concatenate([structure.node_type for structure in structures]))
    return {objective.name: objective.trivial_loss(node_type) for objective in objectives}


def _easy_to_see(domain: str, structures: list[Structure]) -> Structure:
    """Of the structures whose size suits a picture the one with the most node types; the smallest if none suits."""
    low, high = EXAMPLE_NODES.get(domain, DEFAULT_EXAMPLE_NODES)
    suited = [structure for structure in structures if low <= structure.num_nodes <= high]
    if not suited:
        return min(structures, key=lambda structure: structure.num_nodes)
    return max(suited, key=lambda structure: len(np.unique(structure.node_type)))
