"""What a trained model is for: predictions, an ASE calculator, a pipeline, embeddings, and the report of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moiety.inference.calculator import MoietyCalculator

__all__ = ["MoietyCalculator"]


def __getattr__(name: str) -> Any:
    """The calculator on first use: `moiety report` needs neither torch nor ASE."""
    if name != "MoietyCalculator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moiety.inference.calculator import MoietyCalculator

    return MoietyCalculator
