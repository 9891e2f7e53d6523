"""The command line: exit codes, messages, and what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moiety import InputError, __version__, cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moiety.cli", *arguments], capture_output=True, text=True)


def test_importing_moiety_takes_less_than_a_second_and_no_torch():
    code = "import sys, time; t = time.time(); import moiety; print(time.time() - t); assert 'torch' not in sys.modules"
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 1


@pytest.mark.parametrize("order", ["import moiety; import transformers", "import transformers; import moiety"])
def test_auto_classes_know_moiety_whoever_is_imported_first(order: str):
    code = (
        f"{order}\nfrom transformers import AutoConfig, AutoModel, AutoProcessor\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "config = AutoConfig.for_model('moiety', hidden_size=16, num_layers=1, num_heads=2, edge_channels=8)\n"
        "print(type(AutoModel.from_config(config)).__name__, PROCESSOR_MAPPING[type(config)].__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["MoietyModel", "MoietyProcessor"], result.stderr


def test_version_and_help_answer_without_loading_a_model():
    started = time.monotonic()
    assert run("--version").stdout.strip() == f"moiety {__version__}"
    assert time.monotonic() - started < 3
    result = run("predict", "--help")
    assert result.returncode == 0 and "--model" in result.stdout


def test_help_lists_every_command():
    result = run("--help")
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("data", "predict", "embed", "report"))


def test_wrong_usage_exits_with_2():
    assert run("predict").returncode == 2
    assert run("no-such-command").returncode == 2


def test_an_input_error_is_one_line_and_exit_2(tmp_path: Path):
    result = run("report", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert "no such run directory" in result.stderr and "Traceback" not in result.stderr


def fail(error: Exception) -> None:
    raise error


def test_a_failure_exits_with_1_and_shows_its_traceback_only_when_asked(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr("moiety.inference.run_files.RunFiles.open", lambda path: fail(RuntimeError("it broke")))
    monkeypatch.delenv("MOIETY_DEBUG", raising=False)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "it broke" in (said := capsys.readouterr().err) and "Traceback" not in said
    monkeypatch.setenv("MOIETY_DEBUG", "1")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_input_errors_inside_a_command_reach_main(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(
        "moiety.inference.run_files.RunFiles.open", lambda path: fail(InputError("x.xyz: bad; mend it"))
    )
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: x.xyz: bad; mend it\n"


def test_json_is_the_only_thing_on_stdout(tmp_path: Path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "losses": {"molecule": {"coordinates": 1.0}}}\n')
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path), "--json"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["losses"][0]["last"] == 1.0
    assert "report.html" in captured.err
