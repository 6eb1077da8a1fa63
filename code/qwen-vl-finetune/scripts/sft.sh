#!/usr/bin/env bash
# Fine-tunes one variant with DeepSpeed: on a CPU, one GPU, several, or several nodes. Further flags go to
# qwenvl/train.py and override what is set here; `bash scripts/sft.sh --help` lists them all.
#
#   QWEN2_5_VL_VARIANT     one of origin, batch, group, gap, overlap, interleave (default group)
#   QWEN2_5_VL_MODEL_PATH  a checkpoint folder or hub id (default Qwen/Qwen2.5-VL-3B-Instruct)
#   QWEN2_5_VL_TRAIN_DATA  a JSONL made by mani_data.py (default dataset/train_3_5.jsonl)
#   NPROC_PER_NODE (default: the GPUs that PyTorch can use, else 1) NNODES NODE_RANK MASTER_ADDR MASTER_PORT
#                          under `srun --ntasks-per-node=1` SLURM's own variables are their defaults
#   DEEPSPEED_CONFIG       zero2.json, zero3.json or zero3_offload.json (default zero3.json)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$here/../.." && pwd)
python=python
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

if [ "${SLURM_LOCALID:-0}" -gt 0 ]; then
  echo "error: srun has started several tasks on this node: give it --ntasks-per-node=1" >&2
  exit 2
fi
for word in "$@"; do
  case $word in -h | --help) exec "$python" -m qwenvl.rank --help ;; esac
done
gpus=$("$python" -m qwenvl.device "$@") || exit
type=()
if [ "$gpus" -eq 0 ]; then
  # PyTorch's optimizers ask for the current GPU where the driver counts some, even if CUDA does not start on them.
  export CUDA_VISIBLE_DEVICES=
  # Threads that spin while they wait would take the cores from the processes that decode videos.
  export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
  type=(--bf16 False)
  nproc=${NPROC_PER_NODE:-1}
else
  nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$gpus}}
fi
nnodes=${NNODES:-${SLURM_NNODES:-1}}
master=${MASTER_ADDR:-127.0.0.1}
if [ -z "${MASTER_ADDR:-}" ] && [ "$nnodes" != 1 ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  if hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null); then
    master=${hosts%%$'\n'*}
  else # in a container without SLURM: node[03-05,7] begins with node03
    master=$(sed -E 's/^([^[,]*)(\[([0-9]+)[^]]*\])?.*/\1\3/' <<<"$SLURM_JOB_NODELIST")
  fi
fi

# Two runs on one machine must not meet at one port; several machines have to know it beforehand.
port=${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}
if [ -z "${MASTER_PORT:-}" ] && [ "$nnodes" = 1 ]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

rank=${NODE_RANK:-${SLURM_NODEID:-0}}
number() { # NAME VALUE LEAST MOST
  if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
    echo "error: $1=$2: give a whole number from $3 to $4" >&2
    exit 2
  fi
}
number NPROC_PER_NODE "$nproc" 1 1024
number NNODES "$nnodes" 1 65536
number NODE_RANK "$rank" 0 $((10#$nnodes - 1))
number MASTER_PORT "$port" 1 65535

command=(
  "$python" -m qwenvl.launch
  --nproc_per_node "$nproc" --nnodes "$nnodes" --node_rank "$rank"
  --master_addr "$master" --master_port "$port"
  -m qwenvl.rank
  --model_name_or_path "${QWEN2_5_VL_MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}"
  --train_data "${QWEN2_5_VL_TRAIN_DATA:-dataset/train_3_5.jsonl}"
  --deepspeed "${DEEPSPEED_CONFIG:-zero3.json}"
  "${type[@]}" "$@"
)
"$python" -m qwen_vl_streaming.common.redact "${command[@]}" # echoes it, without passwords
# PyTorch tells at length of every connection that ends with its process; what matters is said in one line.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec "${command[@]}"
