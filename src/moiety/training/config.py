"""A run is one small YAML: frozen dataclasses give its keys, `key=value` overrides change single values.

    config = load_config(PretrainConfig, "pretrain/configs/tiny.yaml", ["steps=30", "optimizer.lr=5e-4"])

A key that no dataclass knows is an error that names the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from huggingface_hub.errors import StrictDataclassError

from moiety.adapters.adapter import require_export
from moiety.adapters.tasks import TaskConfig, require_consistent
from moiety.errors import InputError

if TYPE_CHECKING:
    from moiety.models.configuration_moiety import MoietyConfig

Config = TypeVar("Config")
MOST_LISTED = 12  # keys in an error message


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of a mixture; `weight` is its share, up to normalisation: see `DataConfig.temperature` of what.

    A `supervised` one is learned from by the tasks of the recipe, and not spoilt.
    """

    path: str
    weight: float = 1.0
    supervised: bool = False


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut. Budgets are per micro-batch; a micro-batch comes from one source."""

    sources: tuple[SourceConfig, ...]
    node_budget: int  # atoms and residues in a micro-batch
    edge_budget: int  # directed neighbour pairs in a micro-batch
    micro_batches: int = 4  # in one optimizer step, over all ranks: a multiple of the number of ranks
    split: str = "train"
    seed: int = 0
    temperature: float | None = None  # T: shares of structures, weight n^(1/T); null: weights share out micro-batches


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: linear warm-up from lr / warmup_steps, then a cosine down to `final_fraction` of lr."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01  # matrices only, never biases or norms
    grad_clip: float = 1.0  # global norm; 0 = off
    warmup_steps: int = 100
    final_fraction: float = 0.02
    ema: float = 0.998  # decay of the averaged weights that the export holds; 0 = off


@dataclass(frozen=True)
class TrainingConfig:
    """How long, on what, and what is kept."""

    steps: int
    ds: str = "zero0"  # a name in launch/ds, or the path of a DeepSpeed JSON
    precision: str = "fp32"  # fp32 | bf16 (linear maps of the trunk only)
    checkpoint_activations: bool = False  # keep what enters a block, compute its inside again in the backward pass
    compile: bool = False  # steps through torch.compile: faster, after some minutes at the first step
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    workers: int = 0  # processes of each rank that prepare micro-batches ahead; 0: the rank itself, when it needs them
    log_every: int = 10
    tensorboard: bool = False  # the log also as TensorBoard events, in the run's folder
    hang_timeout_s: float = 900  # without progress before a run ends itself and says who is stuck, s
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"training.precision is {self.precision!r}; fp32 and bf16 are built")
        for name in ("steps", "checkpoint_every", "keep_checkpoints", "log_every", "hang_timeout_s"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.workers < 0:
            raise InputError(f"training.workers is {self.workers}; it must be at least 0")


@dataclass(frozen=True)
class PretrainConfig:
    """`objectives` maps a name to that objective's settings; `tasks` are learned beside them from supervised sources.

    Either `model` has the numbers of MoietyConfig, or `start` names an exported model whose training goes on.
    """

    data: DataConfig
    objectives: dict[str, dict[str, Any]]
    training: TrainingConfig
    model: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    tasks: tuple[TaskConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.start):
            raise InputError("give either model, the numbers of a new one, or start, the export of a trained one")
        if bool(self.tasks) != any(source.supervised for source in self.data.sources):
            raise InputError(
                "tasks are learned from sources with `supervised: true`: a recipe has both, or none of them"
            )
        if self.tasks and (unfit := sorted({"dens", "self_conditioned"} & set(self.objectives))):
            raise InputError(f"objectives: {', '.join(unfit)} does not go with tasks; take coordinates or blocks")
        if self.tasks:
            require_consistent(self.tasks)

    def model_config(self) -> MoietyConfig:
        """The numbers under `model` as a MoietyConfig, or those of `start`.

        Raises:
            InputError: a key that MoietyConfig does not have, numbers that do not fit together, no model at `start`.
        """
        from moiety.models.configuration_moiety import MoietyConfig

        if self.start:
            require_export(self.start)
            return MoietyConfig.from_pretrained(self.start)
        for key in self.model:
            if key not in MoietyConfig.__annotations__:
                raise unknown_key(f"model.{key}", (f"model.{name}" for name in MoietyConfig.__annotations__), "config")
        try:
            return MoietyConfig(**self.model)
        except (ValueError, StrictDataclassError) as error:
            raise InputError(f"model: {error}") from error


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file into a frozen dataclass.

    Args:
        cls: the dataclass whose fields are the YAML's sections.
        path: the YAML file.
        overrides: `section.key=value`, or `key=value` where the key names one thing only; values are YAML.

    Raises:
        InputError: a missing file, an unknown or ambiguous key, a missing key, a value of the wrong type.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(_field_types(cls))}")
    for override in overrides:
        _override(cls, tree, override)
    return _build(cls, tree, str(path), "")


def unknown_key(key: str, known: Iterable[str], where: str) -> InputError:
    """The error for a key that nobody reads, with the nearest one that somebody does."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    listing = f"; keys: {', '.join(known)}" if len(known) <= MOST_LISTED else ""
    hint = f"; did you mean {nearest[0]!r}?{listing}" if nearest else ""
    return InputError(f"{where}: unknown key {key!r}{hint}")


def _field_types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type[Config], tree: dict[str, Any], where: str, prefix: str) -> Config:
    hints = _field_types(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", [prefix + name for name in hints], where)
        values[key] = _convert(hints[key], value, where, prefix + key)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{where}: {prefix}{item.name} is missing")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str, key: str) -> Any:
    """The value as the field's type; YAML reads 1e-3 as a string, and that is forgiven."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = InputError(f"{where}: {key} is {value!r}; expected {getattr(kind, '__name__', kind)}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong
        return _build(kind, value, where, key + ".")  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where, key)
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise wrong
        return tuple(_convert(kinds[i], item, where, f"{key}.{i}") for i, item in enumerate(value))
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if kind is int and number != int(number):
            raise wrong
        return kind(number)
    if not isinstance(value, origin or kind):
        raise wrong
    return value


def _override(cls: Any, tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r}: write key=value, for example steps=30")
    paths = _paths(cls, tree)
    exact = key in paths or f"{key.rpartition('.')[0]}.*" in paths
    matches = [key] if exact else [path for path in paths if path.rpartition(".")[2] == key]
    if len(matches) > 1:
        raise InputError(f"override {override!r}: {key} could be any of {', '.join(sorted(matches))}; write it in full")
    if not matches:
        raise unknown_key(key, (path for path in paths if not path.endswith(".*")), f"override {override!r}")
    *sections, leaf = matches[0].split(".")
    node: Any = tree
    for section in sections:
        node = node[int(section)] if isinstance(node, list) else node.setdefault(section, {})
    try:
        node[int(leaf) if isinstance(node, list) else leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML") from error


def _paths(cls: Any, tree: Any, prefix: str = "") -> list[str]:
    """Every key that an override can set: the dataclass's own, and what the YAML has in its free mappings and lists.

    `x.*` stands for any key of a free mapping x: whoever reads the mapping checks it.
    """
    paths: list[str] = []
    hints = _field_types(cls) if dataclasses.is_dataclass(cls) else {}
    given: dict[Any, Any] = dict(enumerate(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else {}
    for key in dict.fromkeys([*hints, *given]):
        path = f"{prefix}{key}"
        paths.append(path)
        hint, value = hints.get(key), given.get(key)
        if isinstance(value, dict) and not dataclasses.is_dataclass(hint) and not isinstance(tree, list):
            paths.append(f"{path}.*")
        if dataclasses.is_dataclass(hint) or isinstance(value, dict | list):
            inner = typing.get_args(cls)[0] if isinstance(tree, list) and typing.get_args(cls) else hint
            paths += _paths(inner, value, path + ".")
    return paths
