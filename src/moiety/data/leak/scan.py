"""Two sets of structures in, what of the second stands in the first out: one finding a structure, the gravest first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moiety.data.leak import crystals, molecules, proteins
from moiety.data.leak.fingerprint import composition, fingerprint, within
from moiety.data.structure import Structure

TOLERANCE = 0.05  # Å, root mean square deviation of a near duplicate
KINDS = ("exact", "near", "same-molecule", "stereoisomer", "sequence-90", "sequence-30")
DUPLICATES = KINDS[:3]

Members = dict[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class Leak:
    """A structure of the test set, and its closest relative in the training set."""

    kind: str  # one of KINDS
    train: str  # id
    test: str  # id
    evidence: dict[str, Any]  # the numbers the verdict rests on


@dataclass
class Report:
    """What was found, and what two sets share without being the same."""

    num_train: int
    num_test: int
    leaks: list[Leak] = field(default_factory=list)
    shared: dict[str, dict[str, int]] = field(default_factory=dict)  # scaffold, prototype: see `_shared`
    rejected: dict[str, int] = field(default_factory=dict)  # train, test: what could not be read

    def counts(self) -> dict[str, int]:
        found = Counter(leak.kind for leak in self.leaks)
        return {kind: found[kind] for kind in KINDS}

    @property
    def num_duplicates(self) -> int:
        """Structures of test that stand in train, as they are, moved a little, or in another conformation."""
        return sum(leak.kind in DUPLICATES for leak in self.leaks)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts()}


def scan(train: Sequence[Structure], test: Sequence[Structure], tolerance: float = TOLERANCE) -> Report:
    """Looks for every structure of test in train.

    Args:
        train: the structures a model may learn from.
        test: the structures it is measured on.
        tolerance: Å, root mean square deviation up to which geometries are near duplicates.

    Returns:
        At most one finding of geometry or chemistry, and one of sequence, for each structure of test.
    """
    report = Report(len(train), len(test))
    members_train, members_test = _by_composition(train), _by_composition(test)
    common = [key for key in members_test if key in members_train]
    for key in common:
        report.leaks += _same_geometry(train, test, members_train[key], members_test[key], tolerance)
    found = {leak.test for leak in report.leaks}
    train_bonds, test_bonds = _Bonds(train), _Bonds(test)
    for key in common:
        waiting = [place for place in members_test[key] if test[place].id not in found]
        report.leaks += _same_molecule(train_bonds, test_bonds, members_train[key], waiting)
    report.leaks += _same_sequence(train, test, found)
    report.leaks.sort(key=lambda leak: (KINDS.index(leak.kind), leak.test))
    report.shared = {
        "scaffold": _shared(train_bonds.scaffolds(), test_bonds.scaffolds()),
        "prototype": _shared(_prototypes(train), _prototypes(test)),
    }
    return report


def _by_composition(structures: Sequence[Structure]) -> Members:
    members: Members = defaultdict(list)
    for place, structure in enumerate(structures):
        members[composition(structure)].append(place)
    return dict(members)


def _same_geometry(
    train: Sequence[Structure], test: Sequence[Structure], in_train: list[int], in_test: list[int], tolerance: float
) -> list[Leak]:
    """Exact and near duplicates within one composition: candidates by fingerprint, confirmed by superposition."""
    periodic = train[in_train[0]].periodic
    rows_train = np.stack([fingerprint(train[place]) for place in in_train])
    rows_test = np.stack([fingerprint(test[place]) for place in in_test])
    confirm = _confirm_crystals(train, test, tolerance) if periodic else _confirm_molecules(train, test, tolerance)
    leaks = []
    reach = 2 * tolerance if periodic else tolerance
    for row, place, candidates in zip(rows_test, in_test, within(rows_train, rows_test, reach), strict=True):
        for candidate in candidates:
            evidence = confirm(in_train[candidate], place)
            if evidence is None:
                continue
            apart = float(np.linalg.norm(rows_train[candidate] - row))
            exact = max(apart, evidence["rmsd"]) <= molecules.EXACT
            exact = exact and not evidence.get("mirrored") and "charges" not in evidence
            kind = "exact" if exact else "near"
            evidence |= {"rmsd": round(evidence["rmsd"], 5), "fingerprint": round(apart, 5)}
            leaks.append(Leak(kind, train[in_train[candidate]].id, test[place].id, evidence))
            break
    return leaks


def _confirm_molecules(
    train: Sequence[Structure], test: Sequence[Structure], tolerance: float
) -> Callable[[int, int], dict[str, Any] | None]:
    def confirm(i: int, j: int) -> dict[str, Any] | None:
        found = molecules.superpose(train[i], test[j], tolerance)
        if found is None:
            return None
        charges = {"charges": [train[i].charge, test[j].charge]} if train[i].charge != test[j].charge else {}
        return {"rmsd": found.rmsd, "mirrored": found.mirrored, **charges}

    return confirm


def _confirm_crystals(
    train: Sequence[Structure], test: Sequence[Structure], tolerance: float
) -> Callable[[int, int], dict[str, Any] | None]:
    cells: dict[int, Any] = {}

    def cell(structure: Structure) -> Any:
        if id(structure) not in cells:
            cells[id(structure)] = crystals.primitive(structure, 2 * tolerance)
        return cells[id(structure)]

    def confirm(i: int, j: int) -> dict[str, Any] | None:
        rms = crystals.matched_rms(cell(train[i]), cell(test[j]))
        return None if rms is None or rms > tolerance else {"rmsd": rms}

    return confirm


class _Bonds:
    """The bonds of a set of structures, perceived when asked for and kept as strings."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self.structures = structures
        self._constitution: dict[int, str] = {}

    def constitution(self, place: int) -> str:
        """ "" for what has no bonds to perceive."""
        if place not in self._constitution:
            molecule = molecules.bonded(self.structures[place])
            self._constitution[place] = molecules.constitution(molecule) if molecule is not None else ""
        return self._constitution[place]

    def stereo(self, place: int) -> molecules.Stereo:
        molecule = molecules.bonded(self.structures[place])
        assert molecule is not None  # asked for only where there is a constitution
        return molecules.stereo(molecule, self.structures[place].charge)

    def scaffolds(self) -> list[str]:
        found = (molecules.bonded(structure) for structure in self.structures)
        return [molecules.scaffold(molecule) if molecule is not None else "" for molecule in found]


def _same_molecule(train: _Bonds, test: _Bonds, in_train: list[int], in_test: list[int]) -> list[Leak]:
    """The same atoms bonded in the same way in another conformation, or with another stereo."""
    partners: dict[str, list[int]] = defaultdict(list)
    for place in in_train if in_test else []:
        partners[train.constitution(place)].append(place)
    leaks = []
    for place in in_test:
        found = partners.get(test.constitution(place), []) if test.constitution(place) else []
        if not found:
            continue
        stereo = test.stereo(place)
        same = [other for other in found if train.stereo(other).agrees(stereo)]
        kind = "same-molecule" if same else "stereoisomer"
        evidence = {"smiles": stereo.smiles, "partners": len(same or found)}
        leaks.append(Leak(kind, train.structures[(same or found)[0]].id, test.structures[place].id, evidence))
    return leaks


def _same_sequence(train: Sequence[Structure], test: Sequence[Structure], found: set[str]) -> list[Leak]:
    """The closest relative of each chain: most identical residues. Those found by geometry already are left out."""
    with_residues = [
        [place for place, structure in enumerate(structures) if structure.is_residue.any()]
        for structures in (train, test)
    ]
    in_train, in_test = with_residues[0], [place for place in with_residues[1] if test[place].id not in found]
    best: dict[int, proteins.Relative] = {}
    pairs = proteins.relatives(
        [proteins.sequence(train[place]) for place in in_train], [proteins.sequence(test[place]) for place in in_test]
    )
    for pair in pairs:
        if (
            pair.second not in best
            or pair.identity * pair.length > best[pair.second].identity * best[pair.second].length
        ):
            best[pair.second] = pair
    leaks = []
    for pair in best.values():
        close = pair.identity >= proteins.CLOSE and pair.coverage >= proteins.CLOSE_COVERAGE
        evidence = {
            "identity": round(pair.identity, 3),
            "coverage": round(pair.coverage, 3),
            "length": pair.length,
            "score": pair.score,
        }
        kind = "sequence-90" if close else "sequence-30"
        if pair.identity >= proteins.DISTANT:
            leaks.append(Leak(kind, train[in_train[pair.first]].id, test[in_test[pair.second]].id, evidence))
    return leaks


def _prototypes(structures: Sequence[Structure]) -> list[str]:
    from moiety.data.prototypes import prototype  # pymatgen reads all known prototypes with it, for seconds

    periodic = [s for s in structures if s.periodic and s.domain == "crystal"]
    return [structure.groups.get("prototype") or prototype(structure) for structure in periodic]


def _shared(train: list[str], test: list[str]) -> dict[str, int]:
    """How many labels test has, how many of them training has too, and how many structures of test carry either."""
    known = set(train) - {""}
    labels = set(test) - {""}
    return {
        "labels": len(labels),
        "labels_in_train": len(labels & known),
        "structures": sum(label != "" for label in test),
        "structures_with_label_in_train": sum(label in known for label in test),
    }
