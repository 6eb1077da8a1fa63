#!/usr/bin/env bash
# Captions the test videos with a checkpoint, then scores the captions: on a CPU, one GPU, several GPUs or several
# nodes. Further flags are passed to code/evaluation/eval.py. `bash eval.sh --help` lists all flags and the environment
# variables that set their defaults.
#
#   NPROC_PER_NODE  processes on this node (default: one per GPU that PyTorch can use, else 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT
#                   for several nodes; under `srun --ntasks-per-node=1` they default to SLURM's variables
#
# On several nodes, run the same command on each. The output folder must be on a file system that all nodes share.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/code/launch.sh"
here=$root/code/evaluation

for word in "$@"; do
  case $word in -h | --help) exec "$python" "$here/eval.py" --help ;; esac
done
require_srun
require_number NPROC_PER_NODE "${NPROC_PER_NODE:-0}" 0 1024
nproc=$(answer_of "$python" "$here/processes.py" --processes "${NPROC_PER_NODE:-0}" "$@") || exit

if ((nproc == 1 && 10#$nnodes == 1)); then
  command=("$python" "$here/eval.py" "$@")
else
  [ -n "${MASTER_PORT:-}" ] || ((10#$nnodes > 1)) || master_port=$(free_port)
  cores=$(nproc) # those of this job, not of the machine
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))} # torchrun would set 1
  command=(
    "$python" -m qwen_vl_streaming.launch --max_restarts 3
    --nproc_per_node "$nproc" --nnodes "$nnodes" --node_rank "$node_rank"
    --master_addr "$master_addr" --master_port "$master_port"
    "$here/rank.py" "$@"
  )
fi
"$python" -m qwen_vl_streaming.common.redact "${command[@]}" # echoes it, without passwords
exec "${command[@]}"
