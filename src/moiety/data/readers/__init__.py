"""Structure files: one small module a container family; the parsing itself is left to ASE, gemmi and RDKit.

| suffix | parser | structures in a file |
|---|---|---|
| .xyz .extxyz | ASE | every frame |
| .cif (small-molecule and inorganic) | gemmi | every data block with atoms, symmetry expanded |
| .cif .mmcif (mmCIF), .pdb .ent | gemmi | one, of the first model; residues by default |
| .sdf .mol | RDKit | every record |

Any of them may be compressed (.gz, .xz).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from moiety.data.readers.text import read_text
from moiety.data.structure import Structure
from moiety.data.validate import Noted, Rejected, verdicts
from moiety.errors import InputError

COMPRESSED = (".gz", ".xz")
XYZ = (".xyz", ".extxyz")
SDF = (".sdf", ".mol", ".sd")
CIF = (".cif", ".mmcif")
PDB = (".pdb", ".ent")


def read_structures(path: str | Path, all_atom: bool = False) -> Iterator[Structure]:
    """The structures of a file, in order.

    Args:
        path: a structure file.
        all_atom: one node an atom where proteins are otherwise read as residues.

    Raises:
        InputError: at the first structure that is unusable, with its place, the reason and the remedy.
    """
    for verdict in verdicts(path, all_atom):
        if verdict.structure is None:
            where = f"{verdict.file}, structure {verdict.index}"
            raise InputError(f"{where}: {verdict.reason} [{verdict.code}]; {verdict.remedy}")
        yield verdict.structure


def read_one(path: str | Path, all_atom: bool = False) -> Structure:
    """The only structure of a file; InputError where it holds several."""
    found = list(read_structures(path, all_atom))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} structures; read them with moiety.data.readers.read_structures")
    return found[0]


def structure_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files meant by a list of files and folders: a folder stands for all its files, sorted, hidden ones left out.

    Raises:
        InputError: a path does not exist, or a folder holds no file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            if not inside:
                raise InputError(f"{path}: the folder holds no files; give structure files (.xyz, .cif, .pdb, .sdf)")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder; check the path")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def items(path: Path, all_atom: bool = False) -> Iterator[Noted | Rejected]:
    """What a file holds, in order: structures as parsed, not yet checked, and reasons where parsing failed."""
    try:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        suffix = next((s for s in reversed(suffixes) if s not in COMPRESSED), "")
        if suffix not in XYZ + SDF + CIF + PDB:
            raise Rejected("unknown-format", f"the suffix {suffix!r} is of no known format")
        for index, item in enumerate(_parse(read_text(path), suffix, all_atom)):
            if isinstance(item, Noted):
                item.structure.id, item.structure.source = f"{path.name}#{index}", path.name
            yield item
    except Rejected as rejected:
        yield rejected


def _parse(text: str, suffix: str, all_atom: bool) -> Iterator[Noted | Rejected]:
    """The items of one file's text. Each parser library is imported with its reader, at first use."""
    if suffix in XYZ:
        from moiety.data.readers import xyz

        return xyz.read(text)
    if suffix in SDF:
        from moiety.data.readers import sdf

        return sdf.read(text)
    if suffix in PDB:
        from moiety.data.readers import macromolecule

        return macromolecule.read_pdb(text, all_atom)
    from moiety.data.readers import cif

    return cif.read(text, all_atom)


__all__ = ["items", "read_one", "read_structures", "structure_files"]
