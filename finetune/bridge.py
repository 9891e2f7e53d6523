"""Train a stage of the text bridge: deepspeed finetune/bridge.py --config finetune/configs/bridge_align.yaml --out R"""

from __future__ import annotations

import argparse

from moiety.bridge.stages import BridgeStageConfig, train_stage
from moiety.training.config import load_config
from moiety.training.run import Run
from moiety.training.script import run_script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(BridgeStageConfig, args.config, args.overrides)
    with Run.open(args.out, config, fresh=args.fresh) as run:
        folder = train_stage(run, config)
        if folder is not None:
            run.progress.note(f"{folder}: the bridge after this stage")
    return 0


if __name__ == "__main__":
    run_script(main)
