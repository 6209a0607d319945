#!/usr/bin/env bash
# pytest-xdist 3.8.0 with pytest 9.2.0: `--dist loadgroup` spreads the tests of one xdist_group over all workers, silently.
#
# A good engineer would guess that a group stays on one worker, as the documentation says. xdist appends the group to
# `item._nodeid`, from which its scheduler reads it back; since then pytest computes `nodeid` from `item._id`.
# Seen: tests of one group run on gw0 and gw1. A scheduler of one's own (pytest_xdist_make_scheduler) does group.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0

cat >"$work/test_group.py" <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(8))
def test_of_the_group(number):
    time.sleep(0.2)
PYTHON
workers=$(cd "$work" && venv/bin/python -m pytest -v -n 2 --dist loadgroup test_group.py | grep -o '^\[gw[01]\]' | sort -u)
echo "workers that ran the group: ${workers//$'\n'/ }"
[[ $(wc -l <<<"$workers") == 2 ]] && echo "confirmed: one group, two workers"
