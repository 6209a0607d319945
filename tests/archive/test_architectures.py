"""Every classifier family of torchvision and transformers: served as its members answer, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from scripts.architecture_sweep import Row, image_families, text_families, try_image, try_text
from scripts.architectures_docs import PAGE, image_line, render, text_line

transformers = pytest.importorskip("transformers")

LINES = PAGE.read_text(encoding="utf-8").splitlines()


def check_line(line: str, version: str) -> None:
    """The page says so, where it was written with the versions that are installed."""
    if version in " ".join(LINES[:8]):
        assert line in LINES, f"python -m scripts.architectures_docs writes another row: {line}"


@pytest.mark.parametrize("name", sorted(image_families()))
def test_images(name: str, tmp_path: Path) -> None:
    row = try_image(name, tmp_path)  # raises where an answer is wrong
    assert not row.refused
    check_line(image_line(row), f"torchvision {torchvision.__version__.split('+')[0]}")


@pytest.mark.parametrize("kind", sorted(text_families()))
def test_texts(kind: str, tmp_path: Path) -> None:
    row = try_text(kind, tmp_path)
    assert "\n" not in row.refused
    assert len(row.refused) < 400
    check_line(text_line(row), f"transformers {transformers.__version__}")


def test_most_are_tried_and_served() -> None:
    untried = LINES[LINES.index("## Not tried") :] if "## Not tried" in LINES else []
    assert len([line for line in untried if line.startswith("| `")]) <= 3
    assert len([line for line in LINES if line.startswith("| `")]) >= len(image_families()) + 120


def test_a_page_tells_rows_apart() -> None:
    served = Row("a", "AModel", vmap=True, padding="removed")
    page = render(
        [Row("net", "net2", prepared=True)], [served, Row("b", "B", "can't"), Row("c", "C", "no", is_untried=True)]
    )
    assert "| `net` | net2 | prepared, loop |" in page
    assert "| `a` | AModel | vmap, loop | removed |" in page
    assert (
        page.index("## Refused") < page.index("| `b` | can't |") < page.index("## Not tried") < page.index("| `c` |")
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("has_token", [True, False])
def test_a_decoder_without_a_padding_token_reads_the_last_real_token(
    kind: str, has_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import architecture_sweep

    small, save = architecture_sweep.small_config, architecture_sweep.save_small_tokenizer

    def without_padding(name: str) -> object:
        config = small(name)
        config.pad_token_id = None
        return config

    def without_token(folder: Path) -> None:
        save(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"pad_token": "[PAD]"', '"pad_token": null'))

    monkeypatch.setattr(architecture_sweep, "small_config", without_padding)
    if not has_token:
        monkeypatch.setattr(architecture_sweep, "save_small_tokenizer", without_token)
    row = try_text(kind, tmp_path)  # the plain models are asked one text at a time, with nothing to pad
    assert (row.refused, row.padding) == ("", "to the longest text")


def test_outputs_of_texts_that_run_alone_have_no_padding(tmp_path: Path) -> None:
    row = try_text("fnet", tmp_path)  # compares `outputs` of a list, and the answers
    assert row.padding == "one by one"
    assert torch.tensor(row.difference) < 1e-4
