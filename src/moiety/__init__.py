"""Foundation models of matter: one equivariant transformer for molecules, crystals, surfaces and proteins.

Importing moiety registers its configuration, models and processor with transformers' Auto classes.
"""

from pathlib import Path

from moiety.auto import register
from moiety.data.structure import Structure
from moiety.errors import InputError
from moiety.models import conversion_moiety

__version__ = "0.1.0"
__all__ = ["InputError", "Structure", "__version__", "weights"]


def weights(name: str = "tiny") -> Path:
    """Directory of a pretrained model that comes with the package: `AutoModel.from_pretrained(moiety.weights())`.

    Its README.md is the model card; `adapters/` beside it holds what `moiety predict` answers with.

    Raises:
        InputError: none of that name.
    """
    released = Path(__file__).parent / "released"
    names = sorted(path.name for path in released.iterdir() if path.is_dir())
    if name not in names:
        raise InputError(f"no weights {name!r} come with moiety {__version__}; there are {', '.join(names)}")
    return released / name


def _read_path(path: str | Path) -> Structure:
    from moiety.data.readers import read_one  # gemmi, ASE and RDKit load when a file is read

    return read_one(path)


conversion_moiety.read_path = _read_path  # residues of proteins, verdicts with a remedy; ASE serves without moiety
register()
