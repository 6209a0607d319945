#!/usr/bin/env bash
# Builds .mar archives of ensembles from setup_config.json, and checks them; see ./archive.sh --help.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Looked for, not imported: that takes seconds, and --help needs none of them.
needed='import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))'

can_archive() {
    [ -n "$1" ] && command -v "$1" >/dev/null 2>&1 && "$1" -c "$needed" torch torchvision safetensors pydantic rich >/dev/null 2>&1
}

python=""
for candidate in "$root/.venv/bin/python" "${PYTHON:-}" python3; do
    if can_archive "$candidate"; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    "$root/scripts/setup.sh" >&2
    python="$root/.venv/bin/python"
fi

# Paths on the command line start where the caller is, so the working directory stays; blocks and archives are here.
export VMAP_ENSEMBLE_HOME="$root"
PYTHONPATH="$root:$root/handlers${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m archiver "$@"
