#!/usr/bin/env bash
# Trains the demo's model on videos with long quiet stretches, once by wait-3 and once so that it decides when to speak,
# and compares when the two say what happens.
#
# Usage:
#
#   bash code/demo/quiet.sh                                            about 15 minutes on two CPU cores
#   QWEN2_5_VL_VARIANT=overlap bash code/demo/quiet.sh --steps 2000    another streaming variant, longer training
#
# Needs the packages of requirements.txt, which demo.sh installs. Other flags: --output DIR (default: demo_output/quiet),
# --train-videos N, --test-videos N, --device cpu (default: a GPU if there is one). All output is in the output folder;
# the same command resumes an interrupted run.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
read -r -d "" -a recipe < <(grep -v "^#" code/demo/recipe.txt) || true
output=$PWD/demo_output/quiet train_videos=1200 test_videos=120 steps=${recipe[-1]} device=
script=code/demo/quiet.sh
. code/demo/flags.sh
export QWEN2_5_VL_VARIANT=${QWEN2_5_VL_VARIANT:-group}
began=$SECONDS
python=python
[ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
if ! "$python" -c "import qwen_vl_streaming, torch" 2>/dev/null; then
  echo "error: $python does not have the packages of requirements.txt: run bash demo.sh first, which installs them" >&2
  exit 2
fi
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
data=$output/dataset model=$output/model

step() { printf '\n== %s  (%d s elapsed)\n' "$1" "$((SECONDS - began))"; }

step "1. Create videos with quiet stretches, and captions with times"
"$python" code/demo/make_data.py --output "$data/PE-Video" --segments --quiet \
  --train-videos "$train_videos" --test-videos "$test_videos"
step "2. Create a small Qwen2.5-VL with random weights"
[ -d "$model" ] || "$python" code/demo/make_model.py --data "$data/PE-Video" --output "$model"
step "3. mani_data.py: select videos, whose captions may have few tokens per second"
"$python" mani_data.py --dataset-root "$data" --tokenizer-model-id "$model" --min-tokens-per-second 0.5

files=()
for schedule in wait model; do
  trained=$output/qwen2_5vl-$QWEN2_5_VL_VARIANT-$schedule
  step "4. sft.sh --schedule $schedule"
  if [ -f "$trained/config.json" ]; then
    echo "already trained: $trained"
  else
    QWEN2_5_VL_MODEL_PATH=$model QWEN2_5_VL_TRAIN_DATA=$data/train_3_5.jsonl \
      bash code/qwen-vl-finetune/scripts/sft.sh --output_dir "$trained" "${recipe[@]}" --max_steps "$steps" \
      --schedule "$schedule" "${train_on_cpu[@]}"
  fi
  step "5. eval.sh: caption the test videos by the schedule of training"
  name=${QWEN2_5_VL_VARIANT}_${schedule}_infer.json
  QWEN2_5_VL_EVAL_MODEL_PATH=$trained QWEN2_5_VL_EVAL_DATA_DIR=$data/test_3_5.jsonl \
    QWEN2_5_VL_EVAL_OUTPUT_DIR=$output/evaluation \
    bash eval.sh --batch-size 32 --output-file "$name" "${on_cpu[@]}"
  files+=("$output/evaluation/$name")
done

step "6. When they say what happens"
"$python" code/evaluation/timeliness.py "${files[@]}" --times "$data/PE-Video/truth.jsonl" --picture "$output/timeliness.png"
