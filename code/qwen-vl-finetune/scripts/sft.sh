#!/usr/bin/env bash
# Fine-tunes one variant with DeepSpeed: on a CPU, one GPU, several, or several nodes. Further flags go to
# qwenvl/train.py and override what is set here; `bash scripts/sft.sh --help` lists them all.
#
#   QWEN2_5_VL_VARIANT     one of origin, batch, group, gap, overlap, interleave (default group)
#   QWEN2_5_VL_MODEL_PATH  a checkpoint folder or hub id (default Qwen/Qwen2.5-VL-3B-Instruct)
#   QWEN2_5_VL_TRAIN_DATA  a JSONL made by mani_data.py (default dataset/train_3_5.jsonl), or another data set that
#                          --train_data accepts
#   NPROC_PER_NODE (default: the GPUs that PyTorch can use, else 1) NNODES NODE_RANK MASTER_ADDR MASTER_PORT
#                          under `srun --ntasks-per-node=1` SLURM's own variables are their defaults
#   DEEPSPEED_CONFIG       zero1.json, zero2.json, zero3.json or zero3_offload.json (default: as planned; zero3.json on a CPU)
#
# On GPUs, qwenvl/planner chooses the flags that are not given here so that training is as fast as the GPUs allow.
#   --plan                 print the plan and end
#   --gpus 8xH100-80GB     the same for GPUs that are not here
#   --no_plan              plan and check nothing: train with your flags and the defaults that --help shows
set -euo pipefail
started=${EPOCHREALTIME:-$(date +%s)} # seconds, whole ones before bash 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$here/../.." && pwd)
source "$root/code/launch.sh"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

inputs=(
  --model_name_or_path "${QWEN2_5_VL_MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}"
  --train_data "${QWEN2_5_VL_TRAIN_DATA:-dataset/train_3_5.jsonl}"
)
plan= flags=()
for word in "$@"; do
  case $word in
    -h | --help) DS_ACCELERATOR=cpu exec "$python" -m qwenvl.rank --help ;; # else DeepSpeed warns of a missing GPU
    --no_plan) plan=none ;;
    *) flags+=("$word") ;;
  esac
done
for word in "${flags[@]}"; do
  case $word in
    --gpus | --gpus=* | --plan)
      [ "$plan" != none ] || { echo "error: --no_plan contradicts ${word%%=*}: omit one of them" >&2; exit 2; }
      plan=only
      ;;
  esac
  case $word in --gpus | --gpus=*) exec "$python" -m qwenvl.planner 0 "$nnodes" "${inputs[@]}" "${flags[@]}" ;; esac
done
set -- "${flags[@]}"
require_number NPROC_PER_NODE "${NPROC_PER_NODE:-1}" 1 1024
nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} # 0: one for each GPU
require_number SLURM_GPUS_ON_NODE "$nproc" 0 1024
[ "$plan" != only ] || exec "$python" -m qwenvl.planner "$nproc" "$nnodes" "${inputs[@]}" "$@"
require_srun
# Several nodes have to know the port in advance.
[ -n "${MASTER_PORT:-}" ] || ((10#$nnodes > 1)) || master_port=$(free_port)

if [ "$plan" = none ]; then
  gpus=$(answer_of "$python" -m qwenvl.device "$@") || exit
  planned=(--deepspeed "${DEEPSPEED_CONFIG:-zero3.json}")
else
  # What the planner reads of the videos, training does not read again. The file has no name, so that it goes with the
  # last of these programs, however that ends.
  file=$(mktemp) && exec {headers}<>"$file" && rm -f "$file"
  export QWENVL_HEADERS=/proc/$$/fd/$headers
  [ -w "$QWENVL_HEADERS" ] || unset QWENVL_HEADERS
  node=()
  ((10#$nnodes == 1)) || node=(--node "$node_rank" "$master_addr" "$master_port")
  words=$(answer_of "$python" -m qwenvl.planner "$nproc" "$nnodes" "${node[@]}" "${inputs[@]}" "$@") || exit
  mapfile -t planned <<<"$words"
  gpus=${planned[0]} planned=("${planned[@]:1}")
  [ -z "${DEEPSPEED_CONFIG:-}" ] || planned+=(--deepspeed "$DEEPSPEED_CONFIG")
fi
type=()
if [ "$gpus" -eq 0 ]; then
  # PyTorch's optimizers ask for the current GPU where the driver counts some, even if CUDA does not start on them.
  export CUDA_VISIBLE_DEVICES=
  # Threads that spin while they wait would take the cores from the processes that decode videos.
  export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
  type=(--bf16 False)
  nproc=${NPROC_PER_NODE:-1}
  planned=(--deepspeed "${DEEPSPEED_CONFIG:-zero3.json}")
else
  nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$gpus}}
  # Segments that grow leave less memory in pieces that nothing fits into.
  [ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
require_number NPROC_PER_NODE "$nproc" 1 1024

command=(
  "$python" -m qwen_vl_streaming.launch
  --nproc_per_node "$nproc" --nnodes "$nnodes" --node_rank "$node_rank"
  --master_addr "$master_addr" --master_port "$master_port"
  -m qwenvl.rank
  "${inputs[@]}" "${planned[@]}" "${type[@]}" "$@"
)
"$python" -m qwen_vl_streaming.common.redact "${command[@]}" # echoes it, without passwords
launched=${EPOCHREALTIME:-$(date +%s)}
export QWENVL_TIMES="${started/,/.} ${launched/,/.}" # qwenvl/startup.py reads it
exec "${command[@]}"
