"""The .xyz of QM9: 15 properties in the second line, charges behind the coordinates, SMILES below; 1.2*^-6 for 1.2e-6.

Fields: tag, index, the properties A B C mu alpha homo lumo gap r2 zpve u0 u298 h298 g298 cv as they are printed (GHz,
debye, bohr^3, hartree, bohr^2, cal/(mol K)), symbols, positions, charges, smiles (first of two).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from moiety.data.validate import Rejected

PROPERTIES = (
    "A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv",
)  # fmt: skip
MAX_BYTES = 1 << 20


def records(stream: IO[bytes], _: object) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """The one molecule of a file; its key is its index in the data set."""
    lines = stream.read(MAX_BYTES).decode("ascii", "replace").splitlines()
    try:
        count = int(lines[0])
        tag, index, *values = lines[1].split()
        rows = [line.split() for line in lines[2 : 2 + count]]
        record: dict[str, Any] = dict(zip(PROPERTIES, map(number, values), strict=True))
        record |= {"tag": tag, "index": int(index), "symbols": [row[0] for row in rows]}
        record["positions"] = np.array([[number(cell) for cell in row[1:4]] for row in rows])
        record["charges"] = np.array([number(row[4]) for row in rows])
        record["smiles"] = lines[3 + count].split()[0]
    except (IndexError, ValueError) as error:
        yield "0", Rejected("unreadable", f"no molecule of QM9 ({error})")
        return
    yield str(index), record


def number(text: str) -> float:
    """A number as Mathematica prints it: 1.2*^-6 is 1.2e-6."""
    return float(text.replace("*^", "e"))
