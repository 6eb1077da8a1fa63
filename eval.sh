#!/usr/bin/env bash
# Captions the test videos with a checkpoint, then scores the captions: on a CPU, one GPU, several GPUs or several
# nodes. Further flags are passed to code/evaluation/eval.py and override those set here. `bash eval.sh --help` lists
# all flags and the environment variables that set their defaults.
#
#   NPROC_PER_NODE  processes on this node (default: one per GPU that PyTorch can use, else 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT
#                   for several nodes; under `srun --ntasks-per-node=1` they default to SLURM's variables
#
# On several nodes, run the same command on each. The output folder must be on a file system that all nodes share.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/code/launch.sh"
require_number NPROC_PER_NODE "${NPROC_PER_NODE:-0}" 0 1024

command=("$python" "$root/code/evaluation/eval.py" --processes "${NPROC_PER_NODE:-0}")
if ((10#$nnodes > 1)); then
  command+=(--nodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
fi
command+=("$@")
echo "+ ${command[*]}"
exec "${command[@]}"
