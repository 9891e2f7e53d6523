"""What is corrupted, what is predicted, the loss: one file an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moiety.errors import InputError
from moiety.objectives.base import Objective
from moiety.objectives.blocks import BlockDenoising, BlockDenoisingConfig
from moiety.objectives.cell import CellDenoising, CellDenoisingConfig
from moiety.objectives.coordinates import CoordinateDenoising, CoordinateDenoisingConfig
from moiety.objectives.dens import ForceDenoising, ForceDenoisingConfig
from moiety.objectives.self_conditioned import SelfConditionedDenoising, SelfConditionedDenoisingConfig
from moiety.objectives.types import MaskedTypes, MaskedTypesConfig

# in the order in which they spoil a batch: types may take nodes away, the cell moves them, noise comes last
OBJECTIVES: dict[str, tuple[type[Objective], type]] = {
    "types": (MaskedTypes, MaskedTypesConfig),
    "cell": (CellDenoising, CellDenoisingConfig),
    "coordinates": (CoordinateDenoising, CoordinateDenoisingConfig),
    "self_conditioned": (SelfConditionedDenoising, SelfConditionedDenoisingConfig),
    "blocks": (BlockDenoising, BlockDenoisingConfig),
    "dens": (ForceDenoising, ForceDenoisingConfig),
}


def build_objectives(config: Mapping[str, Mapping[str, Any]]) -> list[Objective]:
    """Objectives of a recipe (name -> options), in the order in which they corrupt.

    Raises:
        InputError: an objective or an option that does not exist; two objectives that displace nodes.
    """
    for name, options in config.items():
        if name not in OBJECTIVES:
            raise InputError(f"objectives.{name}: no such objective; there are {', '.join(OBJECTIVES)}")
        known = {f.name for f in dataclasses.fields(OBJECTIVES[name][1])}
        for option in options or {}:
            if option not in known:
                raise InputError(f"objectives.{name}.{option}: no such option; there are {', '.join(sorted(known))}")
    chosen = [name for name in OBJECTIVES if name in config]
    if len(displacing := [name for name in chosen if OBJECTIVES[name][0].displaces]) > 1:
        raise InputError(f"objectives: {' and '.join(displacing)} each displace the nodes; a recipe has one of them")
    return [OBJECTIVES[name][0](OBJECTIVES[name][1](**(config[name] or {}))) for name in chosen]


__all__ = ["OBJECTIVES", "Objective", "build_objectives"]
