"""benchmarks.serve, briefly, with a real TorchServe per rival."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serve.__main__ import main


def test_rivals_answer_the_same_and_are_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "serve.json"
    brief = ["--seconds", "1", "--rounds", "1", "--warmup", "0.2", "--clients", "2", "--json", str(file)]
    assert main(["--handlers", "mnist", "--members", "2", "--rivals", "separate", "ours", *brief]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["rival"] for row in rows] == ["separate", "separate", "ours", "ours"]
    for row in rows:
        assert row["largest_difference"] <= 1e-6
        assert row["errors"] == {}
        assert row["requests_per_s"] > 0
        assert row["workers"] == (2 if row["rival"] == "separate" else 1)
        assert row["worker_mib"] > 50
    closed, opened = rows[2:4]
    assert closed["rate_ratio"] == pytest.approx(closed["requests_per_s"] / rows[0]["requests_per_s"])
    assert opened["rate"] == pytest.approx(0.7 * rows[0]["requests_per_s"])
    assert "2 members" in capsys.readouterr().out
