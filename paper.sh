#!/usr/bin/env bash
# Reproduces the paper's tables: prepares the data, trains what is missing, evaluates, and writes the report with the
# paper's figures beside ours. The same command resumes where it was stopped. Its settings are in code/paper/settings.py.
#
#   bash paper.sh --plan --gpus 8xH100-80GB     what is done and what would run, with hours and disk
#   bash paper.sh                               run it on this machine
#   bash paper.sh --slurm jobs                  write sbatch files into a folder and submit them
#   bash paper.sh --demo                        all of it with the demo's small model and videos
#
# `bash paper.sh --help` lists the flags.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --demo "*) . "$root/code/setup.sh" ;; *) . "$root/code/launch.sh" ;; esac
# Only this program imports from these folders; it removes them from the environment of what it runs.
export PYTHONPATH="$root:$root/code:$root/code/demo:$root/code/evaluation:$root/code/qwen-vl-finetune${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
exec "$python" -m paper "$@"
