"""Where the promises are tried out: corpora, a configuration, and runs of the subject."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.collections import g2

from moiety.data import parts
from moiety.data.convert import from_object
from moiety.data.shards import write_corpus
from moiety.data.structure import Structure
from moiety.testing.launched import Forked, Launched, Record, launcher_command, read_log

SUBJECT = Path(__file__).with_name("subject.py")
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
CONFIG = {
    "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "lmax": 2, "edge_channels": 8, "global_every": 2},
    "data": {"node_budget": 120, "edge_budget": 6000, "micro_batches": 4},
    "objectives": {"coordinates": {}, "types": {}, "cell": {}},
    "optimizer": {"lr": 1e-3, "warmup_steps": 10, "ema": 0.99},
    "training": {"steps": 60, "checkpoint_every": 5, "log_every": 1, "hang_timeout_s": 60},
}


@dataclass(frozen=True)
class Row:
    """One promise, what came out when it was tried, and whether it holds."""

    promise: str
    figure: str
    ok: bool
    seconds: float = 0.0


class Workspace:
    """A folder with real molecules, crystals and surfaces in small corpora, and the subject's configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "subject.yaml"
        self._finished: dict[tuple[object, ...], Path] = {}
        if not self.config.exists():
            folder.mkdir(parents=True, exist_ok=True)
            sources = []
            for name, atoms in (("molecules", molecules()), ("crystals", crystals()), ("surfaces", surfaces())):
                write_corpus(structures(name, atoms), folder / name)
                sources.append({"path": str(folder / name)})
            data = {**CONFIG["data"], "sources": sources, "split": "data"}
            self.config.write_text(yaml.safe_dump({**CONFIG, "data": data}))

    def start(
        self,
        name: str,
        *arguments: object,
        ranks: int = 1,
        launcher: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Forked | Launched:
        """A run of the subject in a folder of that name; again, to resume it."""
        words = ["--config", self.config, *arguments]
        if launcher:
            return Launched([*launcher_command(launcher, ranks), SUBJECT, *words], self.folder / name, environment)
        return Forked(SUBJECT, words, self.folder / name, ranks, environment)

    def corpus_in_shards(self) -> Path:
        """The molecules, eight at a time."""
        folder = self.folder / "in_shards"
        sizes = parts.CHUNK, parts.NODES_PER_SHARD
        parts.CHUNK, parts.NODES_PER_SHARD = 8, 1
        try:
            write_corpus(structures("molecule", molecules() * 2), folder)
        finally:
            parts.CHUNK, parts.NODES_PER_SHARD = sizes
        return folder

    def run(self, name: str, *arguments: object, ranks: int = 1) -> list[Record]:
        """The same to its end; the log."""
        started = self.start(name, *arguments, ranks=ranks)
        code = started.wait()
        assert code == 0, f"{name}: exit code {code}:\n{started.output[-3000:]}"
        return read_log(self.folder / name)

    def undisturbed(self, *arguments: object, ranks: int = 1) -> list[Record]:
        """The log of a run that nothing happened to; made once for the same arguments."""
        key = (ranks, *arguments)
        if key not in self._finished:
            name = f"undisturbed_{len(self._finished)}"
            self.run(name, *arguments, ranks=ranks)
            self._finished[key] = self.folder / name
        return read_log(self._finished[key])


def structures(name: str, found: Sequence[Atoms]) -> list[Structure]:
    """Structures whose ids are the name and a number."""
    converted = [from_object(atoms) for atoms in found]
    for number, structure in enumerate(converted):
        structure.id, structure.source = f"{name}-{number}", "ase"
    return converted


def timed(check: Callable[[], Row]) -> Row:
    """The row with the time that it took."""
    started = time.perf_counter()
    row = check()
    return Row(row.promise, row.figure, row.ok, time.perf_counter() - started)


def molecules() -> list[Atoms]:
    """The G2 set (Curtiss et al. 1997, doi 10.1063/1.473182), as ASE has it; more than one atom."""
    return [atoms for name in g2.names if len(atoms := molecule(name)) > 1]


def crystals() -> list[Atoms]:
    """Elements and rock salts, small supercells of them slightly rattled."""
    rng = np.random.default_rng(0)
    found = []
    for symbol in METALS:
        for repeat in ((1, 1, 1), (2, 1, 1), (2, 2, 1)):
            found.append(bulk(symbol, cubic=True) * repeat)
    for symbols, length in (("NaCl", 5.64), ("MgO", 4.21), ("LiF", 4.03), ("KBr", 6.60)):
        for repeat in ((1, 1, 1), (2, 1, 1)):
            found.append(bulk(symbols, "rocksalt", a=length, cubic=True) * repeat)
    for atoms in found:
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
    return found


def surfaces() -> list[Atoms]:
    """Close-packed metal surfaces, bare and with an adsorbed atom."""
    found = []
    for symbol in METALS:
        for adsorbate in ("", "O", "H"):
            slab = fcc111(symbol, size=(2, 2, 3), vacuum=6.0)
            if adsorbate:
                add_adsorbate(slab, adsorbate, 1.5, "fcc")
            found.append(slab)
    return found
