"""The data commands: what they print, where, and how they exit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiety.cli import main
from moiety.data.shards import Corpus

FILES = Path(__file__).parent / "data" / "files"


def run(*argv: object) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_check_gives_a_verdict_a_structure_and_exits_with_2(capsys):
    assert run("data", "check", FILES, "--json") == 2
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] == 12
    assert result["ok"] + sum(result["rejected"].values()) == len(result["verdicts"])
    assert result["verdicts"][0].keys() == {"file", "index", "ok", "code", "reason", "remedy", "notes"}


def test_check_of_good_files_exits_with_0(capsys):
    assert run("data", "check", FILES / "water.xyz", FILES / "two.sdf") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{FILES / 'water.xyz'} [0] ok"
    assert "3 structures ok, 0 rejected" in err


def test_pack_writes_what_is_good_and_counts_the_rest(tmp_path, capsys):
    assert run("data", "pack", FILES, "--out", tmp_path / "mine", "--licence", "CC0-1.0", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["counts"]["ok"] == 12 == len(Corpus.open(tmp_path / "mine"))
    assert result["counts"]["in"] == 12 + sum(result["counts"]["rejected"].values())
    assert result["licence"] == "CC0-1.0"
    assert "overlap.xyz [0] overlap" in err


def test_show_tells_what_is_there_and_finds_damage(tmp_path, capsys):
    run("data", "pack", FILES / "two.sdf", "--out", tmp_path / "mine")
    capsys.readouterr()
    assert run("data", "show", tmp_path / "mine") == 0
    assert "2 of 2; rejected: none" in capsys.readouterr().out
    (tmp_path / "mine" / "data-00000-00000.parquet").write_bytes(b"rubbish")
    assert run("data", "show", tmp_path / "mine") == 2
    assert "data-00000-00000.parquet: checksum mismatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("check", "absent.xyz"), "no such file"),
        (("show", "corpora/tiny/absent"), "moiety data build absent --profile tiny"),
        (("pack", FILES / "nan.xyz", "--out", "OUT"), "not-finite"),
        (("build", "no-such-recipe"), "no recipe"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(argv, told, tmp_path, capsys):
    assert run("data", *(tmp_path / "out" if word == "OUT" else word for word in argv)) == 2
    assert told in capsys.readouterr().err


def test_list_names_the_recipes(capsys):
    assert run("data", "list", "--json") == 0
    assert {"qm9", "ccd"} <= {recipe["name"] for recipe in json.loads(capsys.readouterr().out)["recipes"]}
