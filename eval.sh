#!/usr/bin/env bash
# Lets a checkpoint watch the test videos and speak, then scores what it said: on a CPU, one GPU, several, or several
# nodes. Further flags go to code/evaluation/eval.py and override what is set here; `bash eval.sh --help` lists them all,
# and the environment variables that they default to.
#
#   NPROC_PER_NODE (default: the GPUs that PyTorch can use, else 1) NNODES NODE_RANK MASTER_ADDR MASTER_PORT
#                          under `srun --ntasks-per-node=1` SLURM's own variables are their defaults
#
# On several nodes, run the same command on each; the output folder must lie where all of them reach it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
if [ "${SLURM_LOCALID:-0}" -gt 0 ]; then
  echo "error: srun has started several tasks on this node: give it --ntasks-per-node=1" >&2
  exit 2
fi
nnodes=${NNODES:-${SLURM_NNODES:-1}}
if ! [[ $nnodes =~ ^[1-9][0-9]{0,4}$ ]]; then
  echo "error: NNODES=$nnodes: give a whole number from 1 on" >&2
  exit 2
fi
master=${MASTER_ADDR:-127.0.0.1}
if [ -z "${MASTER_ADDR:-}" ] && [ "$nnodes" -gt 1 ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  if hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null); then
    master=${hosts%%$'\n'*}
  else # in a container without SLURM: node[03-05,7] begins with node03
    master=$(sed -E 's/^([^[,]*)(\[([0-9]+)[^]]*\])?.*/\1\3/' <<<"$SLURM_JOB_NODELIST")
  fi
fi
command=("$python" "$root/code/evaluation/eval.py" --processes "${NPROC_PER_NODE:-0}")
if [ "$nnodes" -gt 1 ]; then
  command+=(
    --nodes "$nnodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}"
    --master-addr "$master" --master-port "${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}"
  )
fi
command+=("$@")
"$python" -m qwen_vl_streaming.common.redact "${command[@]}" # echoes it, without passwords
# PyTorch tells at length of every connection that ends with its process; what matters is said in one line.
TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} exec "${command[@]}"
