"""Pretrain on a mixture of corpora: deepspeed pretrain/train.py --config pretrain/configs/tiny.yaml --out runs/tiny

Also under `torchrun` and plain `python`. The same command again resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moiety.adapters.tasks import lines_of
from moiety.objectives import build_objectives
from moiety.training.config import PretrainConfig, load_config
from moiety.training.export import export
from moiety.training.loop import fit
from moiety.training.mixture import Mixture
from moiety.training.multitask import build
from moiety.training.plan import print_plan
from moiety.training.run import Run
from moiety.training.script import run_script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=30 ds=zero2")
    parser.add_argument("--config", required=True, help="a YAML of pretrain/configs")
    parser.add_argument("--out", help="run directory; default runs/<name of the config>")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in that directory")
    parser.add_argument("--plan", action="store_true", help="print sizes, memory and time, and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(PretrainConfig, args.config, args.overrides)  # unknown key: error with the nearest one
    config.model_config(), build_objectives(config.objectives)  # faults are told before anything is read
    if args.plan:
        print_plan(config)
        return 0
    mixture = Mixture.open(config.data)  # missing corpus: the command that builds it
    out = args.out or Path("runs", Path(args.config).stem)
    with Run.open(out, config, fresh=args.fresh) as run:  # resumes by itself
        torch.manual_seed(config.training.seed)  # the same weights on every rank
        model, objectives, tasks = build(config, mixture)
        for line in lines_of(tasks):
            run.progress.note(line)
        fit(run, model, mixture, objectives, config.optimizer, config.training)
        export(run, mixture)
    return 0


if __name__ == "__main__":
    run_script(main)
