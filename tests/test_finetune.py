"""Every recipe of finetune/configs trains, is scored beside its baselines, and leaves an adapter that predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.data
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

from moiety.adapters.baselines import baselines
from moiety.adapters.finetune import FinetuneConfig, LabelledData, build_model
from moiety.adapters.tasks import KINDS, Task, TaskConfig, require_consistent
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.inference.predict import load_predictor, predict_files
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.heads_moiety import TaskHead
from moiety.models.modeling_moiety import MoietyForPrediction
from moiety.models.vocabulary_moiety import COVALENT_RADII
from moiety.testing import launched
from moiety.tokens.batch import collate, with_neighbors
from moiety.tokens.labels import Label
from moiety.training.config import load_config

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "tests/data/corpora"
RECIPES = (
    "crystals_energy",
    "flows_velocity",
    "forces_conservative",
    "forces_direct",
    "freesolv",
    "interactions_energy",
    "interactions_s22",
    "proteins_residues",
    "proteins_secondary",
    "qm9_dipole",
    "qm9_gap",
    "qm9_mulliken",
    "qm9_polarizability",
    "qm9_u0",
    "released_forces",
    "released_gap",
    "surfaces_adsorption",
)
SHORT = ["steps=2", "log_every=1", "warmup_steps=1", "num_train=12", "num_test=4", "num_val=0"]
MORE = {
    "crystals_energy": ["num_train=80", "num_test=10"],  # to have the elements of the test structures
    "flows_velocity": ["num_train=5", "num_test=2"],
    "interactions_s22": [f"test_corpus={SAMPLES / 's22'}"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_its_adapter_predicts(recipe: str, base: Path, tmp_path: Path):
    path = ROOT / f"finetune/configs/{recipe}.yaml"
    config = load_config(FinetuneConfig, path)
    corpus = SAMPLES / Path(config.data.corpus).name
    words = [*SHORT, *MORE.get(recipe, []), f"model={base}", f"corpus={corpus}"]
    records = launched.train(ROOT / "finetune/lora.py", ["--config", path, *words], tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2] and records[-1]["skipped_steps"] == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [entry["target"] for entry in metrics] == [task.label for task in config.tasks]
    structure = Corpus.open(corpus, split="test")[0]
    (line,) = load_predictor(base, tmp_path / "run/adapter")([structure])
    for entry, task in zip(metrics, config.tasks, strict=True):
        assert "pretrained + LoRA" in entry["results"] and len(entry["results"]) >= 2
        assert all(np.isfinite(value) for value in entry["results"].values())
        per_node, shape = KINDS[task.kind]
        assert np.shape(line[task.label]["value"]) == (*((structure.num_nodes,) if per_node else ()), *shape)


def molecules(*charges: list[float]) -> list[Structure]:
    """Water molecules whose atoms have these labels."""
    return [Structure(np.array([8, 1, 1]), np.eye(3), node_scalars={"charge": np.array(c)}) for c in charges]


def task_of(train: list[Structure], **config: Any) -> Task:
    return Task.fit(TaskConfig(**config), train)


def test_baselines_of_nodes_are_means_of_all_and_of_a_type():
    train, test = molecules([-0.8, 0.4, 0.4], [np.nan, 0.1, np.nan]), molecules([-1.0, 0.0, 0.0])
    task = task_of(train, label="charge", kind="node", unit="e")
    found = baselines(task, train, test)
    assert found["mean predictor"] == pytest.approx([0.025] * 3)
    assert found["mean of a type"] == pytest.approx([-0.8, 0.3, 0.3])
    assert task.error(found["mean of a type"], task.labels(test)) == pytest.approx(0.8 / 3)


def test_baselines_of_classes_are_the_most_frequent():
    train, test = molecules([0, 1, 1], [0, 1, np.nan]), molecules([0, 1, 0])
    task = task_of(train, label="charge", kind="classes", classes=("a", "b"))
    errors = {name: task.error(answers, task.labels(test)) for name, answers in baselines(task, train, test).items()}
    assert errors == pytest.approx({"most frequent class": 200 / 3, "most frequent class of a type": 100 / 3})


def test_the_baselines_of_a_chain_know_the_sequence():
    def chain(*types: int, broken: bool = False) -> Structure:
        number = np.arange(len(types)) + (10 if broken else 0) * (np.arange(len(types)) > 1)
        fold = np.array([float(t == 121 and 0 < i < len(types) - 1) for i, t in enumerate(types)])
        return Structure(
            np.array(types), np.zeros((len(types), 3)), residue_index=number, node_scalars={"fold": fold}
        )  # fmt: skip

    train, test = [chain(120, 121, 122), chain(121, 120), chain(121, 125)], [chain(120, 121, 122), chain(121, 120)]
    task = task_of(train, label="fold", kind="classes", classes=("ends", "within"))
    assert baselines(task, train, test)["most frequent class of a 3-mer"].tolist() == [0, 1, 0, 0, 0]
    broken = [chain(120, 121, 122, broken=True)]
    assert baselines(task, train, broken)["most frequent class of a 3-mer"].tolist() == [0, 0, 0]
    task = task_of(train, label="residue", kind="residues")
    found = baselines(task, train, test)["most frequent between two neighbours"]
    assert found[1] == 121 - 119, "between 120 and 122"


def test_the_baseline_of_a_tensor_is_isotropic():
    structures = [
        Structure(np.array([6] * n), np.eye(3)[:n], tensors={"alpha": np.diag([1.0, 2.0, 3.0]) * n}) for n in (1, 2, 3)
    ]
    task = task_of(structures, label="alpha", kind="tensor", unit="bohr^3")
    found = baselines(task, structures, structures)
    assert found["mean predictor"][0] == pytest.approx(4 * np.eye(3))
    assert found["linear in composition"][2] == pytest.approx(found["linear in composition"][2][0, 0] * np.eye(3))
    assert task.mean == pytest.approx(4.0) and task.std > 0


def alcohols(theory: str = "DFT", shift: float = 0.0) -> list[Structure]:
    """Molecules C_n H_(2n+2) O with energies that are a sum over elements, and something on top of it."""
    made = []
    for n in range(1, 6):
        types = np.array([8] + [6] * n + [1] * (2 * n + 2))
        energy = -2000.0 - 1030.0 * n - 16.0 * (2 * n + 2) + 0.1 * (-1) ** n + shift * len(types)
        made.append(Structure(types, np.eye(3)[np.zeros(len(types), dtype=int)], energy=energy, theory=theory))
    return made


def test_reference_energies_leave_what_the_network_has_to_learn():
    train = alcohols()
    total = task_of(train, label="energy", kind="energy", unit="eV")
    assert set(total.references.elements) == {"H", "C", "O"}
    assert 0 < total.std < 0.15 and total.head()["energy"]["references"] == total.references.elements
    linear = baselines(total, train, train)["linear in composition"]
    assert total.error(linear, total.labels(train)) < 0.15
    per_atom = task_of(train, label="energy", kind="energy", unit="eV/atom")
    assert per_atom.labels(train) == pytest.approx(total.labels(train) / [s.num_nodes for s in train])
    assert per_atom.std < total.std / 5


def test_references_do_not_hold_what_single_structures_say():
    rng = np.random.default_rng(0)
    train = []
    for _ in range(12):  # two of 18 elements each, 5 eV about a mean, and .3 eV that no element explains
        types = rng.permutation(18)[:2] + 3
        energy = -5.0 * 2 + 0.1 * (types - 12).sum() + 0.3 * rng.standard_normal()
        train.append(Structure(types, np.eye(3)[:2], energy=energy))
    references = task_of(train, label="energy", kind="energy", unit="eV").references
    assert all(-7 < value < -3 for value in references.elements.values())
    assert np.std([references.total(s) - s.energy for s in train]) > 0.05


def test_levels_of_theory_are_brought_to_one():
    train = [*alcohols(), *alcohols("DFT"), *alcohols("other", shift=3.0)]
    task = task_of(train, label="energy", kind="energy", unit="eV")
    assert task.references.main == "DFT"
    assert task.labels(train[10:]) == pytest.approx(task.labels(train[:5]), abs=0.05)
    assert task.label.values(train).dtype == torch.float64


def test_a_sum_that_is_no_total_energy_is_the_same_at_every_level_of_theory():
    train = alcohols()
    for s in train:
        s.scalars["interaction_energy"] = -0.01 * s.num_nodes + 0.001 * (s.num_nodes % 4)
    task = task_of(train, label="interaction_energy", kind="sum", unit="eV")
    other = alcohols("CCSD(T)")[:1]
    other[0].scalars["interaction_energy"] = -0.2
    assert task.labels(other) == pytest.approx([-0.2])
    assert np.isfinite(baselines(task, train, other)["linear in composition"]).all()


def test_an_interaction_is_told_from_none():
    train = alcohols()
    for s in train:
        s.scalars["interaction_energy"] = -0.01 * s.num_nodes
    task = task_of(train, label="interaction_energy", kind="interaction", unit="eV")
    labels = task.labels(train)
    assert task.mean == 0 and task.std == pytest.approx(np.sqrt(np.square(labels).mean()))
    assert baselines(task, train, train)["mean predictor"] == pytest.approx(labels.mean())
    train[3].cell, train[3].pbc = np.eye(3) * 20, np.array([True, True, False])
    with pytest.raises(InputError, match=f"interaction_energy: kind 'interaction' .* {train[3].id} is periodic"):
        task_of(train, label="interaction_energy", kind="interaction", unit="eV")


def test_covalent_radii_are_those_of_the_literature():
    assert COVALENT_RADII[1:97] == pytest.approx(ase.data.covalent_radii[1:97])


def test_an_average_is_the_energy_an_atom():
    train = alcohols()
    for s in train:
        s.scalars["per_atom"] = s.energy / s.num_nodes
    average = task_of(train, label="per_atom", kind="average", unit="eV/atom")
    energy = task_of(train, label="energy", kind="energy", unit="eV/atom")
    assert average.references.elements == energy.references.elements and average.std == pytest.approx(energy.std)
    assert average.labels(train) == pytest.approx(energy.labels(train))
    found = [baselines(task, train, train)["linear in composition"] for task in (average, energy)]
    assert found[0] == pytest.approx(found[1])
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=8, num_layers=1, num_heads=1, edge_channels=4)
    features, batch = torch.randn(sum(s.num_nodes for s in train), 9, 8), collate(train)
    heads = [TaskHead(config, **task.head()[task.name]).eval() for task in (average, energy)]
    heads[1].load_state_dict(heads[0].state_dict())
    read = (features, batch.positions, batch.node_type, batch.graph_index, batch.num_structures)
    said = [head(*read).detach().numpy() for head in heads]
    assert average.answer(said[0], train) == pytest.approx(energy.answer(said[1], train))


def test_intensive_numbers_stand_beside_shares_of_elements():
    train = alcohols()
    for s in train:
        s.scalars["mass"] = float(s.node_type.mean())
    found = baselines(task := task_of(train, label="mass", kind="mean"), train, train)
    errors = {name: task.error(answers, task.labels(train)) for name, answers in found.items()}
    assert errors["linear in shares of elements"] < errors["mean predictor"] / 2


def test_an_element_without_reference_is_named():
    task = task_of(alcohols(), label="energy", kind="energy", unit="eV")
    with pytest.raises(InputError, match="no reference energy of Xe"):
        task.references.total(Structure(np.array([54]), np.zeros((1, 3)), theory="DFT"))
    with pytest.raises(InputError, match="'PBE' is not among"):
        task.references.total(Structure(np.array([6]), np.zeros((1, 3)), theory="PBE"))


@pytest.fixture(scope="module")
def force_field(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for conservative forces after two steps."""
    out = tmp_path_factory.mktemp("force_field") / "run"
    words = [*SHORT, f"model={base}", f"corpus={SAMPLES / 'forces'}"]
    launched.train(
        ROOT / "finetune/lora.py", ["--config", ROOT / "finetune/configs/forces_conservative.yaml", *words], out
    )
    return out


def test_energy_and_forces_of_an_adapter_come_together(base: Path, force_field: Path):
    targets = {entry["target"]: entry for entry in json.loads((force_field / "metrics.json").read_text())}
    assert list(targets) == ["energy", "forces"] and targets["forces"]["unit"] == "eV/Å"
    assert "linear in composition" in targets["energy"]["results"]
    structure = Corpus.open(SAMPLES / "forces", split="test")[0]
    (line,) = load_predictor(base, force_field / "adapter")([structure])
    assert np.shape(line["forces"]["value"]) == (structure.num_nodes, 3)
    assert abs(line["energy"]["value"] - structure.energy) < 50, "the references are in the adapter"


def test_a_file_with_an_element_the_energies_do_not_know_is_a_line_that_says_so(
    base: Path, force_field: Path, tmp_path: Path
):
    write(tmp_path / "two.xyz", [molecule("H2O"), Atoms("Xe", positions=[[0, 0, 0]])])
    good, broken = predict_files(load_predictor(base, force_field / "adapter"), [tmp_path / "two.xyz"])
    assert good["ok"] and np.isfinite(good["predictions"]["energy"]["value"])
    assert broken["error"]["code"] == "no_reference_energy" and "Xe" in broken["error"]["reason"]


def test_residues_are_told_without_their_types(base: Path):
    chain = Corpus.open(SAMPLES / "proteins", split="test")[0]
    model = MoietyForPrediction(MoietyConfig.from_pretrained(base, tasks={"residue": {"kind": "residues"}})).eval()
    batch = with_neighbors(collate([chain]), model.config.cutoff)
    other = batch.replace(node_type=batch.node_type.flip(0))
    with torch.no_grad():
        one, two = (model(**b.inputs()).predictions["residue"] for b in (batch, other))
    assert one.shape == (chain.num_nodes, 20) and torch.equal(one, two)
    assert Label("residue", (), True).of(chain).max() < 20


def test_units_come_from_the_corpus_and_another_is_refused():
    task = TaskConfig(label="gap", kind="mean")
    assert task.in_units_of({"gap": "eV, of the orbitals"}, "qm9").unit == "eV"
    with pytest.raises(InputError, match="unit is 'meV', but qm9 has 'eV'"):
        TaskConfig(label="gap", kind="mean", unit="meV").in_units_of({"gap": "eV"}, "qm9")
    assert (
        TaskConfig(label="energy", kind="energy", unit="eV/atom").in_units_of({"energy": "eV"}, "x").label_unit == "eV"
    )


def test_labels_that_are_all_the_same_are_refused():
    with pytest.raises(InputError, match="nothing to learn"):
        task_of(molecules([0.5, 0.5, 0.5]), label="charge", kind="node")


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ([{"label": "fold", "kind": "classes"}], "needs their names"),
        ([{"label": "fold", "kind": "colour"}], "colour"),
        ([{"label": "forces", "kind": "forces"}], "one task of kind energy is needed"),
        ([{"label": "u0", "kind": "energy"}, {"label": "g298", "kind": "energy"}], "no more than one"),
        ([{"label": "u0", "kind": "energy", "unit": "hartree"}], "eV or eV/atom"),
        ([{"label": "gap", "kind": "mean"}, {"label": "gap", "kind": "sum"}], "gap comes twice"),
        ([{"label": "type", "kind": "residues"}], "its label is 'residue'"),
        ([], "at least one"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks: list[dict], says: str):
    with pytest.raises(InputError, match=says):
        require_consistent([TaskConfig(**task) for task in tasks])


def test_labels_that_are_not_there_are_named_beside_those_that_are():
    config = load_config(
        FinetuneConfig, ROOT / "finetune/configs/qm9_gap.yaml", [f"corpus={SAMPLES / 'qm9'}", "num_train=4"]
    )
    with pytest.raises(InputError, match="scalar:gap"):
        LabelledData.open(config.data, [TaskConfig(label="gapp", kind="mean")])


@pytest.mark.parametrize(("recipe", "derives"), [("qm9_u0", False), ("forces_conservative", True)])
def test_derivatives_are_taken_where_they_are_learned(base: Path, recipe: str, derives: bool):
    corpus = SAMPLES / recipe.partition("_")[0]
    words = [*SHORT, f"model={base}", f"corpus={corpus}"]
    config = load_config(FinetuneConfig, ROOT / f"finetune/configs/{recipe}.yaml", words)
    data = LabelledData.open(config.data, config.tasks)
    model = build_model(config, data)
    assert model.derives is derives
    task = data.tasks[0]
    structures = data.test.read(range(3), whole=True)
    inputs = with_neighbors(collate(structures), 5.0).inputs()
    said = [model.eval()(**inputs).predictions]
    model.get_base_model().derives = not derives
    said.append(model(**inputs).predictions)
    assert torch.allclose(*(output[task.name].detach() for output in said))
    assert sorted("forces" in output for output in said) == [False, True]
