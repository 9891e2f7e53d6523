"""The rules of the house: where things live, and what must never stand where."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "moiety"
THIN = [
    ROOT / name
    for name in ("pretrain", "finetune", "tokenizers", "data_recipes", "launch", "benchmarks", "docs", "tests")
]
HUB_IMPORTS = {"torch", "transformers", "numpy", "vesin", "safetensors", "huggingface_hub"}
MAX_LINES = 500
UNPICKLERS = {  # the restricted process for corpora of pickles, and the tests that attack it
    SOURCE / "data" / "unpickle_child.py",
    ROOT / "tests" / "test_unpickle.py",
    ROOT / "tests" / "test_traps.py",
}


def python_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not any(part.startswith(".") for part in path.parts)]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Top-level names of absolute imports, anywhere in the file; relative ones as ".name"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names.add("." * node.level + module if node.level else module.split(".")[0])
    return names


def test_thin_folders_are_not_packages():
    """tokenizers/__init__.py would shadow Hugging Face's tokenizers and break `import transformers`."""
    found = [relative(path) for folder in THIN for path in folder.rglob("__init__.py")]
    assert not found


def test_there_is_no_root_conftest():
    assert not (ROOT / "conftest.py").exists()


def test_no_script_is_named_like_a_module_one_could_mean_to_import():
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    found = [relative(path) for folder in THIN for path in python_files(folder) if path.stem in taken]
    assert not found


def test_the_source_is_a_package_all_the_way_down():
    folders = {path.parent for path in python_files(SOURCE)}
    assert not [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_no_file_is_too_long_to_read():
    folders = [SOURCE, *THIN]
    long = {
        relative(p): n for f in folders for p in python_files(f) if (n := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not long


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("*_moiety.py")), ids=lambda path: path.name)
def test_hub_files_import_only_what_a_stranger_has(path: Path):
    from transformers.dynamic_module_utils import get_imports  # what loading with trust_remote_code will demand

    strange = set(get_imports(path)) - HUB_IMPORTS - set(sys.stdlib_module_names)
    assert not strange, f"{path.name} travels to the Hub and may not import {strange}"
    siblings = {name for name in imported(path) if name.startswith(".")}
    assert all(name.count(".") == 1 and (path.parent / f"{name[1:]}.py").exists() for name in siblings), siblings


def test_hub_files_lie_flat():
    assert not [relative(path) for path in (SOURCE / "models").rglob("*.py") if path.parent != SOURCE / "models"]


def test_scripts_import_the_library_and_never_a_sibling():
    for folder in THIN:
        stems = {path.stem for path in python_files(folder)}
        for path in python_files(folder):
            siblings = imported(path) & (stems - {"moiety"})
            assert not siblings, f"{relative(path)} imports {siblings}"


def test_nothing_is_ever_unpickled():
    offences = []
    for path in [p for folder in (SOURCE, *THIN) for p in python_files(folder) if p not in UNPICKLERS]:
        picklers = {"dill", "joblib", "shelve"} | (set() if ROOT / "tests" in path.parents else {"pickle"})
        offences += [f"{relative(path)} imports {name}" for name in imported(path) & picklers]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            call = ast.unparse(node.func)
            unsafe_torch = call == "torch.load" and arguments.get("weights_only") != "True"
            reads = call.endswith("read_pickle") or call in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            if unsafe_torch or arguments.get("allow_pickle") == "True" or reads:
                offences.append(f"{relative(path)}:{node.lineno} {call}")
    assert not offences


def test_every_config_is_run_by_some_test():
    """A config that no test names drifts from the code that reads it."""
    tests = "\n".join(path.read_text() for path in python_files(ROOT / "tests") if path.name != Path(__file__).name)
    configs = [
        path for folder in ("pretrain", "finetune") for path in sorted((ROOT / folder / "configs").glob("*.yaml"))
    ]
    unnamed = [relative(path) for path in configs if path.stem not in tests]
    assert not unnamed


def test_auto_classes_are_found_after_importing_moiety_first():
    from transformers import AutoConfig, AutoModel

    import moiety  # noqa: F401 - registers
    from moiety.models.modeling_moiety import MoietyModel

    config = AutoConfig.for_model("moiety", hidden_size=16, num_layers=1, num_heads=2, edge_channels=8)
    assert isinstance(AutoModel.from_config(config), MoietyModel)
