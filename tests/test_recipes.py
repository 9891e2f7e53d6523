"""Recipes and downloads, without a network: registries are folders, archives are written here in their real formats."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from moiety.data import sequence_clusters
from moiety.data.build import Recipe, build, list_recipes, load_recipe
from moiety.data.download import Archive, Source, SourceUnavailable, cache_dir, fetch
from moiety.data.sequence_clusters import cluster
from moiety.data.shards import Corpus, verify
from moiety.data.splits import portion, select, shuffled
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import RESIDUE_ID, RESIDUES

SAMPLES = Path(__file__).parent / "data" / "corpora"
NAMES = (
    "ccd", "complexes", "crystals", "flows", "forces", "freesolv", "gfn1", "interactions", "isomers",
    "polarizabilities", "proteins", "qm9", "r2scan", "s22", "surfaces",
)  # fmt: skip
FULL_COUNTS = {
    "ccd": 46_730, "complexes": 28, "crystals": 6_062, "flows": 1_600, "forces": 3_411, "freesolv": 642, "gfn1": 48_992,
    "interactions": 1_520, "isomers": 13_767, "polarizabilities": 1_800, "proteins": 13_867, "qm9": 130_831,
    "r2scan": 10_562, "s22": 22, "surfaces": 1_307,
}  # fmt: skip
ONLY_TEST = ("complexes", "s22")
GROUP = {
    "crystals": "prototype", "flows": "field", "freesolv": "scaffold", "interactions": "pair", "isomers": "pair",
    "proteins": "cluster", "r2scan": "prototype", "surfaces": "metal",
}  # fmt: skip

QM9_HEADER = (
    "XYZ_file,Index,SMILES,InChi,N_atoms,Stoichiometry,Elements,XYZ_Ang,Mulliken_pop,Harmonic_Freq_cmi,RotA_GHz,"
    "RotB_GHz,RotC_GHz,Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,HOMO_LUMO_gap_au,R2_bohr2,ZPVE_au,"
    "InternalEnergy_0K_au,InternalEnergy_298K_au,Enthalphy_298K_au,GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K"
)


def qm9_row(index: int) -> str:
    name = f"dsgdb9nsd_{index:06d}.xyz"
    elements, xyz, charges = "['O','H','H']", "[[0.,0.,0.119],[0.,0.763,-0.477],[0.,-0.763,-0.477]]", "[-.5,.25,.25]"
    numbers = "1,2,3,1.8511,6.31,-0.2928,0.0687,0.3615,19.0002,0.021375,-76.4047,-76.4019,-76.4009,-76.4223,6.002"
    return f'"{name}",{index},"O","InChI",3,"[]","{elements}","{xyz}","{charges}","[1.]",{numbers}'


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))
    return folder


def wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Source:
    """Writes a wheel that pip accepts, and returns the source that pins it."""
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | metadata).items():
            archive.writestr(name, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source("pypi", package, version, path.name, digest, path.stat().st_size)


def recipe_with(tmp_path: Path, name: str, sources: list[dict]) -> Path:
    """A copy of a recipe whose sources are other files of the same format."""
    original = load_recipe(name).path
    content = yaml.safe_load(original.read_text()) | {"sources": sources}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    shutil.copy(original.with_suffix(".py"), path.with_suffix(".py"))
    return path


def as_entry(source: Source, *members: str) -> dict:
    keys = ("registry", "package", "version", "file", "sha256", "size", "use")
    return {key: getattr(source, key) for key in keys} | {"member": list(members)}


def archive_of(path: Path, package: str = "thing") -> Archive:
    return Archive(path, Source("pypi", package, "1", path.name), "1", "")


# recipes


def test_every_recipe_has_a_licence_a_citation_a_checksum_and_the_three_profiles():
    recipes = list_recipes()
    assert {recipe.name for recipe in recipes} == {*NAMES, "english", "texts"}
    for recipe in recipes:
        assert recipe.licence and recipe.citation and recipe.splits
        assert set(recipe.profiles) == {"sample", "tiny", "full"}
        assert all(len(source.sha256) == 64 and source.size > 0 for source in recipe.sources)
        assert callable(getattr(recipe.module(), "texts" if recipe.is_text else "structures"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "CC0"}, "unknown key 'licens'; did you mean 'licence'"),
        ({"sources": [{"registry": "pypi", "package": "a", "version": "1", "sha": "0"}]}, "unknown key 'sha'"),
        ({"sources": [{"registry": "pypi", "package": "a", "version": 1.10}]}, "put it in quotes"),
        ({"profiles": ["tiny"]}, "profiles a mapping"),
        ({"sources": [{"registry": "hub", "package": "a", "version": "1"}]}, "registry is 'hub'; use one of pypi"),
    ],
)
def test_a_recipe_with_a_wrong_key_is_refused_by_name(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "qm9.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(load_recipe("qm9").path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_an_unknown_recipe_or_profile_names_those_there_are():
    with pytest.raises(InputError, match="did you mean 'qm9'"):
        load_recipe("qm8")
    with pytest.raises(InputError, match="it has sample, tiny, full"):
        build("qm9", "huge")


# downloads


def test_a_download_is_checked_cached_and_not_repeated(registry: Path):
    source = wheel(registry, "thing", "1.0", {"thing/data.csv": b"a,b\n"})
    archive = fetch(source)
    assert archive.path.parent == cache_dir() / "artifacts" / "pypi"
    assert archive.read("thing/*.csv") == b"a,b\n"
    (registry / source.file).unlink()
    assert fetch(source).record()["sha256"] == source.sha256


def test_an_interrupted_download_starts_again_and_is_never_half_read(registry: Path):
    source = wheel(registry, "thing", "1.0", {"thing/data.csv": b"a,b\n"})
    stale = cache_dir() / "artifacts" / "pypi" / ".partial-thing-killed"
    stale.mkdir(parents=True)
    (stale / source.file).write_bytes((registry / source.file).read_bytes()[:100])
    assert fetch(source).read("thing/data.csv") == b"a,b\n"
    assert not stale.exists()


def test_a_checksum_mismatch_deletes_that_file_names_it_and_touches_nothing_else(registry: Path):
    source = wheel(registry, "thing", "1.0", {"thing/data.csv": b"a,b\n"})
    neighbour = wheel(registry, "other", "1.0", {"other/data.csv": b"c\n"})
    path, kept = fetch(source).path, fetch(neighbour).path
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name}: sha256 .* expected {source.sha256}; the file was deleted"):
        fetch(source)
    assert not path.exists() and kept.exists()
    assert fetch(source).sha256 == source.sha256


def test_a_registry_that_delivers_another_file_leaves_nothing_in_the_cache(registry: Path):
    source = wheel(registry, "thing", "1.0", {"thing/data.csv": b"a,b\n"})
    with pytest.raises(InputError, match="another sha256"):
        fetch(replace(source, sha256="0" * 64))
    assert not list(cache_dir().rglob("*.whl"))


def test_a_package_the_registry_does_not_have_is_named_with_the_remedy(registry: Path):
    with pytest.raises(SourceUnavailable, match=r"thing==9.*check the network, or put"):
        fetch(Source("pypi", "thing", "9", "thing-9-py3-none-any.whl"))


def test_unsafe_members_are_refused(tmp_path: Path):
    path = tmp_path / "thing-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("thing/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"thing/link\.txt is a link"):
        list(archive_of(path).members())
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside.txt"))
    with pytest.raises(InputError, match=r"unsafe member name '\.\./outside\.txt'"):
        list(archive_of(path).members())


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_member_of_a_debian_package_is_streamed(tmp_path: Path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "data.bin").write_bytes(b"0123456789")
    path = tmp_path / "thing_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(path)], check=True, capture_output=True)
    with archive_of(path).open("usr/data.bin") as stream:
        assert stream.read(4) == b"0123"


# readers


def test_qm9_is_built_from_the_tables_of_its_wheel(registry: Path, tmp_path: Path):
    rows = "\n".join([QM9_HEADER, *(qm9_row(index) for index in range(1, 31))]) + "\n"
    source = wheel(registry, "qm9pack", "1.0.3", {"qm9pack/data/qm9_part1.csv": rows.encode()})
    recipe = recipe_with(tmp_path, "qm9", [as_entry(source, "qm9pack/data/*.csv")])
    manifest = build(recipe, "full", tmp_path / "out")
    assert manifest["counts"] == {"in": 30, "ok": 30, "rejected": {}}
    assert manifest["sources"][0]["sha256"] == source.sha256
    assert build(recipe, "full", tmp_path / "few", limit=10)["splits"] == {"train": 8}  # the first 110,000 are training
    water = Corpus.open(tmp_path / "out")[0]
    assert water.node_type.tolist() == [8, 1, 1]
    assert water.positions[1] == pytest.approx([0, 0.763, -0.477])
    assert water.scalars["gap"] == pytest.approx(0.3615 * 27.211386245988)
    assert water.scalars["dipole"] == 1.8511
    assert water.energy == pytest.approx(water.scalars["u0"] - water.scalars["zpve"])
    assert water.node_scalars["mulliken"].tolist() == [-0.5, 0.25, 0.25]


def test_ccd_prefers_the_ideal_pose_splits_by_date_and_drops_what_is_obsolete(tmp_path: Path):
    from biotite.structure.io.pdbx import (
        BinaryCIFBlock,
        BinaryCIFCategory,
        BinaryCIFColumn,
        BinaryCIFData,
        BinaryCIFFile,
    )

    components = {  # id: status, date, x of the ideal pose, x of the model pose
        "OLD": ("OBS", "2001-01-01", 1.0, 2.0),
        "IDL": ("REL", "2022-12-31", 1.0, 2.0),
        "MOD": ("REL", "2023-01-01", None, 2.0),
        "NON": ("REL", "2024-01-01", None, None),
        "NEW": ("REL", "2024-01-01", 1.0, None),
    }

    def coordinates(place: int) -> BinaryCIFColumn:
        """Two atoms a component, the second at the origin; a missing pose is masked, as in the real file."""
        poses = [row[place] for row in components.values()]
        values = np.array([[pose or 0.0, 0.0] for pose in poses]).reshape(-1)
        missing = np.array([[pose is None] * 2 for pose in poses]).reshape(-1)
        return BinaryCIFColumn(BinaryCIFData(values), BinaryCIFData(np.where(missing, 2, 0).astype(np.uint8)))

    tables = {
        "chem_comp": {
            "id": list(components),
            "name": ["carbon\nmonoxide"] * 5,
            "pdbx_synonyms": ["CO; carbonyl", "?", "?", "?", "?"],
            "pdbx_initial_date": [row[1] for row in components.values()],
            "pdbx_release_status": [row[0] for row in components.values()],
        },
        "chem_comp_atom": {
            "comp_id": [name for name in components for _ in range(2)],
            "type_symbol": ["CL", "O"] * 5,
            "charge": [1, 0] * 5,
            **{f"pdbx_model_Cartn_{axis}_ideal": coordinates(2) for axis in "xyz"},
            **{f"model_Cartn_{axis}": coordinates(3) for axis in "xyz"},
        },
    }
    block = BinaryCIFBlock({name: BinaryCIFCategory(columns) for name, columns in tables.items()})
    buffer = io.BytesIO()
    BinaryCIFFile({"components": block}).write(buffer)
    path = tmp_path / "biotite.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("biotite/structure/info/components.bcif", buffer.getvalue())
    found = {s.id: s for s in load_recipe("ccd").module().structures({"biotite": archive_of(path)}, {})}
    assert {name: (s.groups["pose"], s.groups["split"]) for name, s in found.items()} == {
        "IDL": ("ideal", "train"),
        "MOD": ("model", "val"),
        "NEW": ("ideal", "test"),
    }
    assert found["IDL"].node_type.tolist() == [17, 8]
    assert (found["IDL"].charge, found["IDL"].spin) == (1, 1)
    assert found["IDL"].text == ["carbon monoxide"]


def test_the_structure_database_is_read_byte_by_byte():
    size, spare = 40, 3
    stored = np.random.default_rng(0).integers(0, 5000, (size + spare, 4, 3)).astype("<u2")
    letters = "".join("ARNDCQEGHILKMFPSTWYV"[i % 20] for i in range(size - 1)) + "X" + "AAA"
    entries = [("1ABC", "A", 0, size, -5), ("2SHO", "B", size, spare, 1)]
    data = bytes(0x4D) + struct.pack("<Q", len(entries))
    for pdb_id, chain, offset, length, first in entries:
        data += struct.pack("<I4sI1s", 4, pdb_id.encode(), 1, chain.encode())
        data += struct.pack("<IHh3f", offset, length, first, 1.0, 2.0, 3.0)
    data += struct.pack("<Q", len(letters)) + letters.encode() + struct.pack("<Q", len(letters)) + stored.tobytes()
    (chain,) = load_recipe("proteins").module().read_database(io.BytesIO(data + b"what follows is not read"))
    assert chain.id == "1ABC_A" and chain.num_nodes == size
    assert chain.positions == pytest.approx(stored[:size, 1] * 0.01)
    assert chain.node_vectors is not None and chain.residue_index is not None
    assert chain.node_vectors[:, 2] == pytest.approx((stored[:size, 3].astype(float) - stored[:size, 1]) * 0.01)
    assert chain.node_type[[0, -1]].tolist() == [RESIDUE_ID["ALA"], RESIDUE_ID["UNK"]]
    assert chain.residue_index[0] == -5
    with pytest.raises(InputError, match="ends 100 bytes early"):
        list(load_recipe("proteins").module().read_database(io.BytesIO(data[:-100])))


def pdb_text(chain: Structure) -> str:
    assert chain.node_vectors is not None
    lines = []
    for residue, (ca, vectors) in enumerate(zip(chain.positions, chain.node_vectors, strict=True)):
        name = RESIDUES[chain.node_type[residue] - RESIDUE_ID["ALA"]]
        for atom, xyz in (("N", ca + vectors[0]), ("CA", ca), ("C", ca + vectors[1]), ("O", ca + vectors[2])):
            x, y, z = xyz
            lines.append(
                f"ATOM  {len(lines) + 1:5d}  {atom:<3s} {name} A{residue + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
                f"  1.00  0.00           {atom[0]}"
            )
    return "\n".join([*lines, "END", ""])


def test_without_apt_proteins_fall_back_to_files_in_pypi_archives_and_say_so(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get here
    chains = list(Corpus.open(SAMPLES / "proteins"))[:6]
    members = {f"biopython/Tests/{chain.id}.pdb": pdb_text(chain).encode() for chain in chains}
    members |= {"biopython/Tests/copy.pdb": pdb_text(chains[0]).encode(), "biopython/Tests/broken.pdb": b"\xff\xfe"}
    fallback = replace(wheel(registry, "biopython", "1", members), use="fallback")
    debian = {"registry": "debian", "package": "promod3-data", "version": "1", "use": "optional"}
    recipe = recipe_with(tmp_path, "proteins", [debian, as_entry(fallback, "biopython/Tests/*")])
    manifest = build(recipe, "full", tmp_path / "out")
    assert manifest["counts"]["ok"] == len(chains)
    assert manifest["notes"][0].startswith("built without promod3-data: promod3-data: this machine has no apt-get")
    assert "biopython stand in for it" in capsys.readouterr().err
    read = {s.id.removeprefix("biopython:").removesuffix("_A"): s for s in Corpus.open(tmp_path / "out")}
    for chain in chains:
        assert np.array_equal(read[chain.id].node_type, chain.node_type)
        assert np.abs(read[chain.id].positions - chain.positions).max() < 1e-3
        assert np.abs(read[chain.id].node_vectors - chain.node_vectors).max() < 5e-3


def test_an_ncmat_file_is_a_crystal_only_if_it_has_positions():
    module = load_recipe("crystals").module()
    cell = "@CELL\n lengths 3.11 !! 4.98\n angles 90 90 120\n"
    text = f"NCMAT v5\n#AlN\n{cell}@ATOMPOSITIONS\n Al 2/3 1/3 0\n D 0 0 .5 # x\n"
    crystal = module._ncmat("AlN_sg186_Nitride", text)
    assert crystal.node_type.tolist() == [13, 1] and crystal.text == ["Nitride"]
    assert np.linalg.norm(crystal.cell, axis=1) == pytest.approx([3.11, 3.11, 4.98])
    assert crystal.positions[1] == pytest.approx([0, 0, 2.49])
    assert module._ncmat("gas", "NCMAT v5\n@DENSITY\n 1 kg_per_m3\n") is None


def test_a_substituted_crystal_keeps_angles_and_fractions_and_scales_with_the_radii():
    from ase.data import covalent_radii

    module = load_recipe("crystals").module()
    salt = module._crystal("salt", [11, 17], [[0, 0, 0], [2.82, 0, 0]], 5.64 * (1 - np.eye(3)) / 2, [])
    module.classify(salt)
    assert salt.groups["prototype"] == "AB_cF8_225_a_b"
    variants = list(module.substituted(salt, 5))
    assert len(variants) == 5 and all(set(v.node_type) != {11, 17} for v in variants)
    for variant in variants:
        ratio = (covalent_radii[variant.node_type] ** 3).sum() / (covalent_radii[[11, 17]] ** 3).sum()
        assert np.linalg.det(variant.cell) == pytest.approx(ratio * np.linalg.det(salt.cell))
        assert variant.positions @ np.linalg.inv(variant.cell) == pytest.approx(
            salt.positions @ np.linalg.inv(salt.cell), abs=1e-12
        )
        assert variant.groups["prototype"] == salt.groups["prototype"]
    assert [v.id for v in variants] == [v.id for v in module.substituted(salt, 5)]


# splits and clusters


def test_the_permutation_is_fixed_for_ever():
    assert shuffled([f"dsgdb9nsd_{index:06d}.xyz" for index in range(1, 9)], "qm9") == [5, 6, 0, 2, 1, 7, 4, 3]
    assert select(["train", "val", "train", "test", "train"], {"train": 2, "val": 0}) == [0, 2, 3]


def test_portions_are_the_whole_in_its_order():
    for size in (0, 1, 7, 12):
        parts = [portion(range(size), part, 4) for part in range(4)]
        assert [item for part in parts for item in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_relatives_whose_stretches_are_too_short_without_gaps_share_a_cluster(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    chains = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 120)) for _ in range(60)]
    gapped = "".join(chains[0][start : start + 6] for start in range(0, 120, 7))  # every seventh residue is gone
    assert cluster([*chains, gapped]).tolist() == [*range(60), 0]
    monkeypatch.setattr(sequence_clusters, "GAPPED_E_VALUE", 1e-99)
    assert cluster([*chains, gapped]).tolist() == [*range(60), 60]


def test_relatives_share_a_cluster_and_strangers_do_not():
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    strangers = rng.choice(letters, (20, 120))
    relatives = strangers.copy()
    mutated = rng.random(relatives.shape) < 0.45
    relatives[mutated] = rng.choice(letters, mutated.sum())
    shifted = ["".join(row[5:]) for row in relatives]
    labels = cluster(["".join(row) for row in strangers] + shifted)
    assert labels[:20].tolist() == list(range(20))
    assert labels[20:].tolist() == list(range(20))


# the samples in tests/data


@pytest.mark.parametrize("name", NAMES)
def test_the_samples_are_whole_and_their_splits_disjoint(name: str):
    manifest = verify(SAMPLES / name)
    assert set(manifest["splits"]) == ({"test"} if name in ONLY_TEST else {"train", "val", "test"})
    assert manifest["licence"] and manifest["citation"] and manifest["counts"]["rejected"] == {}
    parts = [Corpus.open(SAMPLES / name, split) for split in manifest["splits"]]
    keys = [set(part.groups(GROUP[name]) if name in GROUP else part.ids()) for part in parts]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_residues_of_the_sample_have_protein_geometry():
    for chain in Corpus.open(SAMPLES / "proteins"):
        assert chain.node_vectors is not None and 40 <= chain.num_nodes <= 256
        lengths = np.linalg.norm(chain.node_vectors, axis=-1)  # N, C, O, CB from CA
        assert np.median(lengths, axis=0) == pytest.approx([1.46, 1.52, 2.40, 1.53], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_full_corpora_hold_what_the_documentation_says(name: str, tmp_path: Path):
    """Needs the network."""
    assert build(name, "full", tmp_path / name)["counts"]["ok"] == FULL_COUNTS[name]


def test_a_recipe_is_identified_by_its_content():
    recipe = load_recipe("qm9")
    assert isinstance(recipe, Recipe) and recipe.fingerprint() == load_recipe(recipe.path).fingerprint()
