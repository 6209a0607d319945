"""Turns the panels of scripts/dashboard_panels.py into Grafana's JSON: `python -m scripts.dashboard` writes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from scripts.dashboard_panels import ROWS, Panel
from scripts.generated import ROOT, write_or_check

FOLDER = ROOT / "deploy" / "grafana"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's grid is 24 wide: three panels beside each other.
WIDTH, HEIGHT = 8, 8


def variables() -> list[dict[str, Any]]:
    """What is chosen above the dashboard: Prometheus, and models."""
    models = "label_values(ts_inference_requests_total, model_name)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            **{"name": "model", "type": "query", "datasource": DATASOURCE, "label": "Model"},
            **{"query": models, "definition": models, "refresh": 2, "sort": 1},
            **{"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}},
        },
    ]


def lay_out() -> Iterator[dict[str, Any]]:
    """Panels, and the rows that part them."""
    number, top = 0, 0
    for title, panels in ROWS.items():
        number += 1
        yield {**place(number, 0, top, 24, 1), "type": "row", "title": title, "collapsed": False, "panels": []}
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            left, down = index % 3 * WIDTH, index // 3 * HEIGHT
            yield {**place(number, left, top + down, WIDTH, HEIGHT), **draw(panel)}
        top += -(-len(panels) // 3) * HEIGHT


def place(number: int, left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """A panel's number and where it is."""
    return {"id": number, "gridPos": {"h": height, "w": width, "x": left, "y": top}}


def draw(panel: Panel) -> dict[str, Any]:
    """A panel in Grafana's form."""
    axis: dict[str, Any] = {"unit": panel.unit, "custom": {"fillOpacity": 10, "showPoints": "never"}}
    axis |= {} if panel.most is None else {"max": panel.most}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.tells,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": axis, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole file."""
    return {
        "uid": "vmap-ensemble",
        "title": "Ensembles",
        "tags": ["vmap-ensemble"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": variables()},
        "panels": list(lay_out()),
    }


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> int:
    """Write or check the file."""
    return write_or_check({"dashboard.json": render}, "python -m scripts.dashboard", __doc__, FOLDER)


if __name__ == "__main__":
    sys.exit(main())
