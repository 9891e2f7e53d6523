"""Questions about files: what `moiety ask` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moiety.bridge.export import load_bridge
from moiety.bridge.page import write_answers
from moiety.bridge.stages import blinded, composition_only
from moiety.data.structure import Structure
from moiety.data.validate import verdicts
from moiety.errors import InputError
from moiety.models.asking_moiety import Answer


def ask_files(
    files: Sequence[Path],
    question: str,
    model_dir: Path,
    choices: Sequence[str] = (),
    page: Path | None = None,
    all_atom: bool = False,
) -> tuple[Answer, dict[str, Answer]]:
    """Asks about the first structure of each file, all before the question.

    Returns:
        The answer, and what is said to the same question where the structures are not seen, or other than they are: an
        answer that stays the same, as sure as before, does not rest on them.

    Raises:
        InputError: no bridge, no structure in a file, a broken one.
    """
    structures = [first_structure(path, all_atom) for path in files]
    model, processor = load_bridge(model_dir)
    explain = page is not None and len(structures) == 1
    answer = model.eval().ask(processor, structures, question, choices=tuple(choices), explain=explain)
    if page is not None:
        write_answers(page, [(question, structures[0], answer)])
    controls = {
        name: model.ask(processor, [change(one) for one in structures], question, choices=tuple(choices))
        for name, change in CONTROLS.items()
    }
    return answer, controls


def with_shuffled_types(structure: Structure) -> Structure:
    """The right nodes in the wrong places."""
    return replace(structure, node_type=np.random.default_rng(0).permutation(structure.node_type))


CONTROLS = {"unseen": blinded, "composition alone": composition_only, "types shuffled": with_shuffled_types}


def first_structure(path: Path, all_atom: bool = False) -> Structure:
    """The first one of a file."""
    for verdict in verdicts(path, all_atom):
        if verdict.structure is None:
            raise InputError(f"{path} [{verdict.index}]: {verdict.reason}; {verdict.remedy}")
        return verdict.structure
    raise InputError(f"{path}: no structure in it")
