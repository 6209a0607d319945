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

case ${1:-} in -h | --help) usage && exit 0 ;; esac
scripts/setup.sh dev
use_environment

case "$*" in
    "")
        run_checks
        run_tests
        ;;
    --checks) run_checks ;;
    --tests) run_tests ;;
    *)
        # Two threads: tests are small.
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
        exec python -m pytest "$@"
        ;;
esac
