"""Fine-tune to properties: deepspeed finetune/lora.py --config finetune/configs/qm9_dipole.yaml --out runs/dipole

`method=lora` (default) trains an adapter, `full` all weights, `head` the head alone, `scratch` a network that was never
pretrained.
"""

from __future__ import annotations

from moiety.adapters.finetune import FinetuneConfig, finetune
from moiety.training.config import load_config
from moiety.training.run import Run
from moiety.training.script import parse_run, run_script


def main(argv: list[str] | None = None) -> int:
    args = parse_run(argv, __doc__)
    config = load_config(FinetuneConfig, args.config, args.overrides)
    with Run.open(args.out, config, fresh=args.fresh) as run:
        metrics = finetune(run, config)
        for entry in metrics or ():
            for name, value in entry["results"].items():
                run.progress.note(f"{entry['target']} {entry['metric']} {value:.4f} {entry['unit']}  {name}")
    return 0


if __name__ == "__main__":
    run_script(main)
