#!/usr/bin/env bash
# Which versions of Ray and Python does the engine run on? Makes an environment for each, runs the tests of the
# engine and of resuming in it, removes it, and prints a table for docs/versions.md.
#   bash tests/versions.sh                        all pairs; some 15 minutes and 8 GB of disk at a time
#   bash tests/versions.sh 3.11:2.52.1            one of them
# Needs the Pythons on PATH as python3.11, python3.12, python3.13, or pyenv's, and a package index.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
TESTS=(tests/test_engine.py tests/test_losses.py tests/test_failures.py tests/test_resume.py)
SECONDS_MAX=1200 # of the tests in one environment
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/versions-XXXX")
trap 'rm -rf "$scratch"' EXIT

python_of() { # 3.12 -> a command; pyenv's python3.12 on PATH may be a stub that only says where it is
    local python
    for python in "python$1" ~/.pyenv/versions/"$1".*/bin/python; do
        "$python" -c '' 2>/dev/null && echo "$python" && return
    done
}

install_in() { # environment, Python, Ray
    grep -v '^ray==' constraints.txt >"$scratch/constraints.txt"
    "$(python_of "$2")" -m venv "$1" &&
        "$1/bin/pip" install --quiet --upgrade pip &&
        "$1/bin/pip" install --quiet --no-cache-dir -c "$scratch/constraints.txt" \
            "ray[default,tune,train]==$3" -e '.[dev]'
}

row() { # Python and Ray: a line of the table
    local python=$1 ray=$2 log="$scratch/log" began=$SECONDS tests
    if ! install_in "$scratch/venv" "$python" "$ray" >"$log" 2>&1; then
        echo "| $python | $ray | - | not installed: $(grep -m1 ERROR "$log") | - |"
    else
        tests=$(timeout "$SECONDS_MAX" "$scratch/venv/bin/python" -m pytest -q -m '' -p no:cacheprovider "${TESTS[@]}" 2>&1)
        echo "$tests" >"$log"
        local torch
        torch=$("$scratch/venv/bin/python" -c 'import torch; print(torch.__version__)')
        echo "| $python | $ray | $torch | $(tail -1 "$log" | tr -d '=') | $((SECONDS - began)) |"
        grep -E '^(FAILED|ERROR)' "$log" >&2
    fi
    rm -rf "$scratch/venv"
    grep -qE '^[0-9]+ passed' "$log" && ! grep -qE '^(FAILED|ERROR)' "$log"
}

[ $# = 0 ] && set -- 3.11:2.52.1 3.11:2.60.0 3.12:2.60.0 3.13:2.60.0
failed=0
printf '%s, commit %s\n\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)"
printf '| Python | Ray | torch | tests | seconds |\n|---|---|---|---|---|\n'
for each in "$@"; do
    row "${each%%:*}" "${each##*:}" || failed=1
done
exit $failed
