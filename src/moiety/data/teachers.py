"""Teachers: models that label structures where no measurement and no DFT is at hand. A teacher is named in `theory`.

SevenNet-0 (Park et al. 2024, doi:10.1021/acs.jctc.4c00190) labels crystals and surfaces, GFN2-xTB (Bannwarth et al.
2019, doi:10.1021/acs.jctc.8b01176) open molecules, with their answer to an electric field too. Pretraining may learn
from others: of molecules from GFN1-xTB (Grimme et al. 2017, doi:10.1021/acs.jctc.7b00118), of crystals from CHGNet
(Deng et al. 2023, doi:10.1038/s42256-023-00716-3) at the level of r2SCAN (Huang et al. 2025,
doi:10.1038/s41524-025-01796-y). All come with the extra `moiety[labels]`, weights included. Labels are kept in
$MOIETY_CACHE/labels under a hash of teacher, version and structure, so that a rebuild takes seconds.
"""
# Shapes: N nodes.

from __future__ import annotations

import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from moiety.data.download import cache_dir
from moiety.data.structure import Array, Structure
from moiety.errors import InputError

DIGEST_BYTES = 16
DEBYE = 0.20819433  # e·Å
FIELD = 5e-4  # hartree/(e bohr), for finite differences: polarizabilities at half of it differ by 2e-5 of themselves


@dataclass(frozen=True)
class Labels:
    """What a teacher says of one structure."""

    energy: float  # eV
    forces: Array  # [N, 3] eV/Å
    stress: Array | None = None  # [3, 3] eV/Å^3, positive under tension; None unless periodic in three directions

    def pack(self) -> bytes:
        stress = np.zeros(0) if self.stress is None else self.stress
        return np.concatenate([[self.energy], np.ravel(self.forces), np.ravel(stress)]).astype("<f8").tobytes()

    @classmethod
    def unpack(cls, data: bytes, num_nodes: int) -> Labels:
        numbers = np.frombuffer(data, "<f8")
        split = 1 + 3 * num_nodes
        stress = numbers[split:].reshape(3, 3).copy() if len(numbers) > split else None
        return cls(float(numbers[0]), numbers[1:split].reshape(-1, 3).copy(), stress)

    def fill(self, structure: Structure) -> None:
        structure.energy, structure.forces, structure.stress = self.energy, self.forces, self.stress


@dataclass(frozen=True)
class Response:
    """What a teacher says of a molecule in an electric field; it must be neutral, or the dipole has no meaning."""

    dipole: Array  # [3] e·Å, without the field
    polarizability: Array  # [3, 3] bohr^3, symmetric

    def pack(self) -> bytes:
        return np.concatenate([self.dipole, np.ravel(self.polarizability)]).astype("<f8").tobytes()

    @classmethod
    def unpack(cls, data: bytes, num_nodes: int) -> Response:
        numbers = np.frombuffer(data, "<f8").copy()
        return cls(numbers[:3], numbers[3:].reshape(3, 3))

    def fill(self, structure: Structure) -> None:
        structure.dipole = self.dipole
        structure.tensors["polarizability"] = self.polarizability


@dataclass(frozen=True)
class Electronic:
    """What a teacher with orbitals says of a molecule; it must be neutral, or the dipole has no meaning."""

    energy: float  # eV
    forces: Array  # [N, 3] eV/Å
    charges: Array  # [N] e, Mulliken
    dipole: Array  # [3] e·Å
    gap: float  # eV, between the highest occupied orbital and the lowest empty one

    def pack(self) -> bytes:
        parts = [[self.energy, self.gap], self.dipole, self.charges, np.ravel(self.forces)]
        return np.concatenate(parts).astype("<f8").tobytes()

    @classmethod
    def unpack(cls, data: bytes, num_nodes: int) -> Electronic:
        numbers = np.frombuffer(data, "<f8").copy()
        charges, forces = np.split(numbers[5:], [num_nodes])
        return cls(float(numbers[0]), forces.reshape(-1, 3), charges, numbers[2:5], float(numbers[1]))

    def fill(self, structure: Structure) -> None:
        structure.energy, structure.forces, structure.dipole = self.energy, self.forces, self.dipole
        structure.scalars |= {"gap": self.gap, "dipole": float(np.linalg.norm(self.dipole)) / DEBYE}
        structure.node_scalars["mulliken"] = self.charges


Kind = TypeVar("Kind", Labels, Response, Electronic)


class NotConverged(Exception):
    """A teacher found no answer for a structure that it should know."""


class Teacher(Protocol[Kind]):
    """Something that labels one structure at a time, on one core."""

    theory: str  # for Structure.theory and the manifest
    package: str  # distribution whose version counts
    gives: type[Kind]

    def knows(self, structure: Structure) -> bool:
        """False where the structure holds an element the teacher has not seen."""
        ...

    def label(self, structure: Structure) -> Kind:
        """Labels of one structure it knows: energy, forces and, for crystals, stress; or the response to a field.

        Raises:
            NotConverged: there is no answer.
        """
        ...


class SevenNet0:
    """The universal potential SevenNet-0 (11 July 2024), trained on MPtrj (PBE and PBE+U): a model, not DFT."""

    theory = "SevenNet-0 (teacher model, not DFT)"
    package = "sevenn"
    gives = Labels

    @cached_property
    def _calculator(self) -> Any:
        import torch
        from sevenn.calculator import SevenNetCalculator  # pyright: ignore[reportMissingImports]

        with warnings.catch_warnings(), torch.serialization.safe_globals(_arrays_only()), _forced_weights_only():
            warnings.simplefilter("ignore")  # accelerators that are not installed
            return SevenNetCalculator("7net-0", device="cpu")

    def knows(self, structure: Structure) -> bool:
        return all(number in self._calculator.type_map for number in set(structure.node_type.tolist()))

    def label(self, structure: Structure) -> Labels:
        from ase import Atoms

        from moiety.threads import one_thread  # here, as torch above: most recipes need neither

        atoms = Atoms(structure.node_type, structure.positions, cell=structure.cell, pbc=structure.pbc)
        with one_thread():
            self._calculator.calculate(atoms)
        results = self._calculator.results
        stress = results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3) if atoms.pbc.all() else None
        return Labels(float(results["energy"]), results["forces"].astype(np.float64), stress)


class CHGNetR2SCAN:
    """The universal potential CHGNet, carried over to the functional r2SCAN: a model, not DFT. For crystals."""

    theory = "r2SCAN by CHGNet (teacher model, not DFT)"
    package = "chgnet"
    gives = Labels

    @cached_property
    def _model(self) -> Any:
        from importlib.resources import files

        import torch
        from chgnet.model import CHGNet  # pyright: ignore[reportMissingImports]

        (path,) = (p for p in files("chgnet").joinpath("pretrained/r2scan").iterdir() if p.name.endswith(".pth.tar"))
        with path.open("rb") as file:  # read here: chgnet itself would unpickle freely
            saved = torch.load(file, map_location="cpu", weights_only=True)["model"]
        with redirect_stdout(StringIO()):
            return CHGNet.from_dict(saved, mlp_out_bias=False).eval()  # as CHGNet.load has it for these weights

    def knows(self, structure: Structure) -> bool:
        return structure.pbc is not None and bool(structure.pbc.all()) and int(structure.node_type.max()) <= 94

    def label(self, structure: Structure) -> Labels:
        from ase.units import GPa
        from pymatgen.core import Lattice
        from pymatgen.core import Structure as Crystal

        from moiety.threads import one_thread

        assert structure.cell is not None
        lattice = Lattice(structure.cell)
        crystal = Crystal(lattice, structure.node_type.tolist(), structure.positions, coords_are_cartesian=True)
        try:
            with one_thread(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about how chgnet reads a number
                found = self._model.predict_structure(crystal, task="efs")
        except ValueError as error:
            if "isolated atom" in str(error):
                raise NotConverged(str(error)) from error
            raise
        energy = float(found["e"]) * structure.num_nodes
        stress = found["s"].astype(np.float64) * GPa
        return Labels(energy, found["f"].astype(np.float64), (stress + stress.T) / 2)  # symmetric but for rounding


class GFN2xTB:
    """The semi-empirical method GFN2-xTB, for open systems of elements up to radon."""

    theory = "GFN2-xTB"
    package = "tblite"
    gives = Labels

    def knows(self, structure: Structure) -> bool:
        return not structure.periodic and int(structure.node_type.max()) <= 86

    def label(self, structure: Structure) -> Labels:
        from ase.units import Bohr, Hartree

        result = _converged(_xtb(structure))
        return Labels(result.get("energy") * Hartree, -result.get("gradient") * Hartree / Bohr)


class GFN2xTBResponse:
    """Dipole and polarizability by GFN2-xTB: central differences of the dipole between homogeneous fields +-FIELD."""

    theory = GFN2xTB.theory
    package = GFN2xTB.package
    gives = Response

    def knows(self, structure: Structure) -> bool:
        return structure.charge == 0 and GFN2xTB().knows(structure)

    def label(self, structure: Structure) -> Response:
        from ase.units import Bohr

        fields = FIELD * np.eye(3)
        rows = [self._dipole(structure, field) - self._dipole(structure, -field) for field in fields]
        slopes = np.stack(rows) / (2 * FIELD)
        return Response(self._dipole(structure, np.zeros(3)) * Bohr, (slopes + slopes.T) / 2)

    def _dipole(self, structure: Structure, field: Array) -> Array:
        """[3] e·bohr in a field [3] hartree/(e bohr), converged a hundred times more tightly than energies need it."""
        from tblite import library  # pyright: ignore[reportMissingImports]

        calculator = _xtb(structure)
        calculator.set("accuracy", 0.01)
        calculator.add("electric-field", library.ffi.new("double[3]", field.tolist()))  # it hands on what it gets, to C
        return _converged(calculator).get("dipole")


class GFN1xTB:
    """The semi-empirical method GFN1-xTB, for neutral closed-shell molecules of elements up to radon."""

    theory = "GFN1-xTB"
    package = "tblite"
    gives = Electronic

    def knows(self, structure: Structure) -> bool:
        return (structure.charge, structure.spin) == (0, 1) and GFN2xTB().knows(structure)

    def label(self, structure: Structure) -> Electronic:
        from ase.units import Bohr, Hartree

        result = _converged(_xtb(structure, self.theory))
        levels, occupied = result.get("orbital-energies"), result.get("orbital-occupations") > 1
        return Electronic(
            energy=result.get("energy") * Hartree,
            forces=-result.get("gradient") * Hartree / Bohr,
            charges=result.get("charges"),
            dipole=result.get("dipole") * Bohr,
            gap=float(levels[~occupied].min() - levels[occupied].max()) * Hartree,
        )


def _xtb(structure: Structure, method: str = GFN2xTB.theory) -> Any:
    from ase.units import Bohr
    from tblite.interface import Calculator  # pyright: ignore[reportMissingImports]

    numbers, positions = structure.node_type, structure.positions / Bohr
    calculator = Calculator(method, numbers, positions, float(structure.charge), structure.spin - 1)
    calculator.set("verbosity", 0)
    return calculator


def _converged(calculator: Any) -> Any:
    from tblite.exceptions import TBLiteRuntimeError  # pyright: ignore[reportMissingImports]

    try:
        return calculator.singlepoint()
    except TBLiteRuntimeError as error:
        if "not converged" in str(error):
            raise NotConverged(str(error)) from error
        raise


def available(teacher: Teacher[Any]) -> bool:
    """Whether the teacher's package is installed."""
    try:
        version(teacher.package)
    except PackageNotFoundError:
        return False
    return True


class Labeller(Generic[Kind]):
    """A teacher with a memory. Use as a context: `with Labeller(SevenNet0()) as labeller: labeller(structure)`.

    Raises:
        InputError: the teacher's package is not installed.
    """

    def __init__(self, teacher: Teacher[Kind]) -> None:
        if not available(teacher):
            raise InputError(f"{teacher.theory} needs {teacher.package}: pip install 'moiety[labels]'")
        self.teacher = teacher
        self.name = f"{type(teacher).__name__}-{version(teacher.package)}"
        folder = cache_dir() / "labels"
        folder.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(folder / f"{self.name}.sqlite", timeout=60, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")  # several workers write at the same time
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS labels (key BLOB PRIMARY KEY, data BLOB, digest BLOB)")

    def __enter__(self) -> Labeller[Kind]:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def __call__(self, structure: Structure) -> Kind:
        """Labels of a structure, from the cache where they are there and whole, else computed and kept."""
        key = self.key(structure)
        with closing(self._database.execute("SELECT data, digest FROM labels WHERE key = ?", (key,))) as rows:
            row = rows.fetchone()
        if row is not None and row[1] == _digest(key + row[0]):
            return self.teacher.gives.unpack(row[0], structure.num_nodes)
        labels = self.teacher.label(structure)
        data = labels.pack()
        self._database.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", (key, data, _digest(key + data)))
        return labels

    def key(self, structure: Structure) -> bytes:
        """A hash of the teacher, its version, and of all it looks at."""
        cell = np.zeros((3, 3)) if structure.cell is None else structure.cell
        pbc = np.zeros(3) if structure.pbc is None else structure.pbc
        parts = [structure.node_type, structure.positions, cell, pbc, [structure.charge, structure.spin]]
        return _digest(self.name.encode() + b"".join(np.asarray(part, "<f8").tobytes() for part in parts))

    def applied(self, structures: Iterable[Structure]) -> Iterator[Structure]:
        """Structures with labels and theory filled in; those that the teacher has no answer for pass as they are."""
        for structure in structures:
            if self.teacher.knows(structure):
                with suppress(NotConverged):
                    self(structure).fill(structure)
                    structure.theory = self.teacher.theory
            yield structure


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@contextmanager
def _forced_weights_only() -> Iterator[None]:
    """sevenn loads its checkpoint as a free pickle; here torch lets only tensors and the allowed names through."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _arrays_only() -> list[Any]:
    """What sevenn's checkpoint holds besides tensors: numpy arrays, which build numbers and nothing else."""
    import numpy._core.multiarray as multiarray

    kinds = {type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")}
    named = [(getattr(multiarray, name), f"numpy.core.multiarray.{name}") for name in ("_reconstruct", "scalar")]
    return [*named, np.ndarray, np.dtype, *kinds]
