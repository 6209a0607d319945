"""deploy/grafana and deploy/prometheus: a real Prometheus that scrapes a served archive has values for each query."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.dashboard import FOLDER, render
from scripts.private_torchserve import ROOT, TorchServe, free_ports

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="Prometheus isn't installed: apt-get install prometheus"
)
CONFIG = ROOT / "deploy" / "prometheus"
DIGITS = [path.read_bytes() for path in sorted((ROOT / "data" / "digits").glob("*.png"))]
PANELS = [panel for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
# What Grafana puts in for its variables.
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    .replace("$__rate_interval", "1m")
    .replace("$model", ".*")
    for panel in PANELS
    for target in panel["targets"]
}
NAMES = [rule.get("alert") or rule["record"] for rule in RULES]
# What an alert compares: it has a value whether it fires or not. But for what no request can do to a sound server:
# have a batch fail that each of its requests survives.
LEFT_SIDES = {
    name: re.sub(r" [<>] [\d.]+$", "", rule["expr"].strip())
    for name, rule in zip(NAMES, RULES, strict=True)
    if name != "EnsembleBatchesFail"
}


def test_the_dashboard_is_up_to_date() -> None:
    assert (FOLDER / "dashboard.json").read_text() == render(), "run python -m scripts.dashboard"


def test_panels_lie_beside_and_below_each_other() -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_every_metric_of_ours_has_a_panel() -> None:
    declared = yaml.safe_load((ROOT / "config" / "metrics.yaml").read_text())["model_metrics"]
    own = {row["name"] for rows in declared.values() for row in rows if row["name"].startswith("Ensemble")}
    assert own <= set(re.findall(r"(Ensemble[A-Za-z]+)", " ".join(QUERIES.values())))


@needs_prometheus
def test_rules_fire_on_what_they_are_for() -> None:
    check([PROMTOOL, "check", "config", str(CONFIG / "prometheus.yml")])
    check([PROMTOOL, "test", "rules", str(Path(__file__).with_name("alerts_test.yml"))])
    tested = (Path(__file__).with_name("alerts_test.yml")).read_text()
    assert all(f"alertname: {rule['alert']}\n" in tested for rule in RULES if "alert" in rule)


def check(command: list[str | None]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """What a running one answers."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", params=params, trust_env=False, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """The query's finite values now."""
        rows = self.get("/query", query=query)["result"]
        return [value for row in rows if math.isfinite(value := float(row["value"][1]))]

    def without_values(self, queries: dict[str, str]) -> list[str]:
        return [name for name, query in queries.items() if not self.values(query)]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, server: TorchServe) -> Iterator[Prometheus]:
    """The repository's configuration but for target and pace, with requests of all kinds seen."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(CONFIG, folder, dirs_exist_ok=True)
    for name, old, new in (
        ("prometheus.yml", "15s", "1s"),
        ("targets.yml", "127.0.0.1:8082", server.metrics_url.removeprefix("http://")),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    (port,) = free_ports(1)
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log, cwd=folder)
    try:
        found = Prometheus(port)
        wait_until_scraped(found, process, folder / "log")
        ask_until_seen(server, found)
        yield found
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_scraped(prometheus: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if prometheus.values('up{job="ensembles"} == 1'):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def ask_until_seen(server: TorchServe, prometheus: Prometheus, timeout_s: float = 90.0) -> None:
    """Send what each metric counts, until each query has a value; a rate wants its counter to be scraped twice."""
    deadline = time.monotonic() + timeout_s
    wanted = {**QUERIES, **LEFT_SIDES}
    while time.monotonic() < deadline:
        for digit in DIGITS:
            server.predict(content=digit)
        server.predict(content=digit, headers={"X-Ensemble-Subset": "a"})
        server.predict(content=digit, headers={"X-Ensemble-Subset": "c"})  # no finite output: a 500
        server.predict(content=b"no image")
        wanted = {name: wanted[name] for name in prometheus.without_values(wanted)}
        if not wanted:
            return
        time.sleep(0.3)


@needs_prometheus
@pytest.mark.parametrize("name", QUERIES)
def test_a_panel_has_values(prometheus: Prometheus, name: str) -> None:
    assert prometheus.values(QUERIES[name])


@needs_prometheus
@pytest.mark.parametrize("name", LEFT_SIDES)
def test_a_rule_has_values(prometheus: Prometheus, name: str) -> None:
    assert prometheus.values(LEFT_SIDES[name])


@needs_prometheus
def test_prometheus_takes_all_rules_and_what_is_wrong_here_is_seen(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == NAMES
    assert {rule["health"] for rule in rules} == {"ok"}
    seen = {alert["labels"]["alertname"] for alert in prometheus.get("/alerts")["alerts"]}
    assert {"EnsembleFails", "EnsembleMemberNotFinite", "EnsembleRunsSlowly", "EnsembleAbstains"} <= seen
    assert "EnsembleServerGone" not in seen


@needs_prometheus
def test_figures_are_those_of_what_was_asked(prometheus: Prometheus) -> None:
    (bad,) = prometheus.values('EnsembleRefusedRequests{Status="415"}')
    (failed,) = prometheus.values('EnsembleRefusedRequests{Status="500"}')
    assert abs(bad - failed) <= 1  # one of each in each round
    agreements = prometheus.values(QUERIES["Agreement per member: {{ModelName}} {{Member}}"])
    assert agreements
    assert all(0 <= value <= 1 for value in agreements)
    assert prometheus.values(QUERIES["Items in a forward: mean {{ModelName}}"]) == [1.0]
    assert prometheus.values(QUERIES["Abstentions: {{ModelName}}"]) == [pytest.approx(1)]
