"""Every kind of bad file has its verdict, odd ones are usable and say so; traps neither run, hang nor fill memory."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from moiety.cli import main
from moiety.data.containers import KINDS, hdf5
from moiety.data.readers import CIF, PDB, SDF, XYZ, read_one
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.validate import REMEDIES, check, verdicts, wrong_unit

FOLDER = Path(__file__).parent / "data" / "verdicts"
CORPORA = Path(__file__).parent / "data" / "corpora"
PEPTIDE = (Path(__file__).parent / "data" / "files" / "peptide.pdb").read_text()
HALITE = (Path(__file__).parent / "data" / "files" / "halite.cif").read_text()
EXPECTED = yaml.safe_load((FOLDER / "expected.yaml").read_text())
WATER = "3\nwater\nO 0 0 0.119262\nH 0 0.763239 -0.477047\nH 0 -0.763239 -0.477047\n"


def codes(path: Path) -> list[str]:
    return [verdict.code for verdict in verdicts(path)]


def run(*argv: object) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_every_file_is_expected_and_there_are_enough():
    assert set(EXPECTED) == {path.name for path in FOLDER.iterdir()} - {"expected.yaml"}
    assert len(EXPECTED) >= 65
    told = {code for entry in EXPECTED.values() for code in entry["codes"]}
    assert told <= set(REMEDIES) | {"ok"}
    assert len(told) >= 20


WITHOUT_FILE = {"no-file", "not-a-file", "unknown-domain", "missing-field", "not-in-split", "duplicate-id"}
WITHOUT_FILE |= {"no-conformer"}  # of a table of SMILES


def test_the_page_says_of_every_code_what_the_table_says_and_shows_a_file_that_gets_it():
    page = (Path(__file__).parents[1] / "docs" / "validation.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.split("\n") if line.startswith("| `")]
    assert {code.strip("`"): remedy for code, _, remedy, _ in rows} == REMEDIES
    assert [code.strip("`") for code, *_ in rows] == list(REMEDIES)
    shown = {code.strip("`"): example.strip("`") for code, _, _, example in rows if example.strip("`") in EXPECTED}
    assert set(REMEDIES) - set(shown) == WITHOUT_FILE
    assert all(code in EXPECTED[example]["codes"] for code, example in shown.items())


def test_the_page_shows_what_check_prints(monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "validation.md").read_text()
    command, *lines = page.split("$ moiety ")[1].split("\n```")[0].split("\n")
    monkeypatch.chdir(FOLDER)
    assert run(*command.split()) == 2
    out, err = capsys.readouterr()
    assert (out + err).rstrip("\n").split("\n") == lines


@pytest.mark.parametrize("name", EXPECTED)
def test_every_file_gets_its_verdicts_and_notes(name, capfd):
    expected = EXPECTED[name]
    found = list(verdicts(FOLDER / name))
    assert [verdict.code for verdict in found] == expected["codes"], [verdict.reason for verdict in found]
    notes = [note for verdict in found for note in verdict.notes]
    assert len(notes) == len(expected.get("notes", []))
    for wanted, note in zip(expected.get("notes", []), notes, strict=True):
        assert wanted in note
    assert all(verdict.ok or (verdict.reason and not verdict.notes) for verdict in found)
    assert capfd.readouterr() == ("", "")


def test_good_files_have_the_content_they_should():
    molecule = next(s for s in Corpus.open(CORPORA / "qm9") if s.id in (FOLDER / "qm9.xyz").read_text())
    assert np.abs(read_one(FOLDER / "qm9.xyz").positions - molecule.positions).max() < 1e-6
    assert read_one(FOLDER / "heavy_water.xyz").node_type.tolist() == [8, 1, 1]
    assert read_one(FOLDER / "atomic_numbers.xyz").node_type.tolist() == [6, 8]
    assert read_one(FOLDER / "charged.mol").charge == 1
    assert read_one(FOLDER / "negative_numbers.pdb").residue_index.tolist() == [-3, -2, -1, 0, 1]
    assert read_one(FOLDER / "selenomethionine.pdb").num_nodes == 5
    assert read_one(FOLDER / "cell_without_pbc.extxyz").cell is None
    assert read_one(FOLDER / "no_symmetry.cif").num_nodes == 2
    assert read_one(FOLDER / "uncertainties.cif").cell[0, 0] == pytest.approx(5.6402)
    whole = read_one(FOLDER / "hybrid36.pdb")
    for name in ("altloc.pdb", "models.pdb", "no_elements.pdb", "duplicate_atoms.pdb", "crlf.pdb"):
        assert np.array_equal(read_one(FOLDER / name).positions, whole.positions), name


def test_real_structures_are_not_taken_for_another_unit_and_scaled_ones_are():
    told = {"bohr": 0, "nm": 0, "pm": 0}
    total = 0
    for name in ("qm9", "ccd"):
        for structure in Corpus.open(CORPORA / name):
            if structure.num_nodes < 3:
                continue
            assert wrong_unit(structure) is None, structure.id
            total += 1
            for unit, factor in (("bohr", 1 / 0.529177), ("nm", 0.1), ("pm", 100.0)):
                scaled = Structure(structure.node_type, structure.positions * factor)
                problem = wrong_unit(scaled)
                told[unit] += problem is not None and f"in {unit}" in problem[1]
    assert min(told.values()) >= 0.99 * total


def test_check_prints_notes_counts_and_no_command_to_the_terminal(tmp_path, capsys):
    trap = tmp_path / "a\nb \x1b[2J.xyz"
    trap.write_text(WATER.replace("O ", "D "))
    assert run("data", "check", trap) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "\x1b" not in out + err
    assert "a\\nb \\x1b[2J.xyz [0] ok; 1 atom of D or T read as H" in out
    assert run("data", "check", FOLDER / "models.pdb", FOLDER / "bohr.xyz", "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["verdicts"][0]["notes"] == ["the first of 3 models"]
    assert "wrong-unit" in err


def test_a_crystal_that_was_never_wrapped_has_a_verdict():
    positions = [[0, 0, 0], [1.8 + 3.6 * 400, 1.8, 0]]
    for pbc in ([True] * 3, [False, True, False]):
        crystal = Structure([29, 29], positions, domain="crystal", cell=3.6 * np.eye(3), pbc=np.array(pbc))
        problem = check(crystal)
        assert problem is not None
        assert problem[0] == "too-spread-out"


@pytest.mark.parametrize("spacing", [0.0, 0.31])
def test_a_crowd_of_atoms_has_a_verdict_before_its_pairs_fill_the_memory(spacing):
    grid = np.stack(np.meshgrid(*[np.arange(30)] * 3), axis=-1).reshape(-1, 3) * spacing
    cell = np.eye(3) * max(30 * spacing, 1.0)
    crowds = [Structure(np.ones(len(grid)), grid)]
    crowds += [Structure(np.ones(len(grid)), grid, domain="crystal", cell=cell, pbc=np.array([True, True, False]))]
    flat = Structure(np.ones(100), np.zeros((100, 3)), domain="crystal", cell=np.diag([900, 900, 0.6]), pbc=[True] * 3)
    flat.positions[:, 0] = np.arange(100) * 0.4
    for crowd in (*crowds, flat):
        problem = check(crowd)
        assert problem is not None
        assert problem[0] == "overlap"
        assert "nodes in a cube of 3.2 Å" in problem[1]


def test_a_path_that_is_no_file_is_neither_opened_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.xyz")
    (tmp_path / "folder.cif").mkdir()
    (tmp_path / "zero.pdb").symlink_to("/dev/zero")
    (tmp_path / "gone.xyz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.xyz").symlink_to(tmp_path / "round.xyz")
    (tmp_path / "real.xyz").write_text(WATER)
    (tmp_path / "link.xyz").symlink_to(tmp_path / "real.xyz")
    assert codes(tmp_path / "pipe.xyz") == ["not-a-file"]
    assert codes(tmp_path / "folder.cif") == ["not-a-file"]
    assert codes(tmp_path / "zero.pdb") == ["not-a-file"]
    assert codes(tmp_path / "gone.xyz") == ["no-file"]
    assert codes(tmp_path / "round.xyz") == ["unreadable"]
    assert codes(tmp_path / "link.xyz") == ["ok"]
    assert codes(tmp_path / "real.xyz" / "inside.xyz") == ["no-file"]
    assert codes(tmp_path / "a\0b.xyz") == ["no-file"]


def xz_asking_for(memory_code: int) -> bytes:
    """A small xz file whose header declares a dictionary of 2^(memory_code / 2 + 12) bytes."""
    data = bytearray(lzma.compress(WATER.encode(), format=lzma.FORMAT_XZ))
    header_size = (data[12] + 1) * 4
    place = data.index(b"\x21\x01", 12) + 2
    data[place] = memory_code
    data[12 + header_size - 4 : 12 + header_size] = zlib.crc32(data[12 : 12 + header_size - 4]).to_bytes(4, "little")
    return bytes(data)


def test_bombs_are_refused_before_they_unfold(tmp_path):
    (tmp_path / "bomb.xyz.gz").write_bytes(gzip.compress(b"0" * 2**26))
    (tmp_path / "bomb.xyz.xz").write_bytes(lzma.compress(b"0" * 2**26))
    (tmp_path / "greedy.xyz.xz").write_bytes(xz_asking_for(38))  # 2 GiB
    tracemalloc.start()
    for name in ("bomb.xyz.gz", "bomb.xyz.xz", "greedy.xyz.xz"):
        assert codes(tmp_path / name) == ["too-large"], name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27


def many_operations() -> str:
    rows = "".join(f"'x+{i}/100003,y,z'\n" for i in range(100_000))
    return HALITE.replace("_symmetry_space_group_name_H-M 'F m -3 m'\n", f"loop_\n_symmetry_equiv_pos_as_xyz\n{rows}")


LARGE = {  # file -> how it is made, codes
    "models.pdb": (lambda: "MODEL        1\nENDMDL\n" * 1_000_000, ["no-atoms"]),
    "peptides.pdb": (lambda: f"MODEL 1\n{PEPTIDE.replace('END', 'ENDMDL')}" + "MODEL 2\nENDMDL\n" * 500_000, ["ok"]),
    "operations.cif": (many_operations, ["too-many-nodes"]),
    "loop.cif": (lambda: HALITE + "".join(f"X{i} Na 0.1 0.1 0.1 1\n" for i in range(150_000)), ["too-many-nodes"]),
    "empty_lines.cif": (lambda: "\n" * 3_000_000, ["empty-file"]),
    "blank.cif": (lambda: HALITE + "\n" * 3_000_000, ["ok"]),
    "counts.xyz": (lambda: "999999999999\n\nH 0 0 0\n", ["truncated"]),
    "digits.xyz": (lambda: "9" * 5_000 + "\n\nH 0 0 0\n", ["unreadable"]),
    "columns.extxyz": (lambda: "1\nProperties=species:S:1:pos:R:1000000000\nH 0 0 0\n", ["wrong-counts"]),
    "nested.extxyz": (lambda: f'1\na="_JSON {"[" * 90_000}"\nH 0 0 0\n', ["unreadable"]),
    "open.sdf": (lambda: "a\n\n\n999999  0  0  0  0  0  0  0  0999 V2000\n", ["truncated"]),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_declared_or_repeated_without_end_costs_neither_time_nor_memory(name, tmp_path):
    make, expected = LARGE[name]
    path = tmp_path / name
    path.write_text(make())
    script = f"""
from pathlib import Path
from moiety.data.validate import verdicts
print(*(verdict.code for verdict in verdicts({str(path)!r})))
status = Path("/proc/self/status").read_text()  # getrusage counts what the process was before it became this script
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""
    start = time.perf_counter()
    limit = 4 * 2**30  # bytes of address space
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert result.returncode == 0, result.stderr
    found, peak = result.stdout.strip().split("\n")
    assert found.split() == expected
    assert int(peak) < 1_000  # MiB
    assert time.perf_counter() - start < 30


def test_a_name_that_gemmis_tables_do_not_hold_is_a_verdict(tmp_path):
    text = (FOLDER / "peptide.mmcif").read_text()
    assert text.count("ATOM 1 N N .") == 1
    (tmp_path / "a.mmcif").write_text(text.replace("ATOM 1 N N .", "ATOM 1 N LONGNAME9 ."))
    assert codes(tmp_path / "a.mmcif") == ["unreadable"]


def test_data_blocks_without_end_are_read_one_after_the_other(tmp_path):
    path = tmp_path / "blocks.cif"
    path.write_text("".join(f"data_{i}\n_a {i}\n" for i in range(100_000)))
    assert codes(path) == ["no-atoms"]


@pytest.mark.parametrize("only", ["structures", pytest.param("containers", marks=pytest.mark.slow)])
def test_a_few_mutated_files_break_no_reader(tmp_path, only):
    """10,000 and more: python tests/fuzz_readers.py"""
    script = Path(__file__).with_name("fuzz_readers.py")
    command = [
        sys.executable,
        script,
        "--count",
        "200",
        "--seed",
        "7",
        "--only",
        only,
        "--keep",
        tmp_path / "failed",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "200 inputs" in result.stdout
    assert "no failure" in result.stdout


def test_the_fuzzer_has_a_seed_of_every_container_layout_and_suffix(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    fuzz_readers = importlib.import_module("fuzz_readers")
    read = [(container, options.get("layout")) for container, options, _ in fuzz_readers.CONTAINERS.values()]
    assert {container for container, _ in read} == set(KINDS)
    assert {layout for container, layout in read if container == "hdf5"} == set(hdf5.LAYOUTS)
    names = [name.removesuffix(".gz").removesuffix(".xz") for name, _ in fuzz_readers.structure_seeds()]
    assert {Path(name).suffix for name in names} == set(XYZ + SDF + CIF + PDB)


def test_the_fuzzer_finds_exceptions_signals_and_hangs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    fuzz_readers = importlib.import_module("fuzz_readers")

    def read(path: Path) -> str:
        number = int(path.name.split("-")[0])
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            raise KeyError("reader")
        while number == 3:
            pass
        return ""

    monkeypatch.setattr(fuzz_readers, "read", read)
    monkeypatch.setattr(fuzz_readers, "warm_up", lambda seeds: None)
    monkeypatch.setattr(fuzz_readers, "PATIENCE", 1.0)
    results = fuzz_readers.run([("a.xyz", WATER.encode())], seed=0, count=5, workers=2, folder=tmp_path)
    failures = {result.number: result.failure.split(":")[0] for result in results}
    assert failures == {0: "", 1: "crash", 2: "exception", 3: "hang", 4: ""}
