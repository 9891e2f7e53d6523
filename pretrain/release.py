"""Puts a run's export, and adapters fine-tuned from it, into the package as the weights of a name.

    python pretrain/release.py runs/released/base tiny gap=runs/released/gap forces=runs/released/forces

What `moiety.weights(NAME)` then returns holds the export without its code, which the package has, the recipe, and the
adapters; where the run went on from another one's export, that one's recipe too. The card gains where the weights come
from: recipes, seed, versions, corpora by the hash of their manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    for needed in (run / "export/probe.json", run / "config.json", run / "run.json"):
        if not needed.is_file():
            raise InputError(f"{needed} is missing; give a finished run of pretrain/train.py")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as place:
        aside = Path(place) / name
        gather(run, name, adapters, aside)
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise InputError(f"{run}: {size:,} bytes; weights in the package have at most {MOST_BYTES:,}")
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
    print(f"{out}: {size:,} bytes, base {base_fingerprint(out)}, adapters: {', '.join(adapters) or 'none'}")


def gather(run: Path, name: str, adapters: dict[str, Path], aside: Path) -> None:
    """All files of the directory, into an empty one."""
    export = run / "export"
    aside.mkdir()
    for file in KEPT:
        shutil.copyfile(export / file, aside / file)
    config = json.loads((aside / "config.json").read_text())
    del config["auto_map"]  # names of code files that are not beside it
    write_json(aside / "config.json", config)
    recipe = json.loads((run / "config.json").read_text())
    write_text(aside / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    if recipe["start"]:
        before = json.loads((Path(recipe["start"]).parent / "config.json").read_text())
        write_text(aside / "recipe_start.yaml", yaml.safe_dump(before, sort_keys=False))
    rows = [put_adapter(name, adapter, folder, export, aside) for adapter, folder in adapters.items()]
    card = (aside / "README.md").read_text()
    card = card.replace("from transformers", "import moiety\nfrom transformers", 1)
    card = card.replace("DIR, trust_remote_code=True", f'moiety.weights("{name}")')
    answers = "\n## Adapters\n\nIn `adapters/`; `moiety predict` asks all of them.\n" if rows else ""
    write_text(aside / "README.md", card + origin(run, recipe) + answers + "".join(rows))


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


def origin(run: Path, recipe: dict[str, Any]) -> str:
    """The part of the card on where the weights come from."""
    facts = json.loads((run / "run.json").read_text())
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    manifests = [Path(source["path"]) / "manifest.json" for source in recipe["data"]["sources"]]
    corpora = "\n".join(f"- {m.parent.name}: {hashlib.sha256(m.read_bytes()).hexdigest()}" for m in manifests)
    return f"""
## Origin

`recipe.yaml`{", from the model of `recipe_start.yaml`" if recipe["start"] else ""}, \
seed {recipe["training"]["seed"]}; {versions}; {facts["machine"]["device"]}, \
{facts["machine"]["processes"]} process. Corpora, by the sha256 of their manifest:

{corpora}
"""


if __name__ == "__main__":
    sys.exit(main())
