"""How a training script ends: mistakes of the user are one line and exit 2, failed runs one line and exit 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from torch import distributed
from transformers.utils import logging

from moiety.errors import InputError
from moiety.training.checkpoint import SaveFailed


def run_script(main: Callable[[], int]) -> NoReturn:
    """Runs a script's main and exits with what it returns, or with the code that its failure deserves."""
    first = os.environ.get("RANK", "0") == "0"
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # reports and bars of every model that is loaded
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        code = main()
        if distributed.is_initialized():
            distributed.destroy_process_group()  # NCCL warns of a leak otherwise
        sys.exit(code)
    except InputError as error:
        if first:  # every rank finds the same mistake
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (SaveFailed, FloatingPointError) as error:
        if first:
            print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
