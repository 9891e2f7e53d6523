"""Reports of whole, half and broken run directories."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from moiety import InputError, Structure
from moiety.inference.describe import trivial_losses
from moiety.inference.drawing import PREDICTED_COLOR, TRUE_COLOR, structure_figure
from moiety.inference.examples import denoising_examples
from moiety.inference.report import write_report
from moiety.inference.report_figures import running_mean
from moiety.inference.run_files import RunFiles
from moiety.inference.summary import print_summary, summary
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.models.vocabulary_moiety import RESIDUE_ID
from moiety.objectives import build_objectives


def structures() -> list[Structure]:
    ethanol, salt = molecule("CH3CH2OH"), bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    rng = np.random.default_rng(0)
    turn = 1.745 * np.arange(30)
    helix = np.stack([2.3 * np.cos(turn), 2.3 * np.sin(turn), 1.5 * np.arange(30)], axis=1)
    helix[20:] += 8.0  # a chain break
    residues = rng.choice([RESIDUE_ID[name] for name in ("ALA", "LYS", "GLU", "SER")], 30)
    return [
        Structure(ethanol.numbers, ethanol.positions, id="ethanol"),
        Structure(
            salt.numbers,
            salt.positions,
            domain="crystal",
            id="salt",
            cell=np.array(salt.cell),
            pbc=np.ones(3, dtype=bool),
        ),
        Structure(residues, helix, domain="protein", id="1abc_A", node_vectors=rng.normal(size=(30, 4, 3))),
    ]


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=16, num_layers=1, num_heads=2, lmax=1, edge_channels=8, num_radial=6)
    return denoising_examples(MoietyForPreTraining(config), structures(), sigma=0.1, seed=3)


def log_line(step: int) -> str:
    losses = {"molecule": {"coordinates": 1 / step, "types": 2.0}, "crystal": {"coordinates": 2 / step}}
    record = {"step": step, "loss": 1.0, "losses": losses, "lr": 1e-3, "structures_per_s": 300.0, "elapsed_s": step}
    return json.dumps(record | {"time": {"data": 0.1, "forward": 0.9}})


@pytest.fixture
def run_dir(tmp_path: Path, examples: list[dict]) -> Path:
    run = tmp_path / "run"
    (run / "dipole").mkdir(parents=True)
    (run / "dipole_scratch").mkdir()
    (run / "log.jsonl").write_text("".join(log_line(step) + "\n" for step in range(1, 101)))
    (run / "trivial.json").write_text('{"molecule": {"coordinates": 0.9}}')
    corpora = {
        "qm9": {"domain": "molecule", "structures": 100, "nodes": 1800, "share": 0.7},
        "ccd": {"domain": "molecule", "structures": 50, "nodes": 1500, "share": 0.3},
    }
    (run / "run.json").write_text(
        json.dumps({"parameters": 512_345, "corpora": corpora, "versions": {"torch": "2.13.0"}})
    )
    (run / "denoising_examples.json").write_text(json.dumps(examples))
    common = {"target": "dipole", "metric": "MAE", "unit": "D"}
    (run / "dipole" / "metrics.json").write_text(
        json.dumps([{**common, "results": {"pretrained + LoRA": 0.15, "mean predictor": 1.2}, "labels": 1000}])
    )
    (run / "dipole_scratch" / "metrics.json").write_text(json.dumps([{**common, "results": {"from scratch": 0.25}}]))
    prediction = {"target": "dipole", "unit": "D", "split": "test", "true": [1.0, 2.0], "predicted": [1.1, 1.9]}
    (run / "dipole" / "predictions.json").write_text(
        json.dumps([{**prediction, "metrics": {"MAE": 0.1}, "baselines": {}}])
    )
    return run


def test_a_report_is_one_file_that_loads_nothing_from_outside(run_dir: Path):
    html = write_report(run_dir).read_text()
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="', html)
    assert html.count("Plotly.newPlot(") >= 9
    assert html.count("plotly.js v") <= 2, "the library is inlined once"


def test_every_section_is_there_and_in_the_contents(run_dir: Path):
    html = write_report(run_dir).read_text()
    sections = re.findall(r'<section id="(\w+)">', html)
    assert sections == ["results", "structures", "transfer", "losses", "speed", "facts"]
    assert re.findall(r'<a href="#(\w+)">', html) == sections


def test_a_report_of_a_run_in_progress_leaves_out_what_is_missing(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text(log_line(1) + "\n" + log_line(2)[:40])
    html = write_report(tmp_path).read_text()
    assert re.findall(r'<section id="(\w+)">', html) == ["results", "losses", "speed"]


def test_steps_that_were_odd_are_listed_with_their_structures(run_dir: Path):
    event = {"step": 7, "what": "loss not finite, skipped on all ranks", "micro_batches": {"13": ["<i>", *"abcdefgh"]}}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
    html = write_report(run_dir).read_text()
    assert '<section id="events">' in html and "loss not finite, skipped on all ranks" in html
    assert "&lt;i&gt;, a, b, c, d, e and 3 more" in html


def test_classes_are_drawn_as_shares_and_validation_as_a_curve(run_dir: Path):
    classes = {"target": "fold", "classes": ["helix", "strand"], "true": [0, 0, 1], "predicted": [0, 1, 1]}
    (run_dir / "dipole" / "predictions.json").write_text(json.dumps([classes]))
    (run_dir / "validation.jsonl").write_text('{"step": 5, "score": 0.5}\n{"step": 10, "score": 0.25}\n')
    html = write_report(run_dir).read_text()
    assert '"heatmap"' in html and "50%" in html and "lowest 0.25" in html


def test_names_from_files_cannot_inject_markup(run_dir: Path):
    (run_dir / "run.json").write_text('{"<script>alert(1)</script>": "<b>"}')
    html = write_report(run_dir).read_text()
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html


def test_an_empty_directory_and_broken_files_are_input_errors(tmp_path: Path):
    with pytest.raises(InputError, match="nothing to report yet"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text("no json\n" + log_line(2) + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl, line 1: not JSON"):
        write_report(tmp_path)


def test_a_step_that_ran_again_after_a_resume_counts_once(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("".join(log_line(step) + "\n" for step in (1, 2, 3, 2, 3, 4)))
    steps, _ = RunFiles.open(tmp_path).losses()["molecule", "coordinates"]
    assert steps == [1, 2, 3, 4]


def test_the_summary_joins_corpora_of_a_domain_and_files_of_a_target(run_dir: Path, capsys):
    results = summary(RunFiles.open(run_dir))
    assert results["structures"] == {"molecule": 150}
    row = next(row for row in results["losses"] if (row["domain"], row["objective"]) == ("molecule", "coordinates"))
    assert row["first"] == 1.0 and row["trivial"] == 0.9
    assert row["last"] == pytest.approx(np.mean([1 / step for step in range(96, 101)]))
    assert list(results["targets"][0]["results"]) == ["pretrained + LoRA", "from scratch", "mean predictor"]
    print_summary(results)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("molecule", "150", "coordinates", "from scratch", "0.25"))


def test_examples_hold_centred_noise_and_its_error(examples: list[dict]):
    for example, structure in zip(examples, structures(), strict=True):
        true, predicted = np.array(example["true_noise"]), np.array(example["predicted_noise"])
        assert true.shape == predicted.shape == structure.positions.shape
        assert np.abs(true.mean(0)).max() < 1e-3
        assert example["error"] == pytest.approx(((predicted - true) ** 2).mean() / 0.1**2, rel=2e-2)
        assert np.abs(np.array(example["positions"]) - structure.positions).max() < 1e-3
        assert (example["cell"] is None) == (structure.cell is None)
    json.dumps(examples)


def test_arrows_lead_from_the_displaced_places_back_to_the_true_ones(examples: list[dict]):
    figure, factor = structure_figure(examples[0])
    arrows = {trace.color: np.stack([trace.x, trace.y, trace.z], axis=1) for trace in figure.data}
    displaced = np.array(examples[0]["positions"]) + np.array(examples[0]["true_noise"])
    tips = displaced - factor * np.array(examples[0]["true_noise"])
    for tip in tips:
        assert np.linalg.norm(arrows[TRUE_COLOR] - tip, axis=1).min() < 1e-4
    assert PREDICTED_COLOR in arrows


def test_proteins_are_drawn_as_a_trace_and_crystals_with_their_cell(examples: list[dict]):
    crystal, _ = structure_figure(examples[1])
    protein, _ = structure_figure(examples[2])
    assert {"Na", "Cl", "bond", "unit cell"} <= {trace.name for trace in crystal.data}
    assert {"CA trace", "hydrophobic", "acidic", "basic", "polar"} <= {trace.name for trace in protein.data}


def test_atoms_on_a_face_of_the_cell_are_drawn_on_both_faces(examples: list[dict]):
    figure, _ = structure_figure(examples[1])
    points = {trace.name: len(trace.x) for trace in figure.data}
    per_sphere = 162
    assert points["Na"] + points["Cl"] == 27 * per_sphere, "8 atoms of the cell complete a block of 3 x 3 x 3"


def test_trivial_predictors_score_what_theory_says():
    objectives = build_objectives({"types": {"share": 0.5}, "coordinates": {}})
    ethanol = structures()[0]
    losses = trivial_losses([ethanol], objectives)
    assert losses["coordinates"] == 1.0
    assert losses["types"] == pytest.approx(-math.log(1 / 3) / 3 - 2 * math.log(2 / 3) / 3), "two carbons, one oxygen"


def test_a_running_mean_keeps_length_and_constants():
    assert running_mean([2.0] * 100) == pytest.approx([2.0] * 100)
