"""What several test files need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.training.export import save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that was never trained, exported."""
    folder = tmp_path_factory.mktemp("base") / "export"
    torch.manual_seed(0)
    save_model(MoietyForPreTraining(MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, edge_channels=8)), folder)
    return folder
