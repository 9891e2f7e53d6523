"""The weights that come with the package are the ones that were trained, load offline, and answer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from ase import Atoms
from ase.build import molecule
from ase.io import write
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline
from typer.testing import CliRunner

import moiety
from moiety.cli import app
from moiety.data.shards import Corpus
from moiety.errors import InputError
from moiety.inference import MoietyCalculator
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.objectives import build_objectives
from moiety.tokens.batch import collate, with_neighbors
from moiety.training.config import PretrainConfig, load_config
from moiety.training.export import probe_outputs

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
TINY = moiety.weights("tiny")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "pretrain/release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_weights_load_without_a_network_and_are_those_of_the_trainer() -> None:
    found = probe_outputs(AutoModel.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY))
    for name, expected in load_file(TINY / "probe.safetensors").items():
        assert torch.allclose(found[name], expected, atol=1e-4), "machines round differently"


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 8_000_000


def test_losses_on_the_samples_are_the_golden_ones() -> None:
    golden = json.loads((ROOT / "tests/golden/released.json").read_text())
    assert losses() == {corpus: pytest.approx(expected, rel=1e-3) for corpus, expected in golden.items()}
    assert all(expected["coordinates"] < 0.7 for expected in golden.values()), "1 is no skill"


def losses() -> dict[str, dict[str, float]]:
    """Corpus -> objective -> mean loss of up to ten held-out structures, each objective alone."""
    model = MoietyForPreTraining.from_pretrained(TINY).eval()
    found: dict[str, dict[str, float]] = {}
    for corpus in ("qm9", "crystals", "proteins"):
        held_out = Corpus.open(SAMPLES / corpus, split="test")
        clean = collate(held_out.read(range(min(10, len(held_out)))))
        for name in ("coordinates", "types", "cell"):
            objective = build_objectives({name: {}})[0]
            batch = with_neighbors(objective.corrupt(clean, torch.Generator().manual_seed(0)), model.config.cutoff)
            if not (count := float(objective.scored(batch).sum())):
                continue
            with torch.no_grad():
                total = objective.loss_sum(model(**batch.inputs()), batch).sum()
            found.setdefault(corpus, {})[name] = float(total) / count
    return found


@pytest.mark.parametrize(
    ("config", "recipe"),
    [("released", "recipe"), *((f"released_{x}", f"recipe_{x}") for x in ("continued", "labels", "denoising"))],
)
def test_the_recipes_are_those_that_stand_in_the_configurations(config: str, recipe: str) -> None:
    ours = load_config(PretrainConfig, ROOT / f"pretrain/configs/{config}.yaml")
    theirs = load_config(PretrainConfig, TINY / f"{recipe}.yaml")
    assert (ours.data, ours.training, ours.optimizer) == (theirs.data, theirs.training, theirs.optimizer)
    assert ours.start == theirs.start and {t.label for t in ours.tasks} == {t.label for t in theirs.tasks}
    if ours.model:
        assert ours.model_config().to_dict() == theirs.model_config().to_dict()
    assert [vars(o) for o in build_objectives(ours.objectives)] == [
        vars(o) for o in build_objectives(theirs.objectives)
    ]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InputError, match="there are tiny"):
        moiety.weights("huge")


def test_files_are_predicted_out_of_the_box(tmp_path: Path) -> None:
    write(
        tmp_path / "three.xyz", [molecule("CH3CH2OH"), molecule("H2O"), Atoms("Xe2", positions=[[0, 0, 0], [0, 0, 4]])]
    )
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "three.xyz"), "--json"])
    lines = json.loads(result.stdout)["predictions"]
    assert result.exit_code == 0 and all({"gap", "energy", "forces"} <= line["predictions"].keys() for line in lines)
    ethanol, water, xenon = (line["predictions"] for line in lines)
    assert 5 < water["gap"]["value"] < 12 and 5 < ethanol["gap"]["value"] < 12  # B3LYP: 9.9 and 8.9 eV
    assert abs(torch.tensor(ethanol["forces"]["value"])).max() < 2, "near its minimum"
    assert xenon["energy"]["value"] is None and "Xe" in xenon["energy"]["note"]


def test_the_calculator_and_the_pipeline_find_the_adapters() -> None:
    atoms = molecule("CH3CH2OH")
    atoms.calc = MoietyCalculator(TINY)
    told = pipeline("structure-property", model=str(TINY))(atoms)
    assert {"gap", "energy", "forces"} <= told.keys()
    assert atoms.get_potential_energy() == pytest.approx(told["energy"]["value"], abs=1e-4)
    assert "gap" not in atoms.calc.results, "the other adapter's"


def test_a_release_holds_what_it_takes_to_make_it_again(release: ModuleType, tmp_path: Path) -> None:
    run, adapter = finished_run(tmp_path), TINY / "adapters/gap"
    fine = tmp_path / "gap"
    shutil.copytree(adapter, fine / "adapter")
    shutil.copyfile(adapter / "metrics.json", fine / "metrics.json")
    recipe = yaml.safe_load((adapter / "recipe.yaml").read_text())
    recipe["data"]["corpus"] = str(SAMPLES / "qm9")
    (fine / "config.json").write_text(json.dumps(recipe))
    release.release(run, "mine", {"homo": fine}, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert (
        'from_pretrained(moiety.weights("mine"))' in card
        and "### `homo`" in card
        and "B3LYP" in card
        and "seed 0" in card
    )
    assert yaml.safe_load((tmp_path / "out/recipe_denoising.yaml").read_text())["training"]["steps"] == 18000
    assert AutoModel.from_pretrained(tmp_path / "out").config.hidden_size == 80
    other = json.loads((fine / "adapter/adapter_config.json").read_text())
    other["auto_mapping"]["base_fingerprint"] = "0" * 16
    (fine / "adapter/adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="trained on the base 0000"):
        release.release(run, "mine", {"homo": fine}, tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file(), "what stood there before stays"


def finished_run(folder: Path) -> Path:
    """A run directory whose export is the released model."""
    run = folder / "run"
    shutil.copytree(TINY, run / "export")
    config = json.loads((run / "export/config.json").read_text()) | {"auto_map": {}}
    (run / "export/config.json").write_text(json.dumps(config))
    recipe = yaml.safe_load((TINY / "recipe.yaml").read_text())
    recipe["data"]["sources"] = [{"path": str(SAMPLES / "gfn1"), "weight": 1, "supervised": True}]
    recipe["start"] = str(folder / "denoising/export")
    facts = {"versions": {"moiety": "0"}, "machine": {"device": "CPU", "processes": 1}}
    before = yaml.safe_load((TINY / "recipe_denoising.yaml").read_text())
    before["data"]["sources"] = [{"path": str(SAMPLES / "qm9"), "weight": 1}]
    shutil.copytree(TINY, folder / "denoising/export")
    for path, asked in ((run, recipe), (folder / "denoising", before)):
        (path / "config.json").write_text(json.dumps(asked))
        (path / "run.json").write_text(json.dumps(facts))
    card = (TINY / "README.md").read_text()
    (run / "export/README.md").write_text(card.replace('moiety.weights("tiny")', "DIR, trust_remote_code=True"))
    return run


def test_a_run_that_is_not_finished_is_no_release(
    release: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert release.main([str(tmp_path), "mine"]) == 2
    assert "give a finished run" in capsys.readouterr().err
