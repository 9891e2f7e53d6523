"""What is learned from labels: how a head reads it off the nodes, what its loss is, how an answer is scored."""
# Shapes: n structures, K classes.

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moiety.adapters.references import References
from moiety.data.structure import Array, Structure
from moiety.errors import InputError
from moiety.models.heads_moiety import TaskHead
from moiety.models.vocabulary_moiety import AMINO_ACIDS
from moiety.objectives.regression import Classification, Regression, Supervised
from moiety.tokens.labels import RESIDUE, Label

DERIVED: dict[str, tuple[bool, tuple[int, ...]]] = {"forces": (True, (3,)), "stress": (False, (3, 3))}
KINDS = TaskHead.KINDS | DERIVED
ENERGY_UNITS = ("eV", "eV/atom")


@dataclass(frozen=True)
class TaskConfig:
    """`label` is a label of the corpus, `kind` how the head reads it off the nodes (see TaskHead).

    The kinds forces and stress have no head: they are derivatives of the task of kind energy beside them. An energy in
    eV/atom is scored, and weighs in the loss, per atom; predictions are total energies either way.
    """

    label: str
    kind: str
    unit: str = ""  # default: what the corpus says
    classes: tuple[str, ...] = ()  # names, in the order of the numbers that the label has
    weight: float = 1.0  # of its loss, which is in spreads of the label

    def __post_init__(self) -> None:
        where = f"tasks: {self.label}:"
        if self.kind not in KINDS:
            raise InputError(f"{where} kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if (self.kind == "classes") != bool(self.classes):
            raise InputError(
                f"{where} classes is {list(self.classes)}; kind 'classes' needs their names, no other has any"
            )
        if self.kind == "residues" and self.label != RESIDUE:
            raise InputError(f"{where} kind 'residues' learns the types of the residues; its label is {RESIDUE!r}")
        if self.kind in DERIVED and self.label != self.kind:
            raise InputError(f"{where} kind {self.kind!r} is a derivative of the energy; its label is {self.kind!r}")
        if self.kind == "energy" and self.unit not in ("", *ENERGY_UNITS):
            raise InputError(f"{where} unit is {self.unit!r}; kind energy has {' or '.join(ENERGY_UNITS)}")

    @property
    def label_unit(self) -> str:
        """Of the labels in the corpus."""
        return "eV" if self.kind == "energy" else self.unit

    def in_units_of(self, units: dict[str, str], where: str) -> TaskConfig:
        """The task with the unit that a corpus gives its label.

        Raises:
            InputError: the task says another one.
        """
        stored = units.get(self.label, "").split(",")[0].strip()
        if stored and self.label_unit not in ("", stored):
            raise InputError(
                f"tasks: {self.label}: unit is {self.label_unit!r}, but {where} has {stored!r}; leave the unit out, or "
                "convert the labels"
            )
        return self if self.unit else dataclasses.replace(self, unit=stored)


def require_consistent(tasks: Sequence[TaskConfig]) -> None:
    """InputError where tasks do not go together: names that come twice, forces without an energy."""
    if not tasks:
        raise InputError("tasks is empty; name at least one: [{label: dipole, kind: dipole_norm}]")
    names = [task.label for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"tasks: {', '.join(twice)} comes twice")
    energies = [task.label for task in tasks if task.kind == "energy"]
    derived = [task.label for task in tasks if task.kind in DERIVED]
    if len(energies) > 1 or (derived and not energies):
        raise InputError(
            f"tasks: {', '.join(energies + derived)}: one task of kind energy is needed for forces or stress, and no "
            "more than one; forces read off the nodes are of kind vector"
        )


@dataclass(frozen=True)
class Task:
    """A task and what its training labels say: mean and spread in its unit, and reference energies."""

    config: TaskConfig
    mean: float = 0.0
    std: float = 1.0
    node_std: float = 1.0  # of sums over nodes: spread of the part of a node
    references: References | None = field(default=None, repr=False)
    num_labels: int = 0  # known ones, of structures or of nodes

    @classmethod
    def fit(cls, config: TaskConfig, train: Sequence[Structure]) -> Task:
        """From structures, some of which may be without the label.

        Raises:
            InputError: no label is known, or all of them are the same; or the kind does not read such structures.
        """
        bare = cls(config)
        labelled = [s for s in train if bare.label.of(s) is not None]
        if odd := [s for s in labelled if config.kind == "interaction" and (s.periodic or s.is_residue.any())]:
            raise InputError(
                f"tasks: {config.label}: kind 'interaction' takes molecules of atoms apart; {odd[0].id} "
                f"{'is periodic' if odd[0].periodic else 'has residues'}; leave it out, or choose another kind"
            )
        if config.kind in TaskHead.WITH_REFERENCES and labelled:
            energies = np.array([bare.label.of(s) for s in labelled], dtype=np.float64)
            energies *= [s.num_nodes if bare.averages else 1 for s in labelled]
            references = References.fit(labelled, energies, by_theory=config.kind == "energy")
            bare = dataclasses.replace(bare, references=references)
        values = bare.labels(labelled)
        if not labelled or not len(values := values[known(values)]):
            raise InputError(f"tasks: {config.label}: no training structure has this label")
        bare = dataclasses.replace(bare, num_labels=len(values))
        if bare.classifies:
            return bare
        mean, centred = bare.centred(values, labelled)
        std = float(np.sqrt(np.square(centred).mean()))
        if not std > 1e-12 * max(1.0, abs(mean)):
            raise InputError(
                f"tasks: {config.label}: all {len(values):,} labels are {mean:.6g}"
                f"{' an atom' if config.kind == 'energy' else ''}: nothing to learn"
            )
        sizes = np.array([s.num_nodes for s in labelled])
        node_std = std if bare.per_atom or bare.averages else std / float(np.sqrt(sizes.mean()))
        return dataclasses.replace(bare, mean=mean, std=std, node_std=node_std)

    @property
    def name(self) -> str:
        return self.config.label

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def classifies(self) -> bool:
        return self.kind in ("classes", "residues")

    @property
    def class_names(self) -> list[str]:
        return list(self.config.classes or AMINO_ACIDS)

    @property
    def per_atom(self) -> bool:
        return self.kind == "energy" and self.config.unit == "eV/atom"

    @property
    def averages(self) -> bool:
        return self.kind == "average"

    @cached_property
    def label(self) -> Label:
        per_node, shape = KINDS[self.kind]
        align = self.references.aligned if self.references and self.kind == "energy" else None
        return Label(self.name, shape, per_node, align)

    def labels(self, structures: Sequence[Structure]) -> Array:
        """[items, ...] float64 in the task's unit, NaN where one is not known."""
        if not structures:
            return np.empty((0, *self.label.shape))
        return self._in_unit(self.label.values(structures).numpy(), structures)

    def _in_unit(self, values: Array, structures: Sequence[Structure]) -> Array:
        return values / [s.num_nodes for s in structures] if self.per_atom else values

    def middle(self, values: Array) -> float:
        """Mean of labels [items, ...]; of the diagonal of matrices, and 0 for vectors, which have none that turns."""
        if self.label.shape == (3,):
            return 0.0
        return float((np.trace(values, axis1=1, axis2=2) / 3 if self.label.shape == (3, 3) else values).mean())

    def centred(self, values: Array, structures: Sequence[Structure]) -> tuple[float, Array]:
        """Mean, and labels less what it explains; 0 for energies, less the references, and where 0 has a meaning."""
        if self.references:
            return 0.0, values - self.by_references(structures)
        if self.kind == "interaction":
            return 0.0, values
        mean = self.middle(values)
        return mean, values - mean * (np.eye(3) if self.label.shape == (3, 3) else 1.0)

    def by_references(self, structures: Sequence[Structure]) -> Array:
        """[n] what the elements alone say, in the task's unit."""
        assert self.references is not None
        totals = np.array([self.references.total(s, self.references.main) for s in structures])
        return totals / [s.num_nodes if self.per_atom or self.averages else 1 for s in structures]

    def head(self) -> dict[str, dict[str, Any]]:
        """The entry of MoietyConfig.tasks; none for a derivative."""
        if self.kind in DERIVED:
            return {}
        spec: dict[str, Any] = {"kind": self.kind}
        if self.references:
            spec |= {"std": self.node_std, "unit": self.config.label_unit, "references": self.references.elements}
        elif self.kind == "classes":
            spec["classes"] = list(self.config.classes)
        elif not self.classifies:
            spec |= {"mean": self.mean, "std": self.std, "unit": self.config.unit}
        return {self.name: spec}

    def objective(self) -> Supervised:
        if self.classifies:
            return Classification(self.name, self.label, self.config.weight)
        return Regression(self.name, self.label, self.std, self.config.weight, self.per_atom)

    @property
    def metric(self) -> str:
        return "error" if self.classifies else "MAE"

    @property
    def metric_unit(self) -> str:
        return "%" if self.classifies else self.config.unit

    def answer(self, output: Array, structures: Sequence[Structure]) -> Array:
        """What the output [items, ...] says in the task's unit; logits become the number of the best class."""
        if self.classifies:
            return output.argmax(-1).astype(np.float64)
        return self._in_unit(output, structures)

    def error(self, answered: Array, true: Array) -> float:
        """MAE over items and components, or the percentage of wrong classes; what is not known is left out."""
        there = np.isfinite(true)
        if self.classifies:
            return float(100 * (answered[there] != true[there]).mean())
        return float(np.abs(answered - true)[there].mean())


def known(labels: Array) -> Array:
    """[items] bool: where all of a label is there."""
    return np.asarray(np.isfinite(labels).reshape(len(labels), -1).all(axis=1))


def lines_of(tasks: Sequence[Task]) -> Iterator[str]:
    """What the training labels say: how many, mean and spread, reference energies."""
    for task in tasks:
        line = f"{task.name}: {task.num_labels:,} training labels"
        if not task.classifies:
            about = "the reference energies" if task.references else f"{task.mean:.4g}"
            line += f", spread {_with_unit(f'{task.std:.4g}', task.config.unit)} about {about}"
        yield line
        for theory, elements in (task.references.of_theory if task.references else {}).items():
            values = "  ".join(f"{symbol} {energy:.4f}" for symbol, energy in elements.items())
            level = f" at the level {theory}" if theory else ""
            of_elements = _with_unit("references of the elements", task.config.label_unit)
            yield f"{of_elements} by least squares{level}: {values}"


def _with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}" if unit else text
