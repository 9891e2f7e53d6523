"""Files become structures or verdicts; nothing that a file holds raises, prints, or passes for something it is not."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moiety.data.readers import read_one, read_structures, structure_files
from moiety.data.structure import Structure
from moiety.data.validate import MAX_NODES, REMEDIES, check, verdicts
from moiety.errors import InputError
from moiety.models.vocabulary_moiety import ROLE_ID

FILES = Path(__file__).parent / "data" / "files"
EXPECTED = {  # file -> code of each structure
    "ca_only.pdb": ["no-usable-residues"],
    "empty.xyz": ["empty-file"],
    "flat.sdf": ["flat-2d"],
    "garbage.xyz": ["binary-garbage"],
    "good.extxyz": ["ok", "ok"],
    "halite.cif": ["ok"],
    "left_handed.extxyz": ["ok"],
    "nan.xyz": ["not-finite"],
    "no_atoms.cif": ["no-atoms"],
    "no_atoms.xyz": ["no-atoms"],
    "one_bad_frame.extxyz": ["ok", "overlap", "ok"],
    "overlap.xyz": ["overlap"],
    "partial_occupancy.cif": ["partial-occupancy"],
    "pbc_without_cell.extxyz": ["pbc-without-cell"],
    "peptide.cif": ["ok"],
    "peptide.pdb": ["ok"],
    "singular_cell.extxyz": ["singular-cell"],
    "tiny_cell.extxyz": ["tiny-cell"],
    "truncated.cif": ["truncated"],
    "truncated.pdb": ["truncated"],
    "truncated.sdf": ["truncated"],
    "truncated.xyz": ["truncated"],
    "two.sdf": ["ok", "ok"],
    "two_models.pdb": ["ok"],
    "unknown_element.xyz": ["unknown-element"],
    "unknown_format.foo": ["unknown-format"],
    "water.xyz": ["ok"],
    "wrong_counts.sdf": ["wrong-counts"],
    "wrong_counts.xyz": ["wrong-counts"],
}


def codes(path: Path) -> list[str]:
    return [verdict.code for verdict in verdicts(path)]


@pytest.mark.parametrize("name", sorted(p.name for p in FILES.iterdir()))
def test_every_file_gets_its_verdicts_and_no_library_says_a_word(name, capfd):
    found = list(verdicts(FILES / name))
    assert [verdict.code for verdict in found] == EXPECTED[name]
    assert [verdict.index for verdict in found] == list(range(len(found)))
    for verdict in found:
        assert verdict.file == str(FILES / name)
        assert verdict.ok == (verdict.structure is not None) == (verdict.code == "ok")
        assert verdict.ok or (verdict.reason and verdict.remedy == REMEDIES[verdict.code])
    assert capfd.readouterr() == ("", "")


def test_extxyz_keeps_labels_cell_and_scalars():
    crystal, water = read_structures(FILES / "good.extxyz")
    assert (crystal.domain, crystal.energy, crystal.scalars) == ("crystal", -12.5, {"gap": 3.25})
    assert np.array_equal(crystal.cell, 3.9 * np.eye(3))
    assert crystal.forces[:, 0].tolist() == [0.1, -0.1]
    assert np.array_equal(crystal.stress, np.diag([0.1, 0.2, 0.3]))
    assert (water.domain, water.cell, water.id, water.source) == ("molecule", None, "good.extxyz#1", "good.extxyz")


def test_the_symmetry_of_a_cif_is_expanded_as_by_ase_and_pymatgen(tmp_path):
    from ase.io import read
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal
    from pymatgen.io.cif import CifWriter

    rutile = Crystal.from_spacegroup(
        "P4_2/mnm", Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
    )
    for symprec in (None, 0.01):
        path = tmp_path / f"rutile{symprec}.cif"
        path.write_text(str(CifWriter(rutile, symprec=symprec)))
        ours, ase = read_one(path), read(path)
        assert Counter(ours.node_type.tolist()) == {22: 2, 8: 4} == Counter(ase.numbers.tolist())
        assert np.linalg.det(ours.cell) == pytest.approx(rutile.volume)
        shift = (ours.positions[:, None] - ase.positions) @ np.linalg.inv(ours.cell)
        distance = np.linalg.norm((shift - shift.round()) @ ours.cell, axis=-1)
        assert distance.min(axis=1).max() < 1e-6


def test_pdb_and_mmcif_of_one_peptide_are_the_same_structure():
    a, b = read_one(FILES / "peptide.pdb"), read_one(FILES / "peptide.cif")
    assert np.array_equal(a.node_type, b.node_type)
    assert np.abs(a.positions - b.positions).max() < 1e-6
    assert np.abs(a.node_vectors - b.node_vectors).max() < 1e-6
    assert a.domain == b.domain == "complex"
    assert a.role.tolist() == 5 * [ROLE_ID["protein"]] + 2 * [ROLE_ID["ligand"]]
    assert np.abs(np.linalg.norm(a.node_vectors[:5, :2], axis=-1) - 1.5).max() < 0.1  # N-CA and CA-C bonds
    assert not a.node_vectors[5:].any()


def test_all_atom_reads_every_atom_but_water():
    everything = read_one(FILES / "peptide.pdb", all_atom=True)
    text = (FILES / "peptide.pdb").read_text()
    num_atoms = sum(line.startswith(("ATOM", "HETATM")) and "HOH" not in line for line in text.splitlines())
    assert everything.num_nodes == num_atoms
    assert not everything.is_residue.any()


def test_the_first_model_and_the_first_alternative_location_are_read(tmp_path):
    assert read_one(FILES / "two_models.pdb").num_nodes == 5
    lines = [line for line in (FILES / "peptide.pdb").read_text().splitlines() if line.startswith("ATOM")]
    two = [line[:16] + alt + line[17:54] + "  0.50" + line[60:] for line in lines for alt in "AB"]
    two = [line if line[16] == "A" else f"{line[:30]}{float(line[30:38]) + 0.4:8.3f}{line[38:]}" for line in two]
    path = tmp_path / "altloc.pdb"
    path.write_text("\n".join([*two, "END", ""]))
    assert np.array_equal(read_one(path).positions, read_one(FILES / "two_models.pdb").positions)


def test_a_residue_without_a_number_is_refused_not_dropped(tmp_path):
    path = tmp_path / "nan.pdb"
    path.write_text((FILES / "peptide.pdb").read_text().replace(ca_x(), "     nan", 1))
    assert codes(path) == ["not-finite"]


def ca_x() -> str:
    """The x column of the first CA of the peptide."""
    return next(line[30:38] for line in (FILES / "peptide.pdb").read_text().splitlines() if line[12:16] == " CA ")


def test_v3000_charges_and_property_fields_of_an_sdf_are_kept():
    ethanol, ammonium = read_structures(FILES / "two.sdf")
    assert (ethanol.scalars, ethanol.text) == ({"logp": -0.31}, ["ethanol"])
    assert (ammonium.charge, ammonium.text) == (1, ["methylammonium"])
    assert (ammonium.node_type == 1).sum() == 6  # hydrogens stay


def test_line_ends_encodings_and_compression_do_not_matter(tmp_path):
    text = (FILES / "water.xyz").read_text()
    variants = {
        "crlf.xyz": text.replace("\n", "\r\n").encode(),
        "utf16.xyz": text.encode("utf-16"),
        "bom.xyz": text.encode("utf-8-sig"),
        "latin.xyz": text.replace("water", "Ångström").encode("latin-1"),
        "packed.xyz.gz": gzip.compress(text.encode()),
    }
    for name, data in variants.items():
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(read_one(tmp_path / name).positions, read_one(FILES / "water.xyz").positions), name
    (tmp_path / "cut.xyz.gz").write_bytes(variants["packed.xyz.gz"][:-12])
    assert codes(tmp_path / "cut.xyz.gz") == ["truncated"]
    (tmp_path / "no.xyz.gz").write_text("not compressed at all")
    assert codes(tmp_path / "no.xyz.gz") == ["binary-garbage"]
    assert codes(tmp_path / "absent.xyz") == ["no-file"]


def test_damaged_files_give_verdicts_and_never_exceptions(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("good.extxyz", "halite.cif", "peptide.cif", "peptide.pdb", "two.sdf"):
        original = (FILES / name).read_bytes()
        for trial in range(40):
            data = bytearray(original[: rng.integers(1, len(original))] if trial % 2 else original)
            for place in rng.integers(0, len(data), 6):
                data[place] = rng.integers(32, 127)
            path = tmp_path / name
            path.write_bytes(data)
            assert list(verdicts(path)), (name, trial)


def test_reading_stops_at_the_first_bad_structure_with_its_place_and_remedy():
    with pytest.raises(InputError, match=r"one_bad_frame\.extxyz, structure 1: .*overlap.*remove duplicates"):
        list(read_structures(FILES / "one_bad_frame.extxyz"))
    with pytest.raises(InputError, match="holds 2 structures"):
        read_one(FILES / "two.sdf")


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    for name in ("b.xyz", "a.xyz", ".hidden.xyz"):
        (tmp_path / name).write_text("1\n\nH 0 0 0\n")
    assert [path.name for path in structure_files([tmp_path])] == ["a.xyz", "b.xyz"]
    with pytest.raises(InputError, match="no such file"):
        structure_files([tmp_path / "absent"])


def copper(**changes) -> Structure:
    cell, pbc = 2.6 * np.eye(3), np.ones(3, dtype=bool)
    return Structure(
        **{"node_type": [29], "positions": [[0, 0, 0]], "domain": "crystal", "cell": cell, "pbc": pbc, **changes}
    )


def line_of(kind: int, distance: float, count: int = 2) -> Structure:
    positions = np.zeros((count, 3))
    positions[:, 0] = distance * np.arange(count)
    return Structure(np.full(count, kind), positions)


WRONG = {
    "no-atoms": Structure([], np.zeros((0, 3))),
    "too-many-nodes": Structure(np.ones(MAX_NODES + 1), np.zeros((MAX_NODES + 1, 3))),
    "unknown-domain": Structure([1], [[0, 0, 0]], domain="plasma"),
    "unknown-element": Structure([0], [[0, 0, 0]]),
    "not-finite": Structure([1], [[0, 0, np.inf]]),
    "wrong-shape": Structure([1, 1], [[0, 0, 0]]),
    "bad-label": Structure([1], [[0, 0, 0]], energy=float("nan")),
    "cell-not-finite": copper(cell=np.diag([2.6, 2.6, np.nan])),
    "pbc-without-cell": copper(cell=None),
    "singular-cell": copper(cell=np.diag([2.6, 2.6, 0.0])),
    "tiny-cell": copper(cell=np.array([[3.0, 0, 0], [100.0, 0.4, 0], [0, 0, 3.0]])),
    "huge-cell": copper(cell=np.diag([3.0, 2000.0, 2000.0])),
    "too-spread-out": line_of(6, 1e4),
}


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_record_is_named(code):
    problem = check(WRONG[code])
    assert problem is not None
    assert problem[0] == code
    assert problem[1]
    assert problem[2] == REMEDIES[code]


@pytest.mark.parametrize("count", [2, 200])
def test_overlaps_are_found_at_every_size_and_only_there(count):
    assert check(line_of(1, 0.25, count))[0] == "overlap"
    assert check(line_of(1, 0.74, count)) is None
    assert check(line_of(120, 0.8, count))[0] == "overlap"  # two residues
    assert check(line_of(120, 3.8, count)) is None


def test_overlaps_with_periodic_images_are_found():
    assert check(copper()) is None
    assert check(copper(node_type=[29, 29], positions=[[0, 0, 0], [2.5, 2.5, 2.6 * 3 - 0.1]]))[0] == "overlap"
    assert check(copper(node_type=[29, 29], positions=[[0, 0, 0], [1.3, 1.3, 1.3]])) is None


def test_left_handed_cells_and_slabs_without_a_third_vector_are_fine():
    left = copper(cell=np.diag([2.6, 2.6, -2.6]))
    slab = copper(cell=np.diag([2.6, 2.6, 0.0]), pbc=np.array([True, True, False]))
    assert check(left) is None
    assert check(slab) is None
