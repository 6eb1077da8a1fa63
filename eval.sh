#!/usr/bin/env bash
# Lets a checkpoint watch the test videos and speak, then scores what it said. Further flags go to
# code/evaluation/eval.py; `bash eval.sh --help` lists them, and the environment variables that they default to.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
exec "$python" "$root/code/evaluation/eval.py" "$@"
