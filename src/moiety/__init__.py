"""Foundation models of matter: one equivariant transformer for molecules, crystals, surfaces and proteins.

Importing moiety registers its configuration, models and processor with transformers' Auto classes.
"""

from moiety.auto import register
from moiety.data.structure import Structure
from moiety.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "Structure", "__version__"]

register()
