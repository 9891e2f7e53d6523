"""What is learned from labels: how a head reads it off the nodes, what its loss is, how an answer is scored."""
# Shapes: K classes.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moiety.errors import InputError
from moiety.models.modeling_moiety import TaskHead
from moiety.objectives.regression import Classification, Regression, Supervised
from moiety.tokens.labels import Label

Array = np.ndarray


class Spread(NamedTuple):
    """Mean and standard deviation of a label, in the task's unit: what the head's own numbers are measured in."""

    mean: float
    std: float


@dataclass(frozen=True)
class TaskConfig:
    """`label` is a label of the corpus, `kind` how the head reads it off the nodes (see TaskHead)."""

    label: str
    kind: str
    unit: str = ""
    classes: tuple[str, ...] = ()  # names, in the order of the numbers that the label has

    def __post_init__(self) -> None:
        kinds = [kind for kind in TaskHead.KINDS if kind != "energy"]
        if self.kind not in kinds:
            raise InputError(f"task.kind is {self.kind!r}; it must be one of {', '.join(kinds)}")
        if self.classifies != bool(self.classes):
            raise InputError(
                f"task.classes is {list(self.classes)}; kind 'classes' needs their names, no other has any"
            )

    @property
    def classifies(self) -> bool:
        return self.kind == "classes"

    @property
    def target(self) -> Label:
        per_node, shape = TaskHead.KINDS[self.kind]
        return Label(self.label, shape, per_node)

    def middle(self, values: Array) -> float:
        """Mean of labels [items, ...]; of the diagonal of matrices, and 0 for vectors, which have none that turns."""
        if self.kind == "vector":
            return 0.0
        return float((np.trace(values, axis1=1, axis2=2) / 3 if self.kind == "tensor" else values).mean())

    def spread(self, values: Array) -> Spread:
        """Of labels [items, ...] that are all known.

        Raises:
            InputError: all of them are the same.
        """
        if self.classifies:
            return Spread(0.0, 1.0)
        middle = self.middle(values)
        centred = values - middle * (np.eye(3) if self.kind == "tensor" else 1.0)
        std = float(np.sqrt(np.square(centred).mean()))
        if not std > 0:
            raise InputError(
                f"task.label {self.label!r}: all {len(values):,} labels are {middle:.6g}: nothing to learn"
            )
        return Spread(middle, std)

    def head(self, spread: Spread) -> dict[str, Any]:
        """The entry of MoietyConfig.tasks."""
        if self.classifies:
            return {"kind": self.kind, "classes": list(self.classes)}
        return {"kind": self.kind, "mean": spread.mean, "std": spread.std, "unit": self.unit}

    def objective(self, spread: Spread) -> Supervised:
        if self.classifies:
            return Classification(self.label, self.target)
        return Regression(self.label, self.target, spread.std)

    @property
    def metric(self) -> str:
        return "error" if self.classifies else "MAE"

    @property
    def metric_unit(self) -> str:
        return "%" if self.classifies else self.unit

    def answer(self, output: Array) -> Array:
        """What the head's output [items, ...] says: numbers as they are, logits as the number of the best class."""
        return output.argmax(-1).astype(np.float64) if self.classifies else output

    def error(self, answered: Array, true: Array) -> float:
        """MAE over items and components, or the percentage of wrong classes; what is not known is left out."""
        known = np.isfinite(true)
        if self.classifies:
            return float(100 * (answered[known] != true[known]).mean())
        return float(np.abs(answered - true)[known].mean())
