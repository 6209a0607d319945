# shellcheck shell=bash
# Turns a repository root into the few shell functions that setup.sh, serve.sh and test.sh share.
# Sourced, never run. ROOT is the repository; everything that the scripts write lies in ROOT/.venv and ROOT/.run.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
RUN="$ROOT/.run"
export RUN

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# run_quietly LABEL LOGFILE COMMAND...: output to the log file; after 2 s a progress line, on a terminal a
# spinner with seconds, elsewhere one line every 15 s. Returns the command's status and shows the log's end
# when it failed.
run_quietly() {
    local label=$1 log=$2 start=$SECONDS last_line=0 pid status=0 elapsed turn='|/-+' step=0
    shift 2
    mkdir -p "$(dirname "$log")"
    "$@" >>"$log" 2>&1 &
    pid=$!
    # shellcheck disable=SC2064  # the pid of now is meant
    trap "kill $pid 2>/dev/null || true; exit 130" INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        elapsed=$((SECONDS - start))
        if [[ -t 1 ]] && ((elapsed >= 2)); then
            printf '\r%s %s %ds ' "${turn:step++%4:1}" "$label" "$elapsed"
        elif ((elapsed >= 2 && (last_line == 0 || elapsed - last_line >= 15))); then
            say "  $label: $elapsed s"
            last_line=$elapsed
        fi
        sleep 0.3
    done
    wait "$pid" || status=$?
    trap - INT TERM
    [[ -t 1 ]] && printf '\r\033[K'
    if ((status != 0)); then
        printf 'error: %s failed (status %d). The last lines of %s:\n' "$label" "$status" "${log#"$ROOT"/}" >&2
        tail -n 15 "$log" >&2
        return "$status"
    fi
    say "$label: done in $((SECONDS - start)) s"
}

# A Python of a version that torch 2.12.1 and TorchServe 0.12 both run on, able to make an environment.
find_python() {
    local candidate seen=""
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
        [[ -n $candidate ]] || continue
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
        seen+=" $candidate($("$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo 'does not run'))"
    done
    fail "no usable Python: expected 3.10, 3.11 or 3.12 with the modules venv and ensurepip, found:${seen:- none}." \
        "Install one (on Debian: apt install python3 python3-venv) or set PYTHON=/path/to/python3.11"
}

# Prints the folder for JAVA_HOME when the machine's own Java is 11 or newer and really runs, else nothing.
find_system_java() {
    local java version
    for java in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(PATH=${PATH//"$VENV/bin:"/} command -v java || true)"; do
        [[ -n $java && -x $java && $java != "$VENV"/* ]] || continue
        version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1) || continue
        if [[ $version =~ ^[0-9]+$ ]] && ((version >= 11)); then
            (cd "$(dirname "$(readlink -f "$java")")/.." && pwd -P)
            return 0
        fi
    done
    return 0
}

# Puts the environment first on PATH and nothing of the caller's Python in the way.
use_environment() {
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONHOME PYTHONPATH
}
