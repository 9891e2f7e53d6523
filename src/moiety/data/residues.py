"""One-letter codes of the residues of the vocabulary, in both directions."""
# Shapes: R residues.

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moiety.data.structure import Array
from moiety.models.vocabulary_moiety import FIRST_RESIDUE, RESIDUE_ID, RESIDUES

CODES = "ARNDCQEGHILKMFPSTWYVUOX"  # of RESIDUES, in their order; X is whatever else a sequence holds
_LETTER_R = np.array(list(CODES))
_TYPE_OF = {letter: RESIDUE_ID[name] for letter, name in zip(CODES, RESIDUES, strict=True)}


def node_types(letters: Iterable[str]) -> Array:
    """[R] vocabulary ids of one-letter codes; UNK for a letter that is none of them."""
    return np.array([_TYPE_OF.get(letter, RESIDUE_ID["UNK"]) for letter in letters], dtype=np.int64)


def one_letter(node_type: Array) -> str:
    """One-letter codes of residue nodes [R], which have to be residues all."""
    return "".join(_LETTER_R[node_type - FIRST_RESIDUE])
