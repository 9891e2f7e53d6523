"""Loss spikes: a step whose loss stands far above the last ones, told when it happens and not when the run is lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 128  # steps
FEWEST = 32  # of them before anything is called a spike
FAR = 8.0  # scaled median absolute deviations above the median; micro-batches of several domains spread widely


class SpikeDetector:
    """Keeps the losses of the last steps; median and deviation are not moved by the spikes themselves."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        """`losses`: of the last steps, from a checkpoint."""
        self.losses = list(losses)

    def add(self, loss: float) -> float | None:
        """The median that a spike stands above; None where the loss is nothing special."""
        above = None
        if len(self.losses) >= FEWEST:
            median = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(value - median) for value in self.losses)
            if loss > median + FAR * max(deviation, 1e-3 * abs(median)):
                above = median
        self.losses = [*self.losses, loss][-WINDOW:]
        return above
