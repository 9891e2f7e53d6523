#!/usr/bin/env bash
# The whole path on real data: corpora, pretraining, export, adapter, prediction, report, questions. Every command is printed
# as a user would type it, with its time and memory. Run it through `make quickstart`, which sets up .venv and the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
RUN=${RUN:-runs/quickstart}
step() { python launch/measured.py "$@"; }

started=$SECONDS
for corpus in qm9 ccd crystals proteins isomers; do
    if [ -e "corpora/tiny/$corpus/manifest.json" ]; then
        echo "corpora/tiny/$corpus is there already"
    else
        step moiety data build "$corpus" --profile tiny
    fi
done
built=$SECONDS

export OMP_NUM_THREADS=1 # one core a rank
step deepspeed --num_accelerators 2 pretrain/train.py --config pretrain/configs/quickstart.yaml --out "$RUN"
dipole=(deepspeed --num_accelerators 2 finetune/lora.py --config finetune/configs/qm9_dipole.yaml)
step "${dipole[@]}" model="$RUN/export" lr=5e-3 --out "$RUN/dipole"
step "${dipole[@]}" model="$RUN/export" method=scratch lr=2e-3 --out "$RUN/dipole_scratch" # its best on validation
export OMP_NUM_THREADS=2
step moiety predict docs/examples/ethanol.xyz --model "$RUN/export" --adapter "$RUN/dipole/adapter"
asked=$SECONDS
export OMP_NUM_THREADS=1
step deepspeed --num_accelerators 2 finetune/bridge.py --config finetune/configs/bridge_quickstart.yaml tower="$RUN/export" --out "$RUN/bridge"
export OMP_NUM_THREADS=2
ask=(moiety ask docs/examples/ethanol_water.xyz --model "$RUN/bridge/export") # the answer, and what is said unseen
step "${ask[@]}" "Are the two molecules touching or apart?"
step "${ask[@]}" "How many different elements are there?"
step "${ask[@]}" "Does it contain nitrogen?"
asked=$((SECONDS - asked))
step moiety report "$RUN"
step moiety report "$RUN" --table
echo "corpora: $((built - started)) s; everything after them: $((SECONDS - built)) s, of which questions $asked s"
echo "Now open $RUN/report.html"
