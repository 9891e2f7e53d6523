"""Training the text bridge, stage by stage, through the one engine: what a stage reads, says, trains and starts from.

The stages: English for a language model that is new; facts that heads decide, without a word; numbers; questions, by
which a new language model learns to hear of what is seen; questions with LoRA and a margin between right and wrong
structures; matching of structures and captions; calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import moiety
from moiety.adapters.adapter import quietly
from moiety.bridge.calibrate import calibrate
from moiety.bridge.dialogue import Asking, See
from moiety.bridge.export import load_bridge, save_bridge
from moiety.bridge.new import new_bridge, take_over
from moiety.bridge.objectives import Answering, Contrast, Deciding, Matching, Numbers, Pointing, Preference, Stating
from moiety.bridge.rows import CAPTIONS, NOTHING, QUESTIONS, WORDS, Writer
from moiety.bridge.sources import Joined, Named, Prose, Single, Together
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.texts import TextCorpus
from moiety.errors import InputError
from moiety.models.modeling_bridge_moiety import MoietyForConditionalGeneration
from moiety.models.processing_bridge_moiety import MoietyBridgeProcessor
from moiety.objectives import Objective
from moiety.tokens.batch import with_neighbors
from moiety.training.config import DataConfig, OptimizerConfig, SourceConfig, TrainingConfig, unknown_key
from moiety.training.loop import fit
from moiety.training.mixture import Mixture, Source
from moiety.training.run import Run

TEXTS = (CAPTIONS, QUESTIONS, WORDS, NOTHING)
LANGUAGE, LORA, NUMBERS, STRING = "language", "lora", "numbers", "string"
DECIDING, POINTING, STATING = "deciding", "pointing", "stating"
KINDS = ("single", "partners", "composition", "named", "prose")  # of sources
PARTS = {  # what a stage can train -> names of its parameters begin so
    "tower": ("tower.",),
    "bridge": ("bridge.",),
    "speech": ("pointer.", "bridge.out.", "bridge.hand.out."),  # by which the language model hears of what is seen
    "space": ("space.",),
    NUMBERS: ("number_head.",),
    LANGUAGE: ("language_model.",),
}
LORA_TARGETS = r"language_model\..*\.(q|k|v|o)_proj"
CALIBRATED = 1000  # structures of a corpus that the calibration looks at, unless its source says `most`
MEASURED = 20  # micro-batches from which a new bridge knows the size of what it reads
APART = 60.0  # Å between nodes that are to know nothing of each other


@dataclass(frozen=True)
class BridgeSourceConfig:
    """One corpus: `single` structures, `partners` that share a pair, up to four of one `composition`, or `prose`;
    `named` ones have the texts of another corpus.
    """

    path: str
    kind: str = "single"
    weight: float = 1.0
    most: int = 0  # structures that are read; 0: all; CALIBRATED for a calibration
    texts: str = ""  # of `named` structures

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_key(self.kind, KINDS, f"source {self.path}: kind")
        if (self.kind == "named") != bool(self.texts):
            raise InputError(f"source {self.path}: `texts` names the corpus of texts of structures of kind `named`")


@dataclass(frozen=True)
class BridgeDataConfig:
    """Budgets are per pack, which is of one source; a micro-batch joins several packs."""

    sources: tuple[BridgeSourceConfig, ...]
    node_budget: int = 240
    edge_budget: int = 30000
    packs: int = 4
    micro_batches: int = 1
    seed: int = 0


@dataclass(frozen=True)
class BridgeStageConfig:
    """`start` is the export of the stage before; without it the bridge is new, between `tower` and `language`.

    With both `start` and a language model the bridge is new to that model alone, and keeps what it sees of structures.
    """

    data: BridgeDataConfig
    training: TrainingConfig
    trained: tuple[str, ...]  # of PARTS, and lora; nothing: the stage that calibrates
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: str = QUESTIONS  # captions | questions | words | nothing
    start: str = ""
    tower: str = field(default_factory=lambda: str(moiety.weights()))
    language: str = ""  # directory of a causal language model, or smollm2; "" with `new_language`
    new_language: dict[str, Any] = field(default_factory=dict)  # numbers of a LlamaConfig
    bridge: dict[str, Any] = field(default_factory=dict)  # numbers of a BridgeConfig
    lora_rank: int = 8
    sees: str = "all"  # all | nothing | composition | string: what is shown of a structure; the others are controls
    random_tower: bool = False  # a control: a tower that was never trained
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in self.trained:
            if name not in (*PARTS, LORA):
                raise unknown_key(name, (*PARTS, LORA), "trained")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise unknown_key(name, OBJECTIVES, "objectives")
        if self.sees not in SEEN:
            raise unknown_key(self.sees, SEEN, "sees")
        if self.text not in TEXTS:
            raise unknown_key(self.text, TEXTS, "text")
        if (self.language and self.new_language) or not (self.start or self.language or self.new_language):
            raise InputError("give start, or one of language (a directory) and new_language (numbers of a LlamaConfig)")


def train_stage(run: Run, config: BridgeStageConfig) -> Path | None:
    """Trains a stage and writes its bridge to `export`; returns that folder on rank 0.

    A stage that trains the language model alone writes that alone: a directory that any `language` may name.
    """
    torch.manual_seed(config.training.seed)
    model, processor = starting_bridge(config)
    asking = Asking(
        processor,
        model.config.numbers,
        Writer(config.text),
        contrast="preference" in config.objectives,
        mirrored=True,
        see=SEEN[config.sees],
        string=config.sees == STRING,
        facts=model.config.facts if {DECIDING, POINTING, STATING} & config.objectives.keys() else None,
    )
    if not config.trained:
        return calibrated(run, config, model, processor, asking)
    mixture = open_mixture(config.data)
    if not config.start and LANGUAGE not in config.trained:
        standardise_bridge(model, mixture, asking)
    if config.trained == (NUMBERS,):
        standardise_numbers(model, mixture, asking)
    adapted = choose_trained(model, config)
    model.text_alone = config.text in (CAPTIONS, NOTHING)
    for line in told(adapted):
        run.progress.note(line)
    objectives = build_bridge_objectives(config.objectives, model.config.facts)
    fit(run, adapted, mixture, objectives, config.optimizer, config.training, make=asking)
    weights = run.weights()
    if weights is None:
        return None
    adapted.load_state_dict(weights, strict=False)
    if config.trained == (LANGUAGE,):
        model.language_model.save_pretrained(run.path / "export")
        processor.tokenizer.save_pretrained(run.path / "export")
    else:
        save_bridge(adapted, processor, run.path / "export")
    return run.path / "export"


def calibrated(
    run: Run,
    config: BridgeStageConfig,
    model: MoietyForConditionalGeneration,
    processor: MoietyBridgeProcessor,
    asking: Asking,
) -> Path | None:
    """The stage that trains nothing: measures how sure answers are, and writes the bridge again."""
    if run.rank:
        return None
    known, held_out = (
        [
            structure
            for source in config.data.sources
            if source.kind != "prose"
            for structure in some_of(source, split, config.training.seed)
        ]
        for split in ("train", "val")
    )
    found = calibrate(model, asking, known, held_out, config.training.seed)
    run.progress.note(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    save_bridge(model, processor, run.path / "export")
    return run.path / "export"


def some_of(source: BridgeSourceConfig, split: str, seed: int) -> list[Structure]:
    """Some structures of a corpus, whole."""
    corpus = Corpus.open(source.path, split=split)
    size = min(source.most or CALIBRATED, len(corpus))
    return corpus.read(np.sort(np.random.default_rng(seed).permutation(len(corpus))[:size]), whole=True)


def starting_bridge(config: BridgeStageConfig) -> tuple[MoietyForConditionalGeneration, MoietyBridgeProcessor]:
    """The export of the stage before, that with another language model, or a new bridge."""
    if config.start and not (config.language or config.new_language):
        return load_bridge(config.start)
    new = new_bridge(config.tower, config.language, config.new_language, config.bridge, config.random_tower)
    if config.start:
        take_over(new[0], load_bridge(config.start)[0])
    return new


@torch.no_grad()
def standardise_bridge(model: MoietyForConditionalGeneration, mixture: Mixture, asking: Asking) -> None:
    """What a new bridge reads, by the first micro-batches; every rank finds the same."""
    features, owners, count = [], [], 0
    for _, trunk in first_read(model, mixture, asking):
        features.append(trunk.node_features)
        owners.append(trunk.graph_index + count)
        count = int(owners[-1].max()) + 1
    model.bridge.invariants.standardise(torch.cat(features), torch.cat(owners))


@torch.no_grad()
def standardise_numbers(model: MoietyForConditionalGeneration, mixture: Mixture, asking: Asking) -> None:
    """What number heads read once it stays as it is, likewise."""
    assert model.number_head is not None
    read = []
    for inputs, trunk in first_read(model, mixture, asking):
        unasked = torch.zeros(inputs["pbc"].shape[0], dtype=torch.long)
        read.append(model.number_head.read(model.bridged(trunk.node_features, unasked, inputs)))
    model.number_head.standardise(torch.cat(read))


def first_read(
    model: MoietyForConditionalGeneration, mixture: Mixture, asking: Asking
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Inputs of the tower, and what it makes of them."""
    for number in range(MEASURED):
        batch = with_neighbors(asking.shown(mixture.structures(number, whole=True)), model.config.cutoff)
        inputs = batch.inputs()
        yield inputs, model.tower(**inputs)


def choose_trained(model: MoietyForConditionalGeneration, config: BridgeStageConfig) -> nn.Module:
    """Leaves a gradient to what the stage trains; with LoRA the model comes back inside of peft's."""
    prefixes = tuple(prefix for name in config.trained if name != LORA for prefix in PARTS[name])
    adapted: Any = model
    if LORA in config.trained:
        settings = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=LORA_TARGETS)
        with quietly():
            adapted = get_peft_model(model, settings)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) or (LORA in config.trained and ".lora_" in name))
    return adapted


def told(model: nn.Module) -> list[str]:
    """What is trained, in words."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return [f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%})"]


def open_mixture(config: BridgeDataConfig) -> Mixture:
    """The corpora, each read as its kind says.

    Raises:
        InputError: a missing corpus, one of the other kind, structures without partners.
    """
    data = DataConfig(
        sources=tuple(SourceConfig(source.path, source.weight) for source in config.sources),
        node_budget=config.node_budget,
        edge_budget=config.edge_budget,
        micro_batches=config.micro_batches,
        seed=config.seed,
    )
    sources = [Source(opened(source), Path(source.path).name, data, n) for n, source in enumerate(config.sources)]
    return Joined(sources, data, config.packs)


def opened(source: BridgeSourceConfig) -> Any:
    """The train split of a corpus, read as its kind says."""
    if source.kind == "prose":
        return Prose(TextCorpus.open(source.path, split="train"))
    corpus = Corpus.open(source.path, split="train", checked=True)
    if source.kind == "named":
        return Named(corpus, TextCorpus.open(source.texts, split="train"))
    if source.kind == "partners":
        return Together.partners(corpus)
    if source.kind == "composition":
        return Together.of_one_composition(corpus, source.most)
    return Single(corpus, source.most)


def build_bridge_objectives(settings: dict[str, dict[str, Any]], facts: Any) -> list[Objective]:
    """The objectives of a stage by name; `facts`: MoietyBridgeConfig.facts."""
    built: list[Objective] = []
    for name, own in settings.items():
        try:
            built.append(OBJECTIVES[name](name, **own, **({"facts": facts} if name in (DECIDING, STATING) else {})))
        except TypeError as error:
            raise InputError(f"objectives.{name}: {error}") from None
    return built


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "answering": Answering,
    "preference": Preference,
    NUMBERS: Numbers,
    DECIDING: Deciding,
    POINTING: Pointing,
    STATING: Stating,
    "contrast": Contrast,
    "matching": Matching,
}


def blinded(structure: Structure) -> Structure:
    """Any structure as one hydrogen atom."""
    return Structure(np.ones(1, dtype=np.int64), np.zeros((1, 3)), id=structure.id)


def composition_only(structure: Structure) -> Structure:
    """The same nodes in the order of their types, out of each other's reach on a grid."""
    kinds = np.sort(structure.node_type)
    side = math.ceil(len(kinds) ** (1 / 3))
    places = APART * np.stack(np.unravel_index(np.arange(len(kinds)), (side, side, side)), axis=1)
    return replace(structure, node_type=kinds, positions=places, cell=None, pbc=None, node_vectors=None, role=None)


SEEN: dict[str, See | None] = {"all": None, "nothing": blinded, "composition": composition_only, STRING: blinded}
