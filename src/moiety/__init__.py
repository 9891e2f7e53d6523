"""Foundation models of matter: one equivariant transformer for molecules, crystals, surfaces and proteins.

Importing moiety registers its configuration, models and processor with transformers' Auto classes.
"""

from pathlib import Path

from moiety.auto import register
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models import conversion_moiety

__version__ = "0.1.0"
__all__ = ["InputError", "Structure", "__version__"]


def _read_path(path: str | Path) -> Structure:
    from moiety.data.readers import read_one  # gemmi, ASE and RDKit load when a file is read

    return read_one(path)


conversion_moiety.read_path = _read_path  # residues of proteins, verdicts with a remedy; ASE serves without moiety
register()
