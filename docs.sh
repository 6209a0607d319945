#!/usr/bin/env bash
# Sets up what is missing, then turns README.md, docs/ and what they link to into a site: build/site.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

usage() {
    cat <<'TEXT'
usage: ./docs.sh [--serve]
Builds the site into build/site; a link or an anchor that leads nowhere is an error. --serve shows it on
http://127.0.0.1:8000 and builds it again at every edit, until Ctrl-C.
TEXT
}

(($# <= 1)) || { usage >&2 && exit 2; }
case ${1:-} in
    -h | --help) usage && exit 0 ;;
    "" | --serve) ;;
    *) usage >&2 && exit 2 ;;
esac
scripts/setup.sh docs
use_environment
# The theme's notice of its successor; versions are pinned.
export NO_MKDOCS_2_WARNING=1
if [[ ${1:-} == --serve ]]; then
    exec python -m mkdocs serve
fi
python -m mkdocs build --strict --quiet
say "The site is in build/site: open build/site/index.html, or ./docs.sh --serve for the search, too"
