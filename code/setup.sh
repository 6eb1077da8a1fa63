# Sourced by demo.sh and test.sh: makes .venv with what requirements.txt pins, once, and again when the pins change.
# Needs Python 3.11 or newer with venv, and pip's access to a package index. Sets $python.

# Runs a command, and says every few seconds that it is still at work.
patiently() {
  local what=$1 began=$SECONDS
  shift
  "$@" &
  local worker=$!
  trap 'kill "$worker" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$worker" 2>/dev/null; do
    sleep 1
    if (((SECONDS - began) % 5 == 4)); then echo "  $what: $((SECONDS - began)) s"; fi
  done
  trap - INT TERM
  wait "$worker"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
stamp=$root/.venv/installed
pins=$(cat "$root/requirements.txt" "$root/code/qwen-vl-utils/pyproject.toml" "$root/code/data/pyproject.toml")
system=${PYTHON:-python3} asked=
told='import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))'
if [ -n "${PYTHON:-}" ] || [ ! -e "$root/.venv" ]; then
  if ! asked=$("$system" -c "import ensurepip, venv; $told" 2>/dev/null); then
    echo "error: $system is missing, older than 3.11 or lacks venv: install it, or name another with PYTHON=..." >&2
    exit 2
  fi
fi
if [ -e "$root/.venv" ]; then
  if ! made=$("$python" -c "import pip; $told" 2>/dev/null); then
    echo "error: $root/.venv is no whole environment of Python 3.11 or newer: delete it and start again" >&2
    exit 2
  fi
  if [ "$made" != "${asked:-$made}" ]; then
    echo "error: $root/.venv is of Python $made, $PYTHON is $asked: delete .venv, or start without PYTHON=..." >&2
    exit 2
  fi
fi
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$pins" ]; then
  echo "installing what requirements.txt names into .venv: a few minutes, once"
  [ -e "$root/.venv" ] || "$system" -m venv "$root/.venv"
  (cd "$root" && patiently "installing" "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt)
  printf '%s' "$pins" >"$stamp"
fi
