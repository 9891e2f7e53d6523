"""What the pages tell a reader to type exists, and the Python they show runs."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer import Context
from typer.main import get_command

from moiety.adapters.adapter import AdapterSettings, add_adapter, load_base, save_adapter
from moiety.adapters.finetune import FinetuneConfig
from moiety.cli import app
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPreTraining
from moiety.training.config import PretrainConfig, load_config
from moiety.training.export import write_export

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
CONFIGS = {"pretrain/train.py": PretrainConfig, "finetune/lora.py": FinetuneConfig}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*((?:moiety|make|python|deepspeed|torchrun|launch/\S+) .*?)\s*(?:  #.*)?$", re.MULTILINE)


def commands() -> list[str]:
    shown = [text for page in PAGES for language, text in BLOCK.findall(page.read_text()) if language != "python"]
    return sorted({command for text in shown for command in COMMAND.findall(text)})


def python_blocks() -> list[str]:
    return [text for page in PAGES for language, text in BLOCK.findall(page.read_text()) if language == "python"]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "moiety":
        known = get_command(app)
        for word in words[1:]:
            if word.startswith("-") or not hasattr(known, "get_command"):
                break
            known = known.get_command(Context(known), word)
            assert known is not None, word
        options = {option for parameter in known.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None
    else:
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
        if script in CONFIGS:
            config = ROOT / words[words.index("--config") + 1]
            load_config(CONFIGS[script], config, [word for word in words if re.fullmatch(r"[\w.]+=\S+", word)])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small export, adapter and corpora where the pages expect them."""
    place = tmp_path_factory.mktemp("pages")
    (place / "corpora").mkdir()
    (place / "corpora/tiny").symlink_to(ROOT / "tests/data/corpora")
    export = place / "runs/quickstart/export"
    torch.manual_seed(0)
    config = MoietyConfig(hidden_size=32, num_layers=2, num_heads=2, edge_channels=16)
    write_export(MoietyForPreTraining(config).state_dict(), config, export)
    tasks = {"dipole": {"kind": "dipole_norm", "unit": "D"}}
    save_adapter(
        add_adapter(load_base(export, tasks), AdapterSettings()),
        place / "runs/quickstart/dipole/adapter",
        export,
        tasks,
    )
    return place


@pytest.mark.parametrize("block", python_blocks())
def test_python_of_the_pages_runs(block: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(compile(block, "page", "exec"), {})
