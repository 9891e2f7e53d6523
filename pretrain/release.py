"""Puts a run's export, and adapters fine-tuned from it, into the package as the weights of a name.

    python pretrain/release.py runs/released/base tiny gap=runs/released/gap forces=runs/released/forces

What `moiety.weights(NAME)` then returns holds the export without its code, which the package has, the recipe, and the
adapters; where the run went on from another one's export, that one's recipe too, and so on. The card gains where the
weights come from: recipes, seeds, versions, machines, corpora by the hash of their manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from moiety.adapters.adapter import ADAPTER_CONFIG, adapter_facts, base_fingerprint
from moiety.errors import InputError
from moiety.training.files import write_json, write_text

RELEASED = Path(__file__).parents[1] / "src/moiety/released"
MOST_BYTES = 8_000_000
KEPT = ("config.json", "model.safetensors", "processor_config.json", "probe.json", "probe.safetensors", "README.md")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("adapters", nargs="*", metavar="NAME=RUN", help="fine-tuning runs from the run's export")
    args = parser.parse_args(argv)
    try:
        adapters = {name: Path(run) for name, _, run in (word.partition("=") for word in args.adapters)}
        release(args.run, args.name, adapters, RELEASED / args.name)
    except InputError as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 2
    return 0


def release(run: Path, name: str, adapters: dict[str, Path], out: Path) -> None:
    """Writes the directory; one that stands there is replaced.

    Raises:
        InputError: something is missing in the run, an adapter belongs to another base, or all of it is too large.
    """
    runs = lineage(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as place:
        aside = Path(place) / name
        gather(runs, name, adapters, aside)
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise InputError(f"{run}: {size:,} bytes; weights in the package have at most {MOST_BYTES:,}")
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
    print(f"{out}: {size:,} bytes, base {base_fingerprint(out)}, adapters: {', '.join(adapters) or 'none'}")


def gather(runs: dict[str, Path], name: str, adapters: dict[str, Path], aside: Path) -> None:
    """All files of the directory, into an empty one."""
    export = runs["recipe.yaml"] / "export"
    aside.mkdir()
    for file in KEPT:
        shutil.copyfile(export / file, aside / file)
    config = json.loads((aside / "config.json").read_text())
    del config["auto_map"]  # names of code files that are not beside it
    write_json(aside / "config.json", config)
    for file, folder in runs.items():
        recipe = json.loads((folder / "config.json").read_text())
        write_text(aside / file, yaml.safe_dump(recipe, sort_keys=False))
    rows = [put_adapter(name, adapter, folder, export, aside) for adapter, folder in adapters.items()]
    card = (aside / "README.md").read_text()
    card = card.replace("from transformers", "import moiety\nfrom transformers", 1)
    card = card.replace("DIR, trust_remote_code=True", f'moiety.weights("{name}")')
    answers = "\n## Adapters\n\nIn `adapters/`; `moiety predict` asks all of them.\n" if rows else ""
    write_text(aside / "README.md", card + origin(runs) + answers + "".join(rows))


def lineage(run: Path) -> dict[str, Path]:
    """File of the recipe -> run: the run itself, the one that it went on from, and so on.

    Raises:
        InputError: one of them is not a finished run.
    """
    runs = {"recipe.yaml": run}
    while True:
        for needed in (run / "export/probe.json", run / "config.json", run / "run.json"):
            if not needed.is_file():
                raise InputError(f"{needed} is missing; give a finished run of pretrain/train.py")
        start = json.loads((run / "config.json").read_text()).get("start")
        if not start:
            return runs
        run = Path(start).parent
        runs[f"recipe_{run.name}.yaml"] = run


def put_adapter(name: str, adapter: str, run: Path, export: Path, out: Path) -> str:
    """Copies an adapter and says on the card what it was trained on and how good it is."""
    facts = adapter_facts(run / "adapter")
    if facts["base_fingerprint"] != base_fingerprint(export):
        raise InputError(f"{run}: trained on the base {facts['base_fingerprint']}, not on {export}")
    folder = out / "adapters" / adapter
    folder.mkdir(parents=True)
    for file in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        shutil.copyfile(run / "adapter" / file, folder / file)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = f"moiety.weights({name!r})"
    write_json(folder / ADAPTER_CONFIG, config)
    shutil.copyfile(run / "metrics.json", folder / "metrics.json")
    recipe = json.loads((run / "config.json").read_text()) | {"model": config["base_model_name_or_path"]}
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    manifest = json.loads((Path(recipe["data"]["corpus"]) / "manifest.json").read_text())
    lines = [f"\n### `{adapter}`\n\nLabels of {manifest['theory']}, corpus {manifest['name']}; {recipe['method']}.\n\n"]
    for entry in json.loads((run / "metrics.json").read_text()):
        results = "; ".join(f"{method} {error:.4g}" for method, error in entry["results"].items())
        lines.append(
            f"- `{entry['target']}`, {entry['num_train']:,} training and {entry['num_test']:,} test structures, "
            f"{entry['metric']} in {entry['unit']}: {results}\n"
        )
    return "".join(lines)


def origin(runs: dict[str, Path]) -> str:
    """The part of the card on where the weights come from."""
    lines, manifests = [], {}
    for file, run in reversed(runs.items()):
        recipe, facts = (json.loads((run / name).read_text()) for name in ("config.json", "run.json"))
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        machine = f"{facts['machine']['device']}, {facts['machine']['processes']} process(es)"
        training = recipe["training"]
        lines.append(f"1. `{file}`: {training['steps']:,} steps, seed {training['seed']}; {machine}; {versions}")
        for source in recipe["data"]["sources"]:
            manifest = Path(source["path"]) / "manifest.json"
            manifests[manifest.parent.name] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    trained = "\n".join(lines)
    corpora = "\n".join(f"- {name}: {digest}" for name, digest in manifests.items())
    return f"""
## Origin

Each goes on from the model of the one before:

{trained}

Corpora, by the sha256 of their manifest:

{corpora}
"""


if __name__ == "__main__":
    sys.exit(main())
