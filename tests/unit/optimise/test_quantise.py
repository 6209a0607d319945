"""Texts' archives in 8 bits: built, judged, served, or refused in one line."""

from __future__ import annotations

import json

import pytest

from archiver.command import main as command
from optimise.quantise.command import main
from tests.unit.optimise.test_texts import texts  # noqa: F401, the fixture
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.execution.cpu.kernel_library import load_library

needs_kernel = pytest.mark.skipif(load_library() is None, reason="no kernel for this machine")


@needs_kernel
def test_the_command_of_the_page_builds_what_it_judged(texts, tmp_path, capsys) -> None:  # noqa: F811
    output = tmp_path / "reviews_int8.mar"
    given = ["quantise", str(texts / "reviews"), "--samples", str(texts / "test.jsonl"), "--output", str(output)]
    assert command(given) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"reviews_int8.mar", "reviews_int8"}
    assert {path.name for path in (tmp_path / "reviews_int8").iterdir()} >= {"report.json", "report.html"}
    assert not list((tmp_path / "reviews_int8").glob("*.safetensors"))
    report = json.loads((tmp_path / "reviews_int8" / "report.json").read_text())
    assert report["examples"]["test"] == 80
    assert report["quantised"]["agreement"] >= 0.97
    assert report["quantised"]["size_mib"] < report["ensemble"]["size_mib"]
    assert set(report["quantised"]["latency_ms"]) == {"1", "8"}
    ensemble = Ensemble.load(output)
    assert (ensemble.execution.name, ensemble.names) == ("int8", ("m0", "m1", "m2"))
    assert "quantised" in capsys.readouterr().out
    assert main([str(output), *given[2:4], "--output", str(tmp_path / "again.mar")]) == 1
    assert "is quantised; take the archive without 'quantization'" in capsys.readouterr().err


@needs_kernel
def test_beyond_the_gate_no_archive_is_written(texts, tmp_path, capsys) -> None:  # noqa: F811
    output = tmp_path / "worse.mar"
    given = [str(texts / "reviews"), "--samples", str(texts / "test.jsonl"), "--output", str(output)]
    assert main([*given, "--max-nll-loss", "-1"]) == 1
    assert "refused: NLL" in capsys.readouterr().err
    assert not output.exists()
    assert main([*given, "--max-nll-loss", "-1", "--force"]) == 0
    assert output.is_file()


def test_other_outputs_and_images_are_refused(archive, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(archive), "--samples", "x.csv", "--output", str(tmp_path / "folder")])
    assert ended.value.code == 2
    assert "expected a name that ends in .mar" in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("text\na\n")
    assert main([str(archive), "--samples", str(tmp_path / "x.csv"), "--output", str(tmp_path / "o.mar")]) == 1
    assert "images are calibrated when they are packed: ./archive.sh NAME --samples" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv"}


def test_a_table_without_texts_is_one_line(texts, tmp_path, capsys) -> None:  # noqa: F811
    (tmp_path / "wrong.csv").write_text("words,label\na,up\n")
    given = [str(texts / "reviews"), "--samples", str(tmp_path / "wrong.csv"), "--output", str(tmp_path / "o.mar")]
    assert main(given) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.csv"}
