"""Corpora of texts: one table, splits that never leak, and what is joined to which structure."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import zipfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import yaml

from moiety.data import declared_texts
from moiety.data.build import build, load_recipe
from moiety.data.crystal_texts import describe, formula
from moiety.data.molecule_keys import component_constitutions, constitution, scaffold
from moiety.data.sequence_words import clusters, contained
from moiety.data.shards import Corpus, verify, write_corpus
from moiety.data.splits import SPLITS
from moiety.data.structure import Structure
from moiety.data.texts import Text, TextCorpus
from moiety.data.validate import Verdict
from moiety.errors import InputError

SAMPLES = Path(__file__).parent / "data" / "corpora"
FULL_COUNTS = {"iupac": 143_671, "name": 57_246, "header": 20_426, "description": 467}
COUNT = 20  # records of a miniature


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("texts").module()


# the table


def made(tmp_path: Path, lines: list[dict], **change) -> Path:
    """A recipe of a text corpus that reads lines of JSON from the folder it is in."""
    data = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "notes.jsonl").write_text(data)
    content = {
        "name": "notes", "title": "Notes", "domain": "text", "licence": "CC0-1.0", "citation": "none",
        "sources": [{"registry": "url", "package": "notes", "version": "1", "file": "notes.jsonl"}],
        "reader": {"container": "jsonl", "fields": {
            "kind": {"constant": "caption"}, "text": {"from": "text"}, "key": {"from": "key", "optional": True},
            "value": {"from": "value", "optional": True},
        }},
        "splits": {"by": "hash", "of": "key.0"},
        "profiles": {"full": {}},
    } | change  # fmt: skip
    path = tmp_path / "notes.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_texts_come_back_as_they_went_in_and_their_columns_are_mapped(tmp_path: Path):
    lines = [{"text": f"text {i} é", "key": "C" * i, "value": i / 2} for i in range(COUNT)]
    manifest = build(made(tmp_path, lines), "full", tmp_path / "out", given=tmp_path)
    assert manifest["counts"] == {"in": COUNT, "ok": COUNT, "rejected": {}}
    assert manifest["kinds"] == {"caption": COUNT} and manifest["domains"] == {"text": COUNT}
    corpus = TextCorpus.open(tmp_path / "out")
    found = {text.id: text for text in corpus}
    for index, line in enumerate(lines):
        text = found[f"notes.jsonl/{index}"]
        assert (text.text, text.key, text.value, text.kind) == (*line.values(), "caption")
        assert text.corpus is None and text.structure is None and text.prompt == ""
    gc.collect()
    before = pa.total_allocated_bytes()
    again = TextCorpus.open(tmp_path / "out")
    assert again.table["text"].nbytes > 100 and pa.total_allocated_bytes() == before
    assert [text for split in manifest["splits"] for text in TextCorpus.open(tmp_path / "out", split)] == list(corpus)


def test_what_is_no_text_is_counted_and_listed(tmp_path: Path):
    lines = [{"text": "good"}, {"text": "  "}, {"key": "C"}, {"text": "bad", "value": "high"}]
    manifest = build(made(tmp_path, lines), "full", tmp_path / "out", given=tmp_path)
    assert manifest["counts"] == {"in": 4, "ok": 1, "rejected": {"bad-label": 1, "missing-field": 2}}
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["code"] for entry in listed] == ["missing-field", "missing-field", "bad-label"]
    assert verify(tmp_path / "out")["rejected"]["structures"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": {"constant": "a"}, "txt": {"from": "a"}}, "unknown key 'txt'; did you mean 'text'"),
        ({"kind": {"constant": "a"}}, "fields needs 'text'"),
        ({"kind": {"constant": "a"}, "text": {"form": "a"}}, "unknown key 'form'; did you mean 'from'"),
        ({"kind": {"constant": "a", "from": "b"}, "text": {"from": "a"}}, "either `from` or `constant`"),
        ({"kind": {"constant": "a"}, "text": {"from": "a"}, "key": {"from": "a", "hide": ["b"]}}, "unknown key 'hide'"),
    ],
)
def test_a_text_recipe_with_a_wrong_field_is_refused_by_name(tmp_path: Path, fields: dict, message: str):
    path = made(tmp_path, [], reader={"container": "jsonl", "fields": fields})
    with pytest.raises(InputError, match=message):
        declared_texts.check(load_recipe(path))


def test_texts_are_not_opened_as_structures_nor_structures_as_texts(tmp_path: Path):
    with pytest.raises(InputError, match="holds texts"):
        Corpus.open(SAMPLES / "texts")
    write_corpus([Structure(np.array([2]), np.zeros((1, 3)))], tmp_path / "helium")
    with pytest.raises(InputError, match="holds structures"):
        TextCorpus.open(tmp_path / "helium")


# molecules


def test_isomers_share_a_constitution_and_ions_do_not():
    assert constitution("C[C@H](N)C(=O)O") == constitution("OC(=O)[C@H](C)N") == "CC(N)C(=O)O"
    assert constitution("[2H]OC") == constitution("CO") and constitution("[H][H]") == "[H][H]"
    assert constitution("CC(=O)[O-]") != constitution("CC(=O)O")
    assert constitution("c1ccccc1C(") is None and constitution("CC(Cl)[Cl-]Cl") is None
    assert scaffold("CCc1ccc(O)cc1") == "c1ccccc1" and scaffold("CCO") == ""


def test_a_component_has_the_constitution_of_its_smiles():
    from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory

    acetate = [("C", "C", 0), ("O", "O", 0), ("OXT", "O", -1), ("CH3", "C", 0), ("H1", "H", 0), ("H2", "D", 0)]
    acetate.append(("H3", "H", 0))
    bonds = [("C", "O", "DOUB"), ("C", "OXT", "SING"), ("C", "CH3", "SING")]
    bonds += [("CH3", hydrogen, "SING") for hydrogen in ("H1", "H2", "H3")]
    atoms = [("ACT", *atom) for atom in acetate] + [("CL", "CL", "CL", -1)]
    names = ("comp_id", "atom_id", "type_symbol", "charge")
    tables = {
        "chem_comp_atom": {name: [atom[place] for atom in atoms] for place, name in enumerate(names)},
        "chem_comp_bond": {
            "comp_id": ["ACT"] * len(bonds),
            **{name: [bond[i] for bond in bonds] for i, name in enumerate(("atom_id_1", "atom_id_2", "value_order"))},
        },
    }
    block = BinaryCIFBlock({name: BinaryCIFCategory(columns) for name, columns in tables.items()})
    assert dict(component_constitutions(block, {"ACT", "CL"})) == {"ACT": constitution("CC(=O)[O-]"), "CL": "[Cl-]"}


def test_of_several_structures_of_a_key_the_strictest_split_counts(recipe: ModuleType):
    holders = {}
    for corpus, split in (("qm9", "train"), ("ccd", "val"), ("ccd", "train"), ("qm9", "val")):
        recipe.keep_strictest(holders, "CCO", recipe.Holder(corpus, f"{corpus}-{split}", split))
    assert holders["CCO"] == ("ccd", "ccd-val", "val")
    assert recipe.strictest(["train", "test", "val"]) == "test"


def test_an_iupac_name_goes_where_its_molecule_is_and_else_where_its_scaffold_is(recipe: ModuleType, monkeypatch):
    pairs = {"OCC": {"name_iupac": "ethanol"}, "CC(Cl)[Cl-]Cl": {"name_iupac": "none"}, "C": {"name_traditional": "m"}}
    pairs |= {f"c1ccccc1{'C' * n}": {"name_iupac": f"alkylbenzene {n}"} for n in range(1, 9)}
    packed = gzip.compress(json.dumps(pairs).encode())

    class Wheel:
        def read(self, name: str) -> bytes:
            assert name == recipe.PAIRS
            return packed

    found = list(recipe._iupac(Wheel(), {"CCO": recipe.Holder("qm9", "dsgdb9nsd_000014", "test")}))
    ethanol, *others = [item for item in found if isinstance(item, Text)]
    assert (ethanol.split, ethanol.corpus, ethanol.structure) == ("test", "qm9", "dsgdb9nsd_000014")
    assert len({text.split for text in others}) == 1 and {text.structure for text in others} == {None}
    assert [item.code for item in found if isinstance(item, Verdict)] == ["unreadable", "missing-field"]


# sequences


def protein(rng: np.random.Generator, size: int) -> str:
    return "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size))


def mutated(sequence: str, places: list[int]) -> str:
    letters = list(sequence)
    for place in places:
        letters[place] = "W" if letters[place] != "W" else "A"
    return "".join(letters)


def test_a_chain_is_found_in_a_sequence_at_90_percent_identity_over_80_percent_of_it():
    rng = np.random.default_rng(0)
    chain, flank = protein(rng, 100), protein(rng, 60)
    wholes = [
        flank + chain + flank,
        flank + mutated(chain, list(range(5, 100, 10))) + flank,  # 90 %
        mutated(chain, list(range(4, 100, 8))),  # 88 %
        flank + chain[15:],
        flank + chain[35:],  # 65 % of it
        protein(rng, 500),
    ]
    assert contained([protein(rng, 80), chain], wholes) == [(1, 0), (1, 1), (1, 3)]


def test_sequences_that_share_a_word_are_one_cluster_and_repeats_say_nothing():
    rng = np.random.default_rng(1)
    first, second, third = (protein(rng, 80) for _ in range(3))
    bridge = first[30:50] + protein(rng, 10) + second[10:30]
    labels = clusters([first, second, third, bridge, "Q" * 40 + third[:5], "Q" * 50, "TDRNFLRL", "TDRNFLRL"])
    assert labels[0] == labels[1] == labels[3] and labels[6] == labels[7]
    assert len({labels[2], labels[4], labels[5], labels[6], labels[0]}) == 5


# crystals


def test_rock_salt_is_described_by_its_symmetry_cell_and_neighbours():
    cell = 5.64 / 2 * (1 - np.eye(3))
    salt = Structure(np.array([11, 17]), np.array([[0, 0, 0], [2.82, 0, 0]]), cell=cell, pbc=np.ones(3, bool))
    salt.text = ["Halite"]
    assert formula(salt) == "NaCl"
    assert describe(salt) == (
        "NaCl (Halite) crystallizes in the cubic space group Fm-3m (225). The edges of the conventional cell are 5.64, "
        "5.64 and 5.64 Å, its angles 90.0, 90.0 and 90.0 degrees. Na is surrounded by 6 Cl at 2.82 Å. Cl is surrounded "
        "by 6 Na at 2.82 Å."
    )


def test_of_an_element_without_a_radius_symmetry_and_cell_are_told():
    californium = Structure(np.array([98]), np.zeros((1, 3)), cell=3 * np.eye(3), pbc=np.ones(3, bool))
    assert describe(californium).endswith("3.00 Å, its angles 90.0, 90.0 and 90.0 degrees.")


# the sample


def test_the_sample_holds_every_kind_and_no_key_in_two_splits():
    manifest = verify(SAMPLES / "texts")
    assert set(manifest["kinds"]) == set(FULL_COUNTS) and set(manifest["splits"]) == set(SPLITS)
    assert manifest["recipe_sha256"] == load_recipe("texts").fingerprint()
    splits = defaultdict(set)
    for text in TextCorpus.open(SAMPLES / "texts"):
        splits[text.key].add(text.split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("name", ["ccd", "crystals"])
def test_a_text_of_a_sampled_structure_is_in_its_split_or_a_stricter_one(name: str):
    structures = Corpus.open(SAMPLES / name)
    split_of = dict(zip(structures.ids(), structures.groups("split"), strict=True))
    texts = TextCorpus.open(SAMPLES / "texts")
    rows = {structure: rows for structure, rows in texts.rows_of(name).items() if structure in split_of}
    assert rows
    for structure, places in rows.items():
        for place in places:
            assert SPLITS.index(texts[place].split) >= SPLITS.index(split_of[structure])


# corpora in miniature, in the layout of the real files


def of_large(name: str, tmp_path: Path, files: dict[str, bytes]) -> list[Text]:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    manifest = build(name, "full", tmp_path / "out", workers=1, given=tmp_path)
    assert manifest["counts"]["in"] == manifest["counts"]["ok"]
    return sorted(TextCorpus.open(tmp_path / "out"), key=lambda text: text.id)


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_uniref_is_header_and_sequence(tmp_path: Path):
    rng = np.random.default_rng(0)
    entries = {
        f"UniRef50_A0A{i:07d} Protein {i} n={i + 1} Tax=Homo sapiens TaxID=9606 RepID=A0A{i:07d}_HUMAN": protein(
            rng, 90
        )
        for i in range(COUNT)
    }
    lines = "".join(f">{header}\n{letters[:60]}\n{letters[60:]}\n" for header, letters in entries.items())
    found = of_large("uniref50", tmp_path, {"uniref50.fasta.gz": gzip.compress(lines.encode())})
    assert {text.text: text.key for text in found} == entries
    assert {text.kind for text in found} == {"header"}


def test_an_instruction_keeps_its_question_its_input_and_its_published_split(tmp_path: Path):
    def task(name: str) -> str:
        return json.dumps(
            [
                {
                    "instruction": f"{name} {i}?", "input": "[C]" * (i + 1), "output": f"answer {i}",
                    "metadata": {"task": name, "split": "test" if i % 5 == 0 else "train"},
                }
                for i in range(COUNT)
            ]
        )  # fmt: skip

    folders = {"Molecule-oriented": "molecular_description_generation", "Protein-oriented": "protein_function"}
    files = {
        f"{folder}_Instructions.zip": zipped({f"{folder}_Instructions/{name}.json": task(name)})
        for folder, name in folders.items()
    }
    found = of_large("mol_instructions", tmp_path, files)
    assert len(found) == 2 * COUNT
    for text in found:
        i = int(text.text.removeprefix("answer "))
        assert text.key == "[C]" * (i + 1) and text.prompt.endswith(f" {i}?")
        assert text.split == ("test" if i % 5 == 0 else "train")


def test_a_caption_does_not_tell_the_name_of_its_molecule(tmp_path: Path):
    lines = [
        {"cid": i, "smiles": "C" * (i + 1) + "O", "iupac_name": f"{i}-methyl-(2R)-propanol", 
         "synonyms": ["Alcool", "Al"], "description": f"{i}-METHYL-(2R)-PROPANOL is a solvent. Alcool is Al."}
        for i in range(COUNT - 1)
    ] + [{"cid": 99, "smiles": "O", "description": "Water is wet."}]  # fmt: skip
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    *found, water = of_large_gated("pubchem3d_captions", tmp_path, data)
    assert len(found) == COUNT - 1
    for text in found:
        assert text.text == "the molecule is a solvent. the molecule is Al."
        assert text.key == "C" * (int(text.id.rsplit("/", 1)[1]) + 1) + "O" and text.kind == "caption"
    assert (water.text, water.key) == ("Water is wet.", "O")


def of_large_gated(name: str, tmp_path: Path, data: bytes) -> list[Text]:
    found = of_large(name, tmp_path, {"train.jsonl": data})
    return sorted(found, key=lambda text: int(text.id.rsplit("/", 1)[1]))


def test_captions_are_not_fetched(tmp_path: Path):
    with pytest.raises(InputError, match="gated: published as LMDBs of pickled dictionaries"):
        build("pubchem3d_captions", "full", tmp_path / "out")


def test_a_mutant_has_its_score_and_an_assay_one_split(tmp_path: Path):
    def assay(number: int) -> str:
        rows = [f"A{i + 1}C,{'A' * i}C{'A' * (COUNT - i)},{number + i / 8},{i % 2}" for i in range(COUNT)]
        return "\n".join(["mutant,mutated_sequence,DMS_score,DMS_score_bin", *rows]) + "\n"

    members = {f"DMS_ProteinGym_substitutions/P{n}_HUMAN_Author_2020.csv": assay(n) for n in range(30)}
    found = of_large("proteingym", tmp_path, {"DMS_ProteinGym_substitutions.zip": zipped(members)})
    splits = defaultdict(set)
    for text in found:
        *_, file, row = text.id.split("/")
        number, i = int(file.removeprefix("P").split("_")[0]), int(row)
        assert (text.text, text.value, text.kind) == (f"A{i + 1}C", number + i / 8, "mutant")
        assert text.key == "A" * i + "C" + "A" * (COUNT - i)
        splits[file].add(text.split)
    assert len(splits) == 30 and all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) != {"train"}


@pytest.mark.slow
def test_the_full_corpus_holds_what_the_documentation_says_and_leaks_nothing(tmp_path: Path):
    """Needs the network."""
    manifest = build("texts", "full", tmp_path / "texts")
    assert manifest["kinds"] == FULL_COUNTS
    splits: dict[str, set[str]] = defaultdict(set)
    table = TextCorpus.open(tmp_path / "texts").table
    for key, split in zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True):
        splits[hashlib.sha256(key.encode()).hexdigest()].add(split)
    assert all(len(found) == 1 for found in splits.values())
