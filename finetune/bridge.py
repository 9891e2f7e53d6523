"""Train a stage of the text bridge: deepspeed finetune/bridge.py --config finetune/configs/bridge_align.yaml --out R"""

from __future__ import annotations

from moiety.bridge.stages import BridgeStageConfig, train_stage
from moiety.training.config import load_config
from moiety.training.run import Run
from moiety.training.script import parse_run, run_script


def main(argv: list[str] | None = None) -> int:
    args = parse_run(argv, __doc__)
    config = load_config(BridgeStageConfig, args.config, args.overrides)
    with Run.open(args.out, config, fresh=args.fresh) as run:
        folder = train_stage(run, config)
        if folder is not None:
            run.progress.note(f"{folder}: the bridge after this stage")
    return 0


if __name__ == "__main__":
    run_script(main)
