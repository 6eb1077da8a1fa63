# Sourced by demo.sh and test.sh. Creates .venv with the packages of requirements.txt, and updates it when the pinned
# versions change. Needs Python 3.11 or newer with venv, and access to a package index. Sets $python.

# Runs a command and prints every few seconds that it is still running.
with_progress() {
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
system=${PYTHON:-python3} requested=
version='import sys; print("%d.%d" % sys.version_info[:2])'
version_check="$version; sys.exit(sys.version_info < (3, 11))"
if [ -n "${PYTHON:-}" ] || [ ! -e "$root/.venv" ]; then
  other="or give another Python with PYTHON=..." fault=
  if ! command -v "$system" >/dev/null; then
    fault="is missing: install Python 3.11 or newer, $other"
  elif ! requested=$("$system" -c "$version" 2>/dev/null); then
    fault="does not run: install Python 3.11 or newer, $other"
  elif ! "$system" -c "$version_check" >/dev/null 2>&1; then
    fault="is Python $requested: install 3.11 or newer, $other"
  elif ! "$system" -c "$version; import ensurepip, venv" >/dev/null 2>&1; then
    fault="(Python $requested) lacks venv: install it, on Debian and Ubuntu as python$requested-venv, $other"
  fi
  if [ -n "$fault" ]; then
    echo "error: $system $fault" >&2
    exit 2
  fi
fi
if [ -e "$root/.venv" ]; then
  if ! existing=$("$python" -c "import pip; $version_check" 2>/dev/null); then
    echo "error: $root/.venv is not a complete environment of Python 3.11 or newer: delete it and run the command again" >&2
    exit 2
  fi
  if [ "$existing" != "${requested:-$existing}" ]; then
    echo "error: $root/.venv has Python $existing, $PYTHON is $requested: delete .venv, or run without PYTHON=..." >&2
    exit 2
  fi
fi
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$pins" ]; then
  echo "installing the packages of requirements.txt in .venv: takes a few minutes, once"
  [ -e "$root/.venv" ] || "$system" -m venv "$root/.venv"
  (cd "$root" && with_progress "installing" "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt)
  printf '%s' "$pins" >"$stamp"
fi
