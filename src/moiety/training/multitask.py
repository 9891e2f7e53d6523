"""Labels beside denoising: heads of tasks and of pretraining on one trunk, in pretraining and in replay.

Every micro-batch runs through all heads; which of them it is scored by depends on whether it has labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from moiety.adapters.adapter import load_base, quietly
from moiety.adapters.starts import copy_head
from moiety.adapters.tasks import Task, TaskConfig
from moiety.models.blocks_moiety import full_precision
from moiety.models.modeling_moiety import MoietyForPrediction, MoietyForPreTraining
from moiety.objectives import Objective, build_objectives
from moiety.objectives.unlabelled import OnUnlabelled
from moiety.training.config import PretrainConfig
from moiety.training.mixture import Mixture

MODEL = "model."  # before the names of the weights of the model inside WithPretrainingHeads


@dataclass
class MultitaskOutput(ModelOutput):
    """Predictions of the tasks, and what the heads of pretraining say."""

    predictions: dict[str, Tensor] | None = None
    noise: Tensor | None = None
    type_logits: Tensor | None = None
    strain: Tensor | None = None
    graph_features: Tensor | None = None
    base_features: Tensor | None = None  # [B,C] those of the base, where it is there (moiety.adapters.replay)


class WithPretrainingHeads(nn.Module):
    """A model with task heads, adapted or not, and the heads of pretraining of another on the same trunk."""

    def __init__(self, model: nn.Module, base: MoietyForPreTraining):
        super().__init__()
        self.model = model
        self.noise_head, self.type_head, self.strain_head = base.noise_head, base.type_head, base.strain_head

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def derives(self) -> bool:
        return self.model.derives  # type: ignore[return-value]

    def activation_checkpointing_enable(self) -> None:
        self.model.activation_checkpointing_enable()  # type: ignore[operator]

    def forward(self, **inputs: Any) -> MultitaskOutput:
        output = self.model(**inputs)
        features, graph_index = output.node_features, output.graph_index
        with full_precision(features):
            return MultitaskOutput(
                predictions=output.predictions,
                noise=self.noise_head(features),
                type_logits=self.type_head(features[:, 0]),
                strain=self.strain_head(features, graph_index, output.graph_features.shape[0]),
                graph_features=output.graph_features,
            )


def own_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the model inside WithPretrainingHeads."""
    return {name.removeprefix(MODEL): value for name, value in weights.items() if name.startswith(MODEL)}


def base_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a MoietyForPreTraining, from those of one or of WithPretrainingHeads."""
    return {name.removeprefix(MODEL): value for name, value in weights.items()}


def build(config: PretrainConfig, mixture: Mixture) -> tuple[nn.Module, list[Objective], list[Task]]:
    """What a recipe trains: the network, from random weights or from `start`, its objectives, and its tasks.

    Raises:
        InputError: no exported model at `start`; a task that no supervised source has a label for.
    """
    shape, objectives = config.model_config(), build_objectives(config.objectives)
    with quietly():
        base = MoietyForPreTraining.from_pretrained(config.start) if config.start else MoietyForPreTraining(shape)
    tasks = fit_tasks(config.tasks, mixture)
    if not tasks:
        base.heads, base.config.tasks = nn.ModuleDict(), None  # labels that are not learned here
        return base, objectives, []
    heads = {name: head for task in tasks for name, head in task.head().items()}
    if config.start:
        model = load_base(config.start, heads)
        for name, head in (base.config.tasks or {}).items():
            if name in heads and heads[name]["kind"] == head["kind"]:
                copy_head(base, name, model, name)
    else:
        model = MoietyForPrediction(type(shape)(**{**shape.to_dict(), "tasks": heads}))
    learned = [task.objective() for task in tasks]
    beside = [OnUnlabelled(objective, learned) for objective in objectives]
    return WithPretrainingHeads(model, base), [*beside, *learned], tasks


def fit_tasks(configs: Sequence[TaskConfig], mixture: Mixture) -> list[Task]:
    """Mean, spread and reference energies of each task, from all supervised structures of a mixture.

    Raises:
        InputError: none has the label of a task, or it has another unit there.
    """
    corpora = [source.corpus for source in mixture.supervised]
    structures = [s for corpus in corpora for s in corpus.read(range(len(corpus)), whole=True)] if configs else []
    tasks = []
    for config in configs:
        for corpus in corpora:
            config = config.in_units_of(corpus.manifest.get("units", {}), corpus.manifest["name"])
        tasks.append(Task.fit(config, structures))
    return tasks
