"""The model card: what the model is, what it saw and under which licences, how to load it, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moiety.adapters.tasks import TaskConfig
from moiety.training.mixture import Mixture
from moiety.training.run import Run

TEMPLATE = """---
library_name: transformers
tags: [chemistry, materials, biology, equivariant, atomistic]
---
# Moiety, {parameters:,} parameters

One equivariant transformer for molecules, crystals and proteins, pretrained by denoising: it was shown structures with
displaced atoms, strained cells and hidden elements or residues, and learned to put them right.
{labels}Its node features are steerable: they turn with the structure.

```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
output = model(**processor([atoms]))  # ase.Atoms, rdkit.Mol, pymatgen, biotite, torch_geometric
output.node_features  # [N, {components}, {channels}]: l = 0, 1{two}, channels last
output.graph_features  # [B, {channels}]
```

## Data

| corpus | domain | structures | nodes | licence |
|---|---|---|---|---|
{data}

{citations}

## Training

{steps} optimizer steps, seed {seed}, {precision}. Losses at the end, per domain; 1.0 is the error of predicting no
displacement and no strain, types are cross-entropy in nats, labels of structures or nodes are Huber losses in spreads:

| domain | {objectives} |
|---|{rules}
{losses}

## Limits

Learned from near-equilibrium structures made of the elements and residues of the corpora above; elsewhere its features
are extrapolation. It predicts no property by itself: that takes an adapter{heads}.

`probe.json` and `probe.safetensors` hold two small structures and this model's features for them, to verify a copy
(one CPU thread, float32).
"""


def model_card(run: Run, mixture: Mixture, parameters: int) -> str:
    """The README.md of an export."""
    config = run.config
    losses = last_losses(run)
    objectives = list(dict.fromkeys(name for values in losses.values() for name in values))
    lmax = run.engine.module.config.lmax
    learned = "; ".join(_learned(source.corpus, config.tasks) for source in mixture.supervised)
    citations = dict.fromkeys(s.corpus.manifest.get("citation", "") for s in mixture.sources)
    return TEMPLATE.format(
        parameters=parameters,
        heads=", which can start from the heads of the labels above" if learned else "",
        labels=f"Beside that it learned labels of {learned}.\n" if learned else "",
        components=(lmax + 1) ** 2,
        channels=run.engine.module.config.hidden_size,
        two=", 2" if lmax == 2 else "",
        data="\n".join(_data_row(source.name, source.corpus) for source in mixture.sources),
        citations="\n".join(f"- {citation}" for citation in citations if citation),
        steps=config.training.steps,
        seed=config.training.seed,
        precision=config.training.precision,
        objectives=" | ".join(objectives),
        rules="---|" * len(objectives),
        losses="\n".join(
            f"| {domain} | " + " | ".join(f"{values[name]:.3f}" if name in values else "" for name in objectives) + " |"
            for domain, values in losses.items()
        ),
    )


def last_losses(run: Run) -> dict[str, dict[str, float]]:
    """domain -> objective -> mean loss over the log's last tenth, where a domain may be missing from single records."""
    records = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    gathered: dict[str, dict[str, list[float]]] = {}
    for record in records[-max(1, len(records) // 10) :]:
        for domain, values in record["losses"].items():
            for name, value in values.items():
                gathered.setdefault(domain, {}).setdefault(name, []).append(value)
    return {d: {name: sum(v) / len(v) for name, v in values.items()} for d, values in gathered.items()}


def _learned(corpus: Any, tasks: Sequence[TaskConfig]) -> str:
    """Level of theory, and the labels of it that are tasks."""
    labels = [task.label for task in tasks if task.label in corpus.manifest.get("units", {})]
    return f"{corpus.manifest.get('theory', corpus.manifest['name'])}: {', '.join(labels)}"


def _data_row(name: str, corpus: Any) -> str:
    licence = corpus.manifest.get("licence") or "not stated"
    return f"| {name} | {corpus.domain} | {len(corpus):,} | {int(corpus.num_nodes.sum()):,} | {licence} |"
