"""The one record every reader produces and every shard stores: a structure, its labels, its provenance."""
# Shapes: N nodes (atoms or residues).

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moiety.models.vocabulary_moiety import FIRST_RESIDUE, MASK

Array = np.ndarray


@dataclass
class Structure:
    """Geometry, labels and provenance of one molecule, crystal, surface, complex, protein or field sample.

    Positions and offsets are float64, ids are int64; a label that is not known is None or absent.
    """

    node_type: Array  # [N] vocabulary id: atomic number 1-118, then residue types, then specials
    positions: Array  # [N, 3] Å; a residue stands at its CA
    domain: str = "molecule"  # molecule | crystal | surface | complex | protein | field
    id: str = ""  # unique within the source
    source: str = ""  # recipe or file the structure came from
    node_vectors: Array | None = None  # [N, 4, 3] Å, offsets of N, C, O, CB from CA; of a field: velocity, zeros
    cell: Array | None = None  # [3, 3] Å, rows are lattice vectors; None for open systems
    pbc: Array | None = None  # [3] bool; None = open in every direction
    charge: int = 0  # total charge, e
    spin: int = 1  # spin multiplicity 2S + 1
    role: Array | None = None  # [N] id into ROLES; None = unspecified everywhere
    chain: list[str] | None = None  # [N] chain name
    residue_index: Array | None = None  # [N] residue number as in the file
    energy: float | None = None  # eV, total
    forces: Array | None = None  # [N, 3] eV/Å
    stress: Array | None = None  # [3, 3] eV/Å^3, positive under tension
    dipole: Array | None = None  # [3] e·Å
    scalars: dict[str, float] = field(default_factory=dict)  # named labels; the unit stands in the manifest
    node_scalars: dict[str, Array] = field(default_factory=dict)  # name -> [N]
    tensors: dict[str, Array] = field(default_factory=dict)  # name -> any shape, the same in a corpus: [3, 3]
    node_tensors: dict[str, Array] = field(default_factory=dict)  # name -> [N, ...]: velocity [N, 3]
    text: list[str] = field(default_factory=list)  # names, descriptions
    theory: str = ""  # level of theory of the labels, e.g. "B3LYP/6-31G(2df,p)"
    groups: dict[str, str] = field(default_factory=dict)  # keys for splits: scaffold, prototype, cluster, date, split

    def __post_init__(self) -> None:
        self.node_type = np.asarray(self.node_type, dtype=np.int64)
        self.positions = np.asarray(self.positions, dtype=np.float64).reshape(-1, 3)

    @property
    def num_nodes(self) -> int:
        return len(self.node_type)

    @property
    def is_residue(self) -> Array:
        """[N] bool: nodes that are whole residues."""
        return (self.node_type >= FIRST_RESIDUE) & (self.node_type < MASK)

    @property
    def periodic(self) -> bool:
        return self.pbc is not None and bool(np.any(self.pbc))
