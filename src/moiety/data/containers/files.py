"""Structure files (SDF, extxyz, xyz, CIF, mmCIF, PDB) through moiety.data.readers.

Options: `all_atom`; `ligand: [FROM, TO]`, for complexes in two files: the ligand stands beside the protein, in the file
whose name has TO where the protein's has FROM (PDBbind: _protein.pdb, _ligand.sdf).
"""
# Shapes: N nodes of the protein, L of the ligand.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moiety.data.structure import Array, Structure
from moiety.data.validate import Rejected
from moiety.models.vocabulary_moiety import ROLE_ID


def records(path: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, Structure | Rejected]]:
    """Streams the structures of a file; the key is the number of the structure, from 0."""
    from moiety.data.readers import items

    for number, item in enumerate(items(path, options.get("all_atom", False))):
        found = item if isinstance(item, Rejected) else item.structure
        if isinstance(found, Structure) and "ligand" in options:
            first, second = options["ligand"]
            ligand = next(iter(items(path.with_name(path.name.replace(first, second)))))
            found = ligand if isinstance(ligand, Rejected) else with_ligand(found, ligand.structure)
        yield str(number), found


def with_ligand(protein: Structure, ligand: Structure) -> Structure:
    """Both as one structure: [N + L] nodes. The charge is the ligand's: that of the protein is not known."""
    vectors = np.zeros((protein.num_nodes, 4, 3)) if protein.node_vectors is None else protein.node_vectors
    role = np.full(protein.num_nodes, ROLE_ID["protein"]) if protein.role is None else protein.role
    index = np.zeros(protein.num_nodes, dtype=np.int64) if protein.residue_index is None else protein.residue_index

    def joined(values: Array, others: Array) -> Array:
        return np.concatenate([values, others])

    return replace(
        protein,
        node_type=joined(protein.node_type, ligand.node_type),
        positions=joined(protein.positions, ligand.positions),
        node_vectors=joined(vectors, np.zeros((ligand.num_nodes, 4, 3))),
        role=joined(role, np.full(ligand.num_nodes, ROLE_ID["ligand"])),
        residue_index=joined(index, np.zeros(ligand.num_nodes, dtype=np.int64)),
        chain=[*(protein.chain or [""] * protein.num_nodes), *["ligand"] * ligand.num_nodes],
        charge=ligand.charge,
        spin=ligand.spin,
    )
