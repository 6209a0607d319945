#!/usr/bin/env bash
# Sets up what is missing, then runs every check, the quick ones first. Arguments go to pytest: ./test.sh -k members
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

usage() {
    cat <<'TEXT'
usage: ./test.sh [pytest arguments]
Runs ruff, mypy, shellcheck and every test, a real TorchServe included. With arguments only pytest runs:
./test.sh tests/unit, ./test.sh -k members, ./test.sh -x
TEXT
}

check() {
    say "$1"
    shift
    "$@"
}

case ${1:-} in -h | --help) usage && exit 0 ;; esac
scripts/setup.sh dev
use_environment
# Two threads: tests are small, and several processes share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

if (($# == 0)); then
    # Tests are not type-checked: they pass wrong types on purpose.
    mapfile -t python_folders < <(git ls-files -co --exclude-standard '*/*.py' | sed 's#/.*##' | sort -u | grep -v tests)
    mapfile -t shell_files < <(find . -maxdepth 2 \( -name '*.sh' -o -path './.ci/run' \) -not -path './.venv/*' | sort)
    check "ruff" ruff check .
    check "mypy" mypy "${python_folders[@]}"
    check "shellcheck" shellcheck -x "${shell_files[@]}"
fi
exec python -m pytest "$@"
