"""benchmarks.loading --served: phases that add up to what was measured, and another version beside ours."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import served_start
from benchmarks.runs import loading


def test_phases_are_in_order_and_add_up(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "hash"
    folder.mkdir(parents=True)
    for name, seconds in (("first.py", 101.0), ("last.py", 102.5), ("cached.pyc", 109.0)):
        (folder / name).write_text("")
        os.utime(folder / name, (seconds, seconds))
    phases = served_start._phases(tmp_path, started=100.0, worker_started=103.0, load_s={"import": 2.0, "stack": 0.5})
    assert phases == {"jvm": 1.0, "unzip": 1.5, "launch": 0.5, "import": 2.0, "stack": 0.5}


def test_another_versions_handlers_are_packed(tmp_path: Path) -> None:
    handlers = tmp_path / "handlers"
    (handlers / "vmap_ensemble").mkdir(parents=True)
    (handlers / "resnet_handler.py").write_text("")
    (handlers / "vmap_ensemble" / "old.py").write_text("")
    members = tmp_path / "unpacked"
    members.mkdir()
    (members / "members.json").write_text("{}")
    archive = served_start.pack_folder(members, tmp_path / "ens.mar", 8, handlers)
    code = {"resnet_handler.py", "vmap_ensemble/old.py"}
    assert set(zipfile.ZipFile(archive).namelist()) == code | {
        "members.json", "MAR-INF/MANIFEST.json", "model-config.yaml",
    }  # fmt: skip


def test_ours_is_told_as_a_share_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = iter([20.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(served_start, "pack_folder", lambda *args: args[1])

    def start(*_args: Any) -> dict[str, Any]:
        ready_s = next(starts)
        return {"ready_s": ready_s, "phases_s": {"import": ready_s / 2}, "serves": "eager", "reason": "asked for"}

    monkeypatch.setattr(served_start, "serve_once", start)
    ours = {"ready_s": 6.0, "first": {"ready_s": 15.0}}
    other = loading.measure_other(tmp_path, tmp_path, 3, 8, tmp_path / "handlers", ours)
    assert (other["first"]["ready_s"], other["ready_s"], other["phases_s"]) == (20.0, 12.0, {"import": 6.0})
    printed = capsys.readouterr().out
    assert "15.00 s, the other 20.00 s: 0.75 of it" in printed
    assert "6.00 s, the other 12.00 s: 0.50 of it" in printed
