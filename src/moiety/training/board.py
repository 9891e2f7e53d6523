"""The log as TensorBoard events, for those who asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moiety.errors import InputError
from moiety.training.files import flatten


class Board:
    """Writes every number of a log record under its name; does nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        """Raises InputError where TensorBoard is asked for and not installed."""
        self._folder = folder
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils import tensorboard
            except ImportError as error:
                raise InputError(f"training.tensorboard=true: {error}; pip install 'moiety[tensorboard]'") from None
            self._module = tensorboard

    def add(self, record: dict[str, Any]) -> None:
        if self._folder is None:
            return
        step = record["step"]
        if self._writer is None:  # what an earlier process wrote after its last checkpoint is hidden
            self._writer = self._module.SummaryWriter(self._folder / "tensorboard", purge_step=step)
        for name, value in flatten(record).items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name.replace(".", "/"), value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
