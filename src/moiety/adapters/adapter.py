"""Adapters on a Moiety trunk with stock `peft`: LoRA and its kin; an adapter is a plain peft directory.

Every map that mixes channels is an `nn.Linear` within one degree, so a low-rank update of it, or a factor for each of
its channels, commutes with rotations. Dropout does not: it would drop components of a vector, so it acts at l = 0
alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.utils import logging

from moiety.adapters.lora import SummedLinear
from moiety.errors import InputError
from moiety.models.configuration_moiety import MoietyConfig
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyModel
from moiety.training.files import write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("lora", "rslora", "dora", "ia3")
DIRECTIONAL = re.compile(r"\.(degrees|out)\.[12]$|\.vectors$")  # linear maps of the trunk that act on l > 0


@dataclass(frozen=True)
class AdapterSettings:
    """Rank of the update, its scale alpha / rank (rslora: alpha / sqrt(rank)), dropout (at l = 0); ia3 has none.

    `targets` is a regular expression somewhere in the names of the trunk's linear maps; default: all of them.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise InputError(f"adapter: rank {self.rank}, dropout {self.dropout}; at least 1, and a share below 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InputError(f"adapter.targets {self.targets!r} is no regular expression: {error}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without the report that transformers gives of heads which are to be filled, and a warning that peft provokes."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def trunk_linears(model: nn.Module) -> list[str]:
    """Names of all linear maps of the trunk."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("moiety.")]


def head_modules(model: MoietyForPrediction) -> list[str]:
    """Names of the modules of all heads that have weights of their own: peft merges nothing larger."""
    return [name for name, m in model.named_modules() if name.startswith("heads.") and m._parameters]


def add_adapter(model: MoietyForPrediction, settings: AdapterSettings, kind: str = "lora") -> PeftModel:
    """Freezes the trunk, adapts its linear maps, and leaves the task heads to be trained whole.

    Args:
        model: the pretrained trunk with fresh heads.
        settings: of the adapter.
        kind: lora (Hu et al., arXiv 2106.09685), rslora (Kalajdzievski, arXiv 2312.03732), dora (Liu et al., arXiv
            2402.09353), ia3 (Liu et al., arXiv 2205.05638).

    Raises:
        InputError: targets that no linear map has; dora on a trunk that was never trained, which has weights of zero:
            it divides by their norms.
    """
    targets = [name for name in trunk_linears(model) if re.search(settings.targets, name)]
    if not targets:
        raise InputError(
            f"adapter.targets {settings.targets!r}: no linear map of the trunk has such a name; those of a block are "
            f"{', '.join(name for name in trunk_linears(model) if name.startswith('moiety.blocks.0.'))}"
        )
    zero = [name for name in targets if kind == "dora" and _has_zero_rows(model, name)]
    if still := [name for name in zero if not name.endswith(".frames")]:
        raise InputError(f"method=dora: weights of {still[0]} are zero, the trunk was never trained; use lora")
    where: dict[str, Any] = {
        "target_modules": [name for name in targets if name not in zero],  # frames, of a base that saw no chain
        "exclude_modules": r"heads\..*",  # peft shortens the names above, as far as this model's own heads allow
        "modules_to_save": head_modules(model),
    }
    if kind == "ia3":
        config: PeftConfig = IA3Config(feedforward_modules=[], **where)
    else:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
            **where,
        )
        config._register_custom_module({nn.Linear: SummedLinear})
    with quietly():
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and DIRECTIONAL.search(name):
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Identity()
    return adapted  # type: ignore[return-value]


def _has_zero_rows(model: nn.Module, name: str) -> bool:
    return bool((model.get_submodule(name).weight.norm(dim=1) == 0).any())  # type: ignore[operator]


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all parameters without the copies that peft keeps of replaced modules."""
    parameters = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
    return sum(p.numel() for _, p in parameters if p.requires_grad), sum(p.numel() for _, p in parameters)


def base_fingerprint(model_dir: str | Path) -> str:
    """A hash of the weights of an exported model: what an adapter was trained on."""
    digest = hashlib.sha256()
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        if path.name != "probe.safetensors":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def save_adapter(model: PeftModel, out: Path, model_dir: str | Path, tasks: dict[str, Any]) -> None:
    """Writes the peft directory; its adapter_config.json says which base it belongs to, and the tasks of its heads.

    Both stand under `auto_mapping`, the one free mapping that peft keeps as it is.
    """
    model.save_pretrained(str(out))
    path = out / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str(model_dir)
    config["auto_mapping"] |= {"base_fingerprint": base_fingerprint(model_dir), "tasks": tasks}
    write_json(path, config)


def adapter_facts(adapter_dir: str | Path) -> dict[str, Any]:
    """base_fingerprint, tasks and base of an adapter.

    Raises:
        InputError: no adapter there, or one that is not of a Moiety model.
    """
    path = Path(adapter_dir) / ADAPTER_CONFIG
    if not path.is_file():
        raise InputError(f"{adapter_dir}: no adapter here ({path.name} is missing); give finetune's --out/adapter")
    try:
        config = json.loads(path.read_text())
        facts = config["auto_mapping"] | {"base": config["base_model_name_or_path"]}
        return {key: facts[key] for key in ("base_fingerprint", "tasks", "base")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not say which Moiety model it belongs to; fine-tune again") from error


def require_export(model_dir: str | Path) -> None:
    """InputError where there is no exported model."""
    if not (Path(model_dir) / "config.json").is_file():
        raise InputError(
            f"{model_dir}: no model here (config.json is missing); pretrain one with pretrain/train.py, or give the "
            "`export` directory of a run"
        )


def load_base(model_dir: str | Path, tasks: dict[str, Any]) -> MoietyForPrediction:
    """The pretrained trunk with fresh heads for the tasks, whatever heads it has itself.

    Raises:
        InputError: no exported model there.
    """
    require_export(model_dir)
    config = MoietyConfig.from_pretrained(str(model_dir), tasks=tasks)
    model = MoietyForPrediction(config)
    with quietly():
        model.moiety = MoietyModel.from_pretrained(str(model_dir), config=config)
    return model.eval()


def load_adapted(model_dir: str | Path, adapters: str | Path | Mapping[str, str | Path]) -> tuple[PeftModel, Any]:
    """A pretrained model with adapters on it, and the processor.

    Args:
        model_dir: the exported base.
        adapters: a directory, or several by name; `set_adapter(name)` switches, the first is active. Every head gives
            its predictions all the time: those of the active adapter are the ones that mean something.

    Raises:
        InputError: no adapter there, or it was trained on another base (both fingerprints are named); several that
            have a task in common which they read differently, or of which one hides the types of residues.
    """
    from transformers import AutoProcessor

    if not isinstance(adapters, Mapping):
        adapters = {"default": adapters}
    found = base_fingerprint(model_dir)
    tasks: dict[str, Any] = {}
    for directory in adapters.values():
        facts = adapter_facts(directory)
        if found != facts["base_fingerprint"]:
            raise InputError(
                f"{directory}: trained on the base {facts['base_fingerprint']} ({facts['base']}), but {model_dir} is "
                f"{found}; give that base as --model"
            )
        for name, task in facts["tasks"].items():
            if tasks.setdefault(name, task) != task:
                raise InputError(f"{directory}: its task {name!r} is not that of the adapters before; load it alone")
            if task["kind"] == "residues" and len(adapters) > 1:
                raise InputError(f"{directory}: its task {name!r} hides residues from the trunk; load it alone")
    base = load_base(model_dir, tasks)
    (first, directory), *others = adapters.items()
    with quietly():
        adapted = PeftModel.from_pretrained(base, str(directory), adapter_name=first)
        for name, other in others:
            adapted.load_adapter(str(other), adapter_name=name)
    return adapted.eval(), AutoProcessor.from_pretrained(str(model_dir))
