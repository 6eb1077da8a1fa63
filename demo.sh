#!/usr/bin/env bash
# Trains and evaluates a small model that captions videos while they arrive, on any machine. Creates small videos and a
# small Qwen2.5-VL, then runs mani_data.py, sft.sh and eval.sh on them. Takes about 10 minutes on two CPU cores.
#
#   bash demo.sh                                          one variant, group
#   QWEN2_5_VL_VARIANT=all bash demo.sh                   all six, one after the other
#   bash demo.sh --steps 4000 --output demo_output/long   longer training; motion is learned last
#   bash demo.sh --serve                                  trains what is not trained yet, then serves the page
#
# Other flags: --output DIR (default: demo_output beside this script), --train-videos N, --test-videos N, --steps N,
# --device cpu (default: a GPU if there is one).
# All output is in the output folder; the same command resumes an interrupted run.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
read -r -d "" -a recipe < <(grep -v "^#" code/demo/recipe.txt) || true
output=$PWD/demo_output train_videos=1200 test_videos=120 steps=${recipe[-1]} device= serve=
script=demo.sh
. code/demo/flags.sh
variants=${QWEN2_5_VL_VARIANT:-group}
[ "$variants" != all ] || variants="origin batch interleave overlap group gap"
began=$SECONDS
. code/setup.sh
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
"$python" code/demo/check_flags.py --output "$output" --steps "$steps" "${on_cpu[@]}" $variants
if ! mkdir -p "$output" 2>/dev/null || [ ! -w "$output" ]; then
  echo "error: --output $output is not a writable folder: give another" >&2
  exit 2
fi
data=$output/dataset model=$output/model

step() { printf '\n== %s  (%d s elapsed)\n' "$1" "$((SECONDS - began))"; }

step "1. Create videos and captions in the format of PE-Video on the hub"
"$python" code/demo/make_data.py --output "$data/PE-Video" --train-videos "$train_videos" --test-videos "$test_videos"
step "2. Create a small Qwen2.5-VL with random weights"
[ -d "$model" ] || "$python" code/demo/make_model.py --data "$data/PE-Video" --output "$model"
step "3. mani_data.py: select videos with 3 to 5 caption tokens per second"
"$python" mani_data.py --dataset-root "$data" --tokenizer-model-id "$model"

served=()
for variant in $variants; do
  export QWEN2_5_VL_VARIANT=$variant
  trained=$output/qwen2_5vl-pe-$variant
  step "4. sft.sh: train $variant"
  if [ -f "$trained/config.json" ]; then
    echo "already trained: $trained"
  else
    # One process, unless asked: the recipe names the samples of a GPU.
    NPROC_PER_NODE=${NPROC_PER_NODE:-1} QWEN2_5_VL_MODEL_PATH=$model QWEN2_5_VL_TRAIN_DATA=$data/train_3_5.jsonl \
      bash code/qwen-vl-finetune/scripts/sft.sh --output_dir "$trained" "${recipe[@]}" --max_steps "$steps" \
      "${train_on_cpu[@]}"
  fi
  served+=(--model "$variant=$trained")
  [ -z "$serve" ] || continue
  step "5. eval.sh: caption the test videos with $variant"
  QWEN2_5_VL_EVAL_MODEL_PATH=$trained QWEN2_5_VL_EVAL_DATA_DIR=$data/test_3_5.jsonl \
    QWEN2_5_VL_EVAL_OUTPUT_DIR=$output/evaluation \
    bash eval.sh --batch-size 8 --times "$data/PE-Video/truth.jsonl" "${on_cpu[@]}"
done

if [ -n "$serve" ]; then
  step "5. Serve the page"
  film=$(find "$data/PE-Video/videos/test" -name '*.mp4' | sort | head -n 1)
  unset QWEN2_5_VL_VARIANT
  exec "$python" -m qwen_vl_streaming.serve "${served[@]}" --source "demo=$film" --records "$output/serve" "${on_cpu[@]}"
fi
step "6. Results"
"$python" code/demo/show.py --output "$output" $variants
