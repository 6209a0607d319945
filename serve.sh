#!/usr/bin/env bash
# Sets up what is missing, then serves one archive of setup_config.json with TorchServe on 127.0.0.1:8080.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

usage() {
    cat <<'TEXT'
usage: ./serve.sh [NAME]     serve an archive of setup_config.json as `ens` on 127.0.0.1:8080 (mnist_ens)
       ./serve.sh --status   tell what is served; status 1 when nothing is
       ./serve.sh --stop     stop what ./serve.sh started, and nothing else

Makes .venv, the members and the archive when they are missing, waits until the worker is ready, sends one
request and prints the answer with the command that asks the same. It goes on serving in the background.
TEXT
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    --stop | --status)
        if [[ ! -x $VENV/bin/python ]]; then
            say "Nothing is set up here, so nothing is served"
            [[ $1 == --stop ]] && exit 0
            exit 1
        fi
        ;;
    *) scripts/setup.sh ;;
esac
use_environment
exec python -m scripts.serve "$@"
