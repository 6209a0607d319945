#!/usr/bin/env bash
# ray 2.60.0: the _sum of a ray.util.metrics.Histogram is not the sum of what was observed.
#
# A good engineer would guess that rate(x_sum) / rate(x_count) is a mean, as with every Prometheus client. Ray sends
# counts per bucket from the worker to the node's agent, which observes each bucket's middle as often: the sum is that of
# middles, and a mean can be wrong by half a bucket. Counts are exact.
# Seen: 10 observations of 0.2 in a bucket from 0 to 1 are scraped as _count 10 and _sum 5 instead of 2.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0"

HOME="$work" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "$work/venv/bin/python" - <<'PYTHON'
import re
import socket
import time
import urllib.request

import ray
from ray.util.metrics import Histogram

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(
    num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", _metrics_export_port=port, log_to_driver=False
)
observed = 10 * [0.2]


@ray.remote
class Worker:
    def __init__(self):
        self.seconds = Histogram("work_seconds", description="of work", boundaries=[1.0, 2.0])

    def work(self):
        for value in observed:
            self.seconds.observe(value)


worker = Worker.remote()
ray.get(worker.work.remote())
found = {}
for _ in range(60):
    time.sleep(1)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        continue
    found = dict(re.findall(r"^ray_work_seconds_(count|sum)\{[^}]*\} (\S+)$", text, re.M))
    if float(found.get("count", 0)) == len(observed):
        break
ray.shutdown()
print(f"observed: {len(observed)} values, their sum {sum(observed):g}; scraped: {found}")
assert float(found["count"]) == len(observed)
assert float(found["sum"]) == 0.5 * len(observed), f"the behaviour changed: {found}"
print("as described: the sum is that of the bucket's middle")
PYTHON
