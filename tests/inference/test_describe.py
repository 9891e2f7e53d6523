"""A finished pretraining run is described from its own config, corpora and export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk, molecule

from moiety import Structure, cli
from moiety.data.shards import write_corpus
from moiety.inference.describe import describe_run, needs_description
from moiety.inference.run_files import RunFiles
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining


def finished_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    rng = np.random.default_rng(0)
    ethanol, salt = molecule("CH3CH2OH"), bulk("NaCl", "rocksalt", a=5.64, cubic=True)

    def group(index: int) -> dict[str, str]:
        return {"split": "val" if index % 5 == 0 else "train"}

    def jiggled(positions: np.ndarray) -> np.ndarray:
        return positions + 0.01 * rng.normal(size=positions.shape)

    molecules = [
        Structure(ethanol.numbers, jiggled(ethanol.positions), id=f"m{index}", groups=group(index))
        for index in range(20)
    ]
    crystals = [
        Structure(
            salt.numbers,
            jiggled(salt.positions),
            domain="crystal",
            id=f"c{index}",
            cell=np.array(salt.cell),
            pbc=np.ones(3, dtype=bool),
            groups=group(index),
        )
        for index in range(10)
    ]
    sources = []
    for name, structures in (("molecules", molecules), ("crystals", crystals)):
        write_corpus(structures, tmp_path / name, licence="CC0-1.0")
        sources.append({"path": str(tmp_path / name), "weight": 1.0})
    config = {
        "data": {"sources": sources, "split": "train"},
        "objectives": {"types": {}, "cell": {}, "coordinates": {}},
    }
    (run / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shape = MoietyConfig(hidden_size=16, num_layers=1, num_heads=2, lmax=1, edge_channels=8, num_radial=6)
    MoietyForPreTraining(shape).save_pretrained(run / "export")
    return run


def test_a_finished_run_is_described_once_per_export(tmp_path: Path):
    run = finished_run(tmp_path)
    assert needs_description(run)
    describe_run(run)
    assert not needs_description(run)
    later = (run / "denoising_examples.json").stat().st_mtime + 10
    os.utime(run / "export" / "model.safetensors", (later, later))
    assert needs_description(run)


def test_examples_are_held_out_structures_and_trivial_losses_those_of_the_corpus(tmp_path: Path):
    run = finished_run(tmp_path)
    describe_run(run)
    files = RunFiles.open(run)
    assert [example["domain"] for example in files.examples] == ["molecule", "crystal"]
    assert all(int(example["id"][1:]) % 5 == 0 for example in files.examples), "validation structures"
    assert np.isclose(files.trivial["crystal"]["types"], np.log(2)), "sodium or chlorine"


def test_reporting_a_run_without_export_or_config_describes_nothing(tmp_path: Path):
    assert not needs_description(tmp_path)


def test_a_missing_corpus_of_the_run_is_an_input_error_with_the_remedy(tmp_path: Path, capsys):
    run = finished_run(tmp_path)
    (tmp_path / "crystals" / "manifest.json").unlink()
    assert cli.main(["report", str(run)]) == 2
    assert "moiety data build" in capsys.readouterr().err
