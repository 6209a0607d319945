#!/usr/bin/env bash
# Sets up what is missing, then runs every check, the quick ones first. Arguments go to pytest: ./test.sh -k members
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

usage() {
    cat <<'TEXT'
usage: ./test.sh                      every check and every test
       ./test.sh --checks             ruff, mypy and shellcheck alone
       ./test.sh --tests              every test alone, a real TorchServe included
       ./test.sh --python 3.13        the library's tests, Ray's and KServe's among them, on this Python and torch 2.14,
                                      in .venv-3.13, for which gigabytes are downloaded once. Nothing is done where
                                      there is no such Python. What it made is used by ./test.sh, too.
       ./test.sh [pytest arguments]   some tests, in one process: ./test.sh tests/unit, ./test.sh -k members, ./test.sh -x
Every test runs in as many processes as there are cores, at most four; tests/conftest.py says what stays together.
TEXT
}

check() {
    say "$1"
    shift
    "$@"
}

run_checks() {
    local python_folders shell_files
    # Tests are not type-checked: they pass wrong types on purpose.
    mapfile -t python_folders < <(git ls-files -co --exclude-standard '*/*.py' | sed 's#/.*##' | sort -u | grep -v tests)
    mapfile -t shell_files < <(find . -maxdepth 2 \( -name '*.sh' -o -path './.ci/run' \) -not -path './.venv/*' | sort)
    check "ruff" ruff check .
    check "mypy" mypy "${python_folders[@]}"
    check "shellcheck" shellcheck -x "${shell_files[@]}"
}

# One thread each: two would wait for each other's core.
run_tests() {
    local cores
    cores=$(nproc)
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest \
        --numprocesses $((cores < 4 ? cores : 4)) --dist loadscope --no-loadscope-reorder
}

next_stamp() { cat "$ROOT/tests/requirements-next.txt" "$ROOT/pyproject.toml" | sha256sum; }

# Prints a Python of this version that can make an environment: $PYTHON, one on PATH, or pyenv's; else nothing.
find_next() {
    local candidate
    for candidate in "${PYTHON:-}" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [[ -n $candidate ]] && "$candidate" -c "import ensurepip, sys, venv
sys.exit('%d.%d' % sys.version_info[:2] != '$1')" >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return 0
        fi
    done
}

# make_next VERSION PYTHON: TorchServe ends with Python 3.12; the library goes on, in an environment of its own.
make_next() {
    local python=$2 venv="$ROOT/.venv-$1"
    [[ $(cat "$venv/.stamp" 2>/dev/null) != "$(next_stamp)" ]] || return 0
    mkdir -p "$RUN"
    run_quietly "Making .venv-$1" "$RUN/next.log" "$python" -m venv --clear "$venv"
    run_quietly "Installing tests/requirements-next.txt into .venv-$1" "$RUN/next.log" \
        "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check -r "$ROOT/tests/requirements-next.txt"
    next_stamp >"$venv/.stamp"
}

# run_tests_on VERSION [pytest arguments]: what no server and no package beyond tests/requirements-next.txt is needed for.
run_tests_on() {
    local cores version=$1
    cores=$(nproc)
    shift
    (($#)) || set -- tests/unit/{client,core,serving,frontends} tests/unit/execution/int8
    # As in use_environment: nothing of another Python.
    env -u PYTHONHOME -u PYTHONPATH OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PATH="$ROOT/.venv-$version/bin:$PATH" \
        "$ROOT/.venv-$version/bin/python" -m pytest --numprocesses $((cores < 4 ? cores : 4)) \
        --dist loadscope --no-loadscope-reorder "$@"
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    --python)
        [[ ${2:-} == 3.[0-9]* ]] || fail "expected a version behind --python, such as 3.13"
        next=$(find_next "$2")
        if [[ -z $next ]]; then
            say "skipped: there is no Python $2 here that can make an environment (PYTHON=/path/to/python names one)"
            exit 0
        fi
        make_next "$2" "$next"
        run_tests_on "${@:2}"
        exit
        ;;
esac
scripts/setup.sh dev
use_environment

case "$*" in
    "")
        run_checks
        run_tests
        # Only where --python has made it: a clean clone downloads no second torch.
        if [[ $(cat .venv-3.13/.stamp 2>/dev/null) == "$(next_stamp)" ]]; then
            say "Python 3.13"
            run_tests_on 3.13
        fi
        ;;
    --checks) run_checks ;;
    --tests) run_tests ;;
    *)
        # Two threads: tests are small.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
        exec python -m pytest "$@"
        ;;
esac
