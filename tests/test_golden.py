"""Golden losses: a refactoring that changes what is computed changes these. Rewrite them on purpose only:

python tests/test_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moiety.data.shards import Corpus
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.tokens.batch import collate, with_neighbors

HERE = Path(__file__).parent
GOLDEN = HERE / "golden/pretraining_losses.json"
STEPS = 4


def losses(lmax: int) -> list[dict[str, float]]:
    """Losses by objective of a few AdamW steps on a mixed batch, in float64 so that machines agree."""
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=32, num_layers=2, num_heads=2, edge_channels=16, lmax=lmax, num_radial=8)
    model = MoietyForPreTraining(config).double()
    objectives = build_objectives({"types": {}, "cell": {}, "coordinates": {}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    corpora = [Corpus.open(HERE / f"data/corpora/{name}", split="train") for name in ("qm9", "crystals", "proteins")]
    structures = [s for corpus in corpora for s in corpus.read(range(3))]
    rng = torch.Generator().manual_seed(0)
    history = []
    for _ in range(STEPS):
        batch = collate(structures, torch.float64)
        for objective in objectives:
            batch = objective.corrupt(batch, rng)
        output = model(**with_neighbors(batch, config.cutoff).inputs())
        terms = {o.name: o.loss_sum(output, batch).sum() / o.scored(batch).sum() for o in objectives}
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    return history


@pytest.mark.parametrize("lmax", [1, 2])
def test_losses_are_the_golden_ones(lmax: int) -> None:
    expected = json.loads(GOLDEN.read_text())[f"lmax{lmax}"]
    for found, golden in zip(losses(lmax), expected, strict=True):
        assert found == pytest.approx(golden, rel=1e-7)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({f"lmax{lmax}": losses(lmax) for lmax in (1, 2)}, indent=1) + "\n")
