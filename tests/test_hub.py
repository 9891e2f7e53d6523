"""An export works where moiety is not installed, and says there what the trainer said, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.training.export import write_export

ABSENT = """
import sys
sys.modules.update(dict.fromkeys("moiety deepspeed torch_geometric peft rdkit pymatgen biotite".split()))
"""
CHECK = """
import json, sys
import ase, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

folder = sys.argv[1]
torch.set_num_threads(1)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
structures = json.load(open(f"{folder}/probe.json"))["structures"]
atoms = [
    ase.Atoms(numbers=s["node_type"], positions=s["positions"], cell=s["cell"], pbc=s["pbc"] or False)
    for s in structures
]
with torch.no_grad():
    output = model(**processor(atoms))
for name, expected in load_file(f"{folder}/probe.safetensors").items():
    assert torch.equal(output[name], expected), name
print("same to the last bit")
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "export"
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=32, num_layers=2, num_heads=2, edge_channels=16)
    write_export(MoietyForPreTraining(config).state_dict(), config, folder)
    return folder


def test_the_export_needs_no_moiety(export: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ABSENT + CHECK, str(export)]
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "same to the last bit" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_export_works_in_a_fresh_environment(export: Path, tmp_path: Path) -> None:
    """Only torch, transformers and what the processor needs are installed there."""
    constraints = Path(__file__).parents[1] / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [str(tmp_path / "venv/bin/pip"), "install", "-q", "-c", str(constraints)]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "transformers", "vesin", "ase", "numpy", "safetensors"], check=True)
    command = [str(tmp_path / "venv/bin/python"), "-c", CHECK, str(export)]
    done = subprocess.run(command, cwd=tmp_path, env={"HF_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert "same to the last bit" in done.stdout, done.stderr
