#!/usr/bin/env bash
# Sets up .venv and runs all checks on the CPU. Arguments go to pytest, for example `tests/test_timeline.py`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = "--help" ]; then sed -n '2p' "$0" | cut -c3-; exit 0; fi
. code/setup.sh
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
# Three processes keep two cores busy: many tests wait for the processes that they start.
export OMP_NUM_THREADS=1
"$python" -m pytest --numprocesses 3 --dist worksteal "$@"
if [ $# = 0 ] && command -v nvidia-smi >/dev/null; then exec "$python" -m pytest -m gpu; fi
