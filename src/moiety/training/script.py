"""How a training script begins and ends: its command line, and one line for mistakes (exit 2) and failures (exit 1)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from torch import distributed
from transformers.utils import logging

from moiety.errors import InputError
from moiety.training.checkpoint import SaveFailed


def parse_run(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """The command line of a script that trains one run: config, out, fresh, and overrides key=value."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


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
