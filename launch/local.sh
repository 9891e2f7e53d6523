#!/usr/bin/env bash
# Several processes on this machine, with the settings that make a CPU run fast:
#   launch/local.sh 2 pretrain/train.py --config pretrain/configs/tiny.yaml --out runs/tiny ds=zero2
# The first argument is the number of processes; the rest is a script and its arguments, as `deepspeed` takes them.
# On several machines, which see the same files, the same line on each, with these set (under Slurm they are):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine launch/local.sh ...
# SIGTERM, SIGUSR1 and Ctrl-C let the step end, write a checkpoint and exit; 75 then means: the same line goes on.
set -euo pipefail
ranks=${1:?usage: launch/local.sh RANKS SCRIPT [ARGUMENTS]}
shift
nodes=${NNODES:-${SLURM_NNODES:-1}}
node=${NODE_RANK:-${SLURM_NODEID:-0}}
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 # idle threads must not steal the other ranks' cores
# glibc gives every large tensor back to the system and page-faults it in again: 1.5 times slower
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
if ! command -v nvidia-smi >/dev/null; then export DS_ACCELERATOR=cpu; fi
if [[ $nodes == 1 && $ranks == 1 ]]; then exec python "$@"; fi

where=(--num_accelerators "$ranks")
if [[ $nodes != 1 ]]; then # every machine starts its own ranks: the names in the hostfile are not looked up
    hostfile=$(mktemp)
    trap 'rm -f "$hostfile"' EXIT
    for ((i = 0; i < nodes; i++)); do echo "node-$i slots=$ranks"; done >"$hostfile"
    where=(--hostfile "$hostfile" --no_ssh --node_rank "$node" --master_addr "${MASTER_ADDR:?the first machine}")
fi
# A launcher that is signalled kills its ranks or leaves them behind: it sleeps through what the ranks listen to.
(trap '' USR1 TERM && exec deepspeed "${where[@]}" --master_port "${MASTER_PORT:-29500}" "$@") &
launcher=$!

descendants() {
    local child
    for child in $(pgrep -P "$1" || true); do
        echo "$child"
        descendants "$child"
    done
}
forward() {
    local process
    for process in $(descendants "$launcher"); do
        if tr '\0' '\n' <"/proc/$process/environ" 2>/dev/null | grep -q '^LOCAL_RANK='; then
            kill -USR1 "$process" 2>/dev/null || true
        fi
    done
}
trap forward TERM USR1 INT
code=0
while :; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break # else it was our own signal that ended the wait
done
exit "$code"
