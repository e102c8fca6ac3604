#!/usr/bin/env bash
# Runs the whole study, or its tests, making an environment first if there is none.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$here/.venv"
stamp="$venv/.complete"

usage() {
  cat <<'TEXT'
./run_all.sh [OPTIONS]            run the study; figures appear in figures/
./run_all.sh --test [PYTEST...]   run the tests

Without options it runs the `workshop` profile with the trained models in data/reference/.
  --profile NAME     smoke (minutes) | workshop (a laptop) | paper (GPUs)
  --train            train everything here instead
  --corpus SPEC      environment | files:DIR | hf:NAME[:config][:split]
  --seed N           another seed
  --only NN [NN...]  these notebooks; --from NN, --to NN: a range
  --force            run even what is there already
  --dry-run          say what would run, and why
  --no-export        make no PNGs
  -p NAME=VALUE      set a notebook's parameter

The active Python environment is used if it has what pyproject.toml asks for; else .venv is made from requirements.lock.
PYTHON=/path/to/python chooses the Python that .venv is made with; pip's own settings (PIP_INDEX_URL, ...) are honoured.
TEXT
}

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

new_enough() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# This checkout is what runs, even where another is installed or is the current folder (-P keeps that off the path).
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
satisfies() { new_enough "$1" && "$1" -P -m sae_lib.study doctor --quiet "${@:2}" >/dev/null 2>&1; }

locked_hash() { "$1" -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
  "$here/requirements.lock" "$here/pyproject.toml"; }

# Prints the python that has the project's packages, making .venv if need be.
find_environment() {
  local candidate base="" log
  for candidate in python3 python; do
    if satisfies "$candidate" "$@"; then say "Using the active environment: $(command -v "$candidate")"; command -v "$candidate"; return; fi
  done
  if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(locked_hash "$venv/bin/python")" ]; then
    say "Using $venv"; printf '%s\n' "$venv/bin/python"; return
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if new_enough "$candidate"; then base="$candidate"; break; fi
  done
  if command -v flock >/dev/null 2>&1; then  # two first runs at once make one environment
    mkdir -p "$here/data"; exec 9>"$here/data/.environment.lock"
    if ! flock -n 9; then
      say "Waiting for another run that is making the environment"; flock 9; exec 9>&-; find_environment "$@"; return
    fi
  fi
  [ -n "$base" ] || die "Python 3.11 or newer is needed and none was found: install one, or name it with PYTHON=/path/to/python."
  [ -f "$here/requirements.lock" ] || die "requirements.lock is missing: check out the whole project again."
  say "Making $venv with $(command -v "$base"); its packages are downloaded once, which takes some minutes"
  # Whatever is there is not known to be whole, so it is not built upon; the stamp is written last.
  "$base" -m venv --clear "$venv" >&2 \
    || die "$(command -v "$base") cannot make a virtual environment: install its venv module (on Debian and Ubuntu the package python3-venv)."
  log="$venv/install.log"
  if ! { "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.lock" \
         && "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps -e "$here"; } 2>&1 | tee "$log" >&2; then
    if grep -qiE 'no space left|disk quota' "$log"; then
      die "The disk is full: free about 3 GB and run this again."
    elif grep -qiE 'connection|network|resolve|timed out|proxy|No matching distribution' "$log"; then
      die "The packages could not be downloaded: connect to the network, or point pip at a mirror with PIP_INDEX_URL, and run this again."
    fi
    die "The packages could not be installed: see $log, and run this again."
  fi
  locked_hash "$venv/bin/python" > "$stamp.part"; mv "$stamp.part" "$stamp"
  printf '%s\n' "$venv/bin/python"
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --test)
    shift
    python="$(find_environment --extra dev)"
    cd "$here"
    exec "$python" -m pytest "$@"
    ;;
  *)
    python="$(find_environment)"
    exec "$python" -P -m sae_lib.study run "$@"
    ;;
esac
