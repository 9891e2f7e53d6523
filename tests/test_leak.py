"""The leak guard: disguised copies are found, strangers are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from rdkit import Chem
from rdkit.Chem import AllChem

from moiety.cli import main
from moiety.data.convert import from_object
from moiety.data.leak import load, molecules, plant, scan
from moiety.data.leak.fingerprint import fingerprint
from moiety.data.structure import Structure
from moiety.models.vocabulary_moiety import FIRST_RESIDUE

CORPORA = Path(__file__).parent / "data" / "corpora"
FILES = Path(__file__).parent / "data" / "files"
PLANTED = {  # disguise -> the corpora whose structures wear it, and the kinds it is found by
    plant.moved: (("qm9", "ccd"), {"exact"}),
    plant.rattled: (("qm9", "ccd"), {"near"}),
    plant.another_conformer: (("qm9",), {"near", "same-molecule"}),
    plant.skewed: (("crystals",), {"exact"}),
    plant.repeated: (("crystals",), {"exact"}),
    plant.repeated_and_rattled: (("crystals",), {"near"}),
}


def named(obj: object, identity: str = "it") -> Structure:
    structure = from_object(obj)
    structure.id = identity
    return structure


def posed(smiles: str, seed: int) -> Structure:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=seed) == 0
    assert AllChem.MMFFOptimizeMolecule(mol, maxIters=2_000) == 0
    return named(mol)


def kinds(train: Structure, test: Structure) -> list[str]:
    return [leak.kind for leak in scan([train], [test]).leaks]


def run(*argv: object) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_sixty_planted_copies_are_found_among_five_hundred_and_nothing_else():
    rng = np.random.default_rng(0)
    pools = {name: load(str(CORPORA / name))[0] for name in ("qm9", "ccd", "crystals")}
    train = [structure for pool in pools.values() for structure in pool[: len(pool) * 3 // 5]]
    test = [structure for pool in pools.values() for structure in pool[len(pool) * 3 // 5 :]]
    untouched = {leak.test for leak in scan(train, test).leaks}
    origin: dict[str, tuple[str, set[str]]] = {}
    for disguise, (sources, expected) in PLANTED.items():
        originals = [s for name in sources for s in pools[name][: len(pools[name]) * 3 // 5] if 1 < s.num_nodes <= 30]
        number = 0
        for original in (originals[place] for place in rng.permutation(len(originals))):
            copy = disguise(original, rng)
            if copy is not None and number < 10:
                copy.id = f"{disguise.__name__}:{original.id}"
                origin[copy.id] = original.id, expected
                test.append(copy)
                number += 1
    assert len(origin) == 60 and len(train) + len(test) > 500
    leaks = scan(train, test).leaks
    found = {leak.test: leak for leak in leaks if leak.test in origin}
    assert found.keys() == origin.keys()
    for identity, (original, expected) in origin.items():
        assert found[identity].train == original
        assert found[identity].kind in expected, found[identity]
    assert {leak.test for leak in leaks} - origin.keys() == untouched
    assert len(untouched) <= 2, "the samples have few relatives of their own"


@pytest.mark.parametrize("name", ["CH4", "C6H6", "C60", "CO2", "H2O", "HCN", "C2H6", "SiH4"])
def test_symmetry_of_a_molecule_is_no_trap(name):
    rng = np.random.default_rng(1)
    original = named(molecule(name))
    for _ in range(3):
        assert kinds(original, plant.moved(original, rng)) == ["exact"]
        assert kinds(original, plant.rattled(original, rng)) == ["near"]


def test_a_mirror_image_is_a_near_duplicate_and_says_so():
    rng = np.random.default_rng(2)
    chiral = named(molecule("CH4"))
    chiral.node_type = np.array([6, 1, 9, 17, 35])
    (leak,) = scan([chiral], [plant.mirrored(chiral, rng)]).leaks
    assert leak.kind == "near" and leak.evidence["mirrored"] and leak.evidence["rmsd"] < 1e-6
    (leak,) = scan([chiral], [plant.moved(chiral, rng)]).leaks
    assert leak.kind == "exact" and not leak.evidence["mirrored"]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("CCCCCC", "CCCCCC", "same-molecule"),
        ("C[C@H](O)CCCO", "OCCC[C@H](C)O", "same-molecule"),
        ("C[C@H](O)CCCO", "C[C@@H](O)CCCO", "stereoisomer"),
        ("CC/C=C/CC", "CC/C=C\\CC", "stereoisomer"),
        ("CCCO", "CC(O)C", None),
    ],
)
def test_poses_are_compared_by_their_bonds_and_stereo(first, second, kind):
    a, b = posed(first, seed=1), posed(second, seed=2)
    assert kinds(a, b) == ([kind] if kind else [])


def test_atoms_across_a_small_ring_are_not_bonded():
    bicyclopentane = posed("C1C2CC1C2", seed=1)  # its bridgeheads are 1.9 Å apart
    bonds = molecules.bonded(bicyclopentane)
    assert bonds is not None and sorted(atom.GetDegree() for atom in bonds.GetAtoms()) == [1] * 8 + [4] * 5


def test_isomers_and_other_molecules_are_strangers():
    assert kinds(named(molecule("CH3CH2OH")), named(molecule("CH3OCH3"))) == []
    assert kinds(named(molecule("C6H6")), named(molecule("C60"))) == []


def test_the_charge_keeps_two_ions_from_being_exact():
    iron = Structure(np.array([26]), np.zeros((1, 3)), id="FE2", charge=2)
    (leak,) = scan([iron], [replace(iron, id="FE", charge=3)]).leaks
    assert leak.kind == "near" and leak.evidence["charges"] == [2, 3]


def test_cells_of_one_crystal_agree_and_polymorphs_do_not():
    cubic, primitive = named(bulk("NaCl", "rocksalt", 5.64, cubic=True)), named(bulk("NaCl", "rocksalt", 5.64))
    assert kinds(cubic, primitive) == ["exact"]
    assert kinds(cubic, named(bulk("NaCl", "cesiumchloride", 3.4))) == []
    assert kinds(cubic, named(bulk("NaCl", "rocksalt", 6.0))) == []


def test_slabs_are_compared_with_their_vacuum():
    slab = named(fcc111("Pt", (1, 1, 3), vacuum=8.0))
    assert kinds(slab, named(fcc111("Pt", (2, 2, 3), vacuum=12.0))) == ["exact"]
    assert kinds(slab, named(fcc111("Pt", (1, 1, 4), vacuum=8.0))) == []


def test_fingerprints_of_open_systems_never_differ_by_more_than_the_rmsd():
    rng = np.random.default_rng(3)
    original = named(molecule("C6H6"))
    for scale in (1e-3, 0.01, 0.1, 0.5):
        copy = replace(original, positions=original.positions + rng.normal(scale=scale, size=(12, 3)))
        rmsd = np.sqrt(((copy.positions - original.positions) ** 2).sum(axis=1).mean())
        assert np.linalg.norm(fingerprint(copy) - fingerprint(original)) <= rmsd


def test_related_sequences_are_found_by_identity():
    rng = np.random.default_rng(4)

    def chain(identity: str, residues: np.ndarray) -> Structure:
        return Structure(FIRST_RESIDUE + residues, rng.normal(scale=20, size=(len(residues), 3)), "protein", identity)

    parent = rng.integers(0, 20, 120)
    close, distant = parent.copy(), parent.copy()
    close[::20] = (close[::20] + 1) % 20
    distant[np.arange(120) % 12 >= 6] = rng.integers(0, 20, 60)  # runs of six stay: words of four are looked for
    test = [chain("close", close), chain("distant", distant), chain("stranger", rng.integers(0, 20, 120))]
    leaks = {
        leak.test: leak for leak in scan([chain("other", rng.integers(0, 20, 90)), chain("parent", parent)], test).leaks
    }
    assert {name: (leak.kind, leak.train) for name, leak in leaks.items()} == {
        "close": ("sequence-90", "parent"),
        "distant": ("sequence-30", "parent"),
    }
    assert leaks["close"].evidence["identity"] == pytest.approx(114 / 120, abs=0.01)


def test_shared_scaffolds_are_counted_and_are_no_duplicates():
    report = scan([named(molecule("C6H6"), "benzene")], [named(molecule("C5H5N"), "pyridine"), named(molecule("CH4"))])
    assert report.shared["scaffold"] == {
        "labels": 1,
        "labels_in_train": 0,
        "structures": 1,
        "structures_with_label_in_train": 0,
    }
    assert report.num_duplicates == 0


def test_the_command_prints_writes_and_fails_on_demand(tmp_path, capsys):
    out = tmp_path / "leaks.jsonl"
    places = ("--train", FILES, "--test", FILES / "two.sdf")
    assert run("data", "leak", *places, "--out", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["exact"] == 2 and report["rejected"]["train"] > 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == report["leaks"]
    assert run("data", "leak", *places, "--fail") == 2
    printed = capsys.readouterr()
    assert "exact         2" in printed.out and "2 structures of" in printed.err
    splits = ("--train", f"{CORPORA / 'qm9'}:train", "--test", f"{CORPORA / 'qm9'}:test")
    assert run("data", "leak", *splits, "--fail") == 0
    assert "40 structures looked for in 220" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (f"{CORPORA / 'qm9'}:tset", "no split 'tset'"),
        (f"{FILES}:test", "is not a corpus"),
        (FILES / "empty.xyz", "no structure to compare"),
        ("nowhere", "no such file or folder"),
    ],
)
def test_a_place_that_cannot_be_compared_is_named(place, told, capsys):
    assert run("data", "leak", "--train", FILES, "--test", place) == 2
    assert told in capsys.readouterr().err
