#!/usr/bin/env bash
# Several processes on this machine, with the settings that make a CPU run fast:
#   launch/local.sh 2 pretrain/train.py --config pretrain/configs/tiny.yaml --out runs/tiny ds=zero2
# The first argument is the number of processes; the rest is a script and its arguments, as `deepspeed` takes them.
set -euo pipefail
ranks=${1:?usage: launch/local.sh RANKS SCRIPT [ARGUMENTS]}
shift
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 # idle threads must not steal the other ranks' cores
# glibc gives every large tensor back to the system and page-faults it in again: 1.5 times slower
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
if ! command -v nvidia-smi >/dev/null; then export DS_ACCELERATOR=cpu; fi
if [[ $ranks == 1 ]]; then exec python "$@"; fi
exec deepspeed --num_accelerators "$ranks" "$@"
