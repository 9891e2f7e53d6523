"""Predictions and embeddings for folders of good and broken files, with small random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.io import write

from moiety import InputError, cli
from moiety.adapters.adapter import AdapterSettings, add_adapter, load_base, save_adapter
from moiety.data.readers import structure_files
from moiety.inference.loading import batches
from moiety.inference.predict import load_predictor, predict_files
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.feature_extraction_moiety import MoietyFeatureExtractor
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.models.processing_moiety import MoietyProcessor

FILES = Path(__file__).parents[1] / "data" / "files"
TASKS = {
    "dipole": {"kind": "dipole_norm", "std": 1.5, "unit": "D"},
    "charge": {"kind": "node", "unit": "e"},
    "gap": {"kind": "mean", "mean": 6.8, "std": 1.3, "unit": "eV"},
}


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    MoietyProcessor(MoietyFeatureExtractor(cutoff=model.config.cutoff)).save_pretrained(directory)
    return directory


def small(**changes: Any) -> MoietyConfig:
    torch.manual_seed(0)
    return MoietyConfig(hidden_size=16, num_layers=2, num_heads=2, lmax=1, edge_channels=8, num_radial=6, **changes)


@pytest.fixture(scope="module")
def predictor_dir(tmp_path_factory) -> Path:
    return save(MoietyForPrediction(small(tasks=TASKS)), tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory) -> Path:
    return save(MoietyForPreTraining(small()), tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good files of three kinds and broken ones of every kind."""
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    write(folder / "a_three.xyz", [molecule("H2O"), molecule("CH3CH2OH"), molecule("C6H6")])
    write(folder / "inner" / "salt.cif", bulk("NaCl", "rocksalt", a=5.64, cubic=True))
    shutil.copy(FILES / "peptide.pdb", folder)
    for name in ("empty.xyz", "nan.xyz", "overlap.xyz", "unknown_element.xyz", "singular_cell.extxyz", "truncated.pdb"):
        shutil.copy(FILES / name, folder)
    (folder / "garbage.cif").write_bytes(bytes(range(256)) * 20)
    (folder / ".hidden.xyz").write_text("not to be read")
    return folder


GOOD = {"a_three.xyz": 3, "salt.cif": 1, "peptide.pdb": 1}
BROKEN = 7


def test_a_folder_of_good_and_broken_files_gets_a_line_for_each_and_exit_2(folder, predictor_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(folder), "--model", str(predictor_dir)])
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert stop.value.code == 2 and "Traceback" not in captured.err
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
    good = [Path(line["file"]).name for line in lines if line["ok"]]
    assert {name: good.count(name) for name in set(good)} == GOOD
    broken = [line for line in lines if not line["ok"]]
    assert len(broken) == BROKEN
    assert all(line["error"]["code"] and line["error"]["reason"] and line["error"]["remedy"] for line in broken)
    assert all(set(line) == {"file", "index", "id", "ok", "error"} for line in broken)


def test_data_check_and_predict_agree_on_every_structure(folder, predictor_dir):
    from moiety.data.validate import verdicts

    lines = list(predict_files(load_predictor(predictor_dir), [folder]))
    checked = [verdict for path in structure_files([folder]) for verdict in verdicts(path)]
    assert [line["ok"] for line in lines] == [verdict.ok for verdict in checked]
    assert [line["error"]["code"] for line in lines if not line["ok"]] == [v.code for v in checked if not v.ok]


def test_predictions_carry_their_units_and_shapes(folder, predictor_dir):
    line = list(predict_files(load_predictor(predictor_dir), [folder / "a_three.xyz"]))[1]
    assert line["index"] == 1 and line["ok"]
    assert {name: answer["unit"] for name, answer in line["predictions"].items()} == {
        "dipole": "D",
        "charge": "e",
        "gap": "eV",
    }
    assert isinstance(line["predictions"]["dipole"]["value"], float)
    assert len(line["predictions"]["charge"]["value"]) == 9


def test_a_crystal_gets_no_dipole_moment_but_its_other_predictions(folder, predictor_dir):
    (line,) = predict_files(load_predictor(predictor_dir), [folder / "inner/salt.cif"])
    assert line["ok"] and line["predictions"]["dipole"]["value"] is None
    assert "periodic" in line["predictions"]["dipole"]["note"]
    assert isinstance(line["predictions"]["gap"]["value"], float)


def test_how_structures_are_batched_does_not_change_what_is_predicted(folder, predictor_dir):
    predictor = load_predictor(predictor_dir)
    one, all_together = (list(predict_files(predictor, [folder], batch_nodes=n)) for n in (1, 10_000))
    assert [line["id"] for line in one] == [line["id"] for line in all_together]
    for a, b in zip(one, all_together, strict=True):
        assert a["ok"] == b["ok"]
        if a["ok"]:
            assert a["predictions"]["gap"]["value"] == pytest.approx(b["predictions"]["gap"]["value"], rel=1e-5)


def test_batches_keep_the_node_budget_and_the_order(folder):
    chunks = list(batches([folder], batch_nodes=12))
    sizes = [[v.structure.num_nodes for v in chunk if v.structure is not None] for chunk in chunks]
    assert all(sum(size) <= 12 or len(size) == 1 for size in sizes)
    assert [(v.file, v.index) for chunk in chunks for v in chunk] == [
        (v.file, v.index) for chunk in batches([folder], batch_nodes=10_000) for v in chunk
    ]


def test_lines_go_to_a_file_and_a_summary_to_stdout(folder, predictor_dir, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    arguments = ["predict", str(folder / "a_three.xyz"), "--model", str(predictor_dir), "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"ok": 3, "broken": 0, "out": str(out)}
    assert len(out.read_text().splitlines()) == 3


def test_a_model_without_a_task_head_says_what_to_do(pretrained_dir):
    with pytest.raises(InputError, match=r"no task head .*finetune/lora\.py"):
        load_predictor(pretrained_dir)


def test_an_adapter_brings_its_task_to_a_pretrained_model(pretrained_dir: Path, tmp_path: Path, folder: Path, capsys):
    tasks = {"dipole": TASKS["dipole"]}
    adapted = add_adapter(load_base(pretrained_dir, tasks), AdapterSettings())
    save_adapter(adapted, tmp_path / "adapter", pretrained_dir, tasks)
    arguments = ["predict", str(folder / "a_three.xyz"), "--model", str(pretrained_dir)]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--adapter", str(tmp_path / "adapter")])
    assert stop.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    inputs = MoietyFeatureExtractor()([molecule(name) for name in ("H2O", "CH3CH2OH", "C6H6")])
    with torch.no_grad():
        expected = adapted.eval()(**inputs).predictions["dipole"].tolist()
    assert [line["predictions"]["dipole"]["value"] for line in lines] == pytest.approx(expected, rel=1e-3)


def test_a_wrong_model_directory_is_refused_by_name(tmp_path: Path, predictor_dir: Path):
    with pytest.raises(InputError, match="no model here"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="model_type is 'bert'"):
        load_predictor(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "moiety"}')
    with pytest.raises(InputError, match="safetensors"):
        load_predictor(tmp_path)
    with pytest.raises(InputError, match="no adapter here"):
        load_predictor(predictor_dir, tmp_path)


def test_a_missing_file_and_an_empty_folder_are_usage_errors(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        structure_files([tmp_path / "nothing.xyz"])
    with pytest.raises(InputError, match="holds no files"):
        structure_files([tmp_path])


@pytest.mark.parametrize("level", ["graph", "node"])
def test_embeddings_load_without_pickle_and_match_the_files(level, folder, pretrained_dir, tmp_path, capsys):
    out = tmp_path / "embeddings.npz"
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", str(folder), "--model", str(pretrained_dir), "--level", level, "--out", str(out)])
    assert stop.value.code == 2, "broken files were among them"
    assert capsys.readouterr().err.count("left out") == BROKEN
    arrays = np.load(out, allow_pickle=False)
    num_good = sum(GOOD.values())
    assert arrays["ids"].dtype.kind == "U" and len(arrays["ids"]) == len(arrays["files"]) == num_good
    if level == "graph":
        assert arrays["features"].shape == (num_good, 16)
    else:
        assert arrays["features"].shape[1:] == (4, 16)
        assert arrays["offsets"][-1] == len(arrays["features"]) and len(arrays["offsets"]) == num_good + 1
        assert arrays["offsets"][1:4].tolist() == [3, 12, 24]


def test_embedding_nothing_valid_is_an_input_error(pretrained_dir, tmp_path, capsys):
    assert (
        cli.main(["embed", str(FILES / "nan.xyz"), "--model", str(pretrained_dir), "--out", str(tmp_path / "x.npz")])
        == 2
    )
    assert "no valid structure" in capsys.readouterr().err
