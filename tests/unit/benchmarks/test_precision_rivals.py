"""Rivals in 8 bits: each engine's answers on tiny members are near float32's, and a missing package is said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measuring import int8_engines
from benchmarks.measuring.int8_engines import StaticInt8
from benchmarks.measuring.precisions import Agreement
from vmap_ensemble.errors import EnsembleError

ENGINES = {"onnxruntime": "onnxruntime", "openvino": "nncf"}  # method -> the package that CI may lack


def build_members(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)).eval()
        for _ in range(count)
    ]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_members_of_an_engine_are_near_the_loop_and_rows_of_a_short_batch_are_those_of_a_full_one(
    engine: str, tmp_path: Path
) -> None:
    pytest.importorskip(ENGINES[engine])
    members, x = build_members(2), torch.randn(4, 3, 6, 6)
    samples = [x, torch.randn(1, 3, 6, 6)]  # x itself: what lies beyond the samples' range would be clipped
    with torch.no_grad():
        forward = getattr(StaticInt8(members, samples, tmp_path), engine)(x)
        want = torch.stack([member(x) for member in members])
        got = forward(x)
        assert got.shape == want.shape
        assert 0 < Agreement.of(want, got).largest < 0.1  # 8 bits, not float32
        torch.testing.assert_close(forward(x[:3]), got[:, :3])


def test_samples_fill_the_last_batch_from_the_first_on(tmp_path: Path) -> None:
    samples = torch.arange(5.0).reshape(5, 1)
    batches = list(StaticInt8(build_members(1), [samples[:2], samples[2:]], tmp_path)._batches(4))
    assert torch.cat(batches).flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_engines, "find_spec", lambda package: None if package == "nncf" else True)
    with pytest.raises(EnsembleError, match=r"^nncf not installed: pip install -r requirements-bench.txt$"):
        StaticInt8(build_members(1), [torch.randn(2, 3, 6, 6)], tmp_path).openvino(torch.randn(1, 3, 6, 6))


def test_agreement_counts_members_predictions_and_is_relative_to_the_largest_logit() -> None:
    want = torch.tensor([[[4.0, 0.0], [1.0, 2.0]]])
    got: Tensor = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    assert Agreement.of(want, got) == Agreement(top1=0.5, largest=0.5, mean=3 / 16, predictions=2)


def test_encoders_in_8_bits_are_timed_beside_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    from benchmarks.runs import precision_texts

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=1100
    )
    encoder = tmp_path / "encoder"
    transformers.BertModel(config).save_pretrained(encoder)
    monkeypatch.setattr(precision_texts, "find_default_model", lambda: encoder)
    monkeypatch.setattr(precision_texts, "LENGTH", 16)
    monkeypatch.setattr(precision_texts, "UNSEEN", [3, 7])
    monkeypatch.setattr(precision_texts, "drop_hopeless", lambda runs, baseline: (runs, 1e9))
    options = argparse.Namespace(count=2, texts=["single"], seconds=0.01, markdown=True)
    with torch.no_grad():
        figures = precision_texts.measure_texts(options, tmp_path)["times"]["single"]
    rivals = {timing["name"] for timing in figures["timings"]}
    assert rivals >= {"fp32 loop", "fp32 ours", "fp32 ONNX Runtime", "int8 ONNX Runtime"}
    assert figures["agreement"]["fp32 ours"]["largest"] < 1e-4 < figures["agreement"]["int8 ONNX Runtime"]["largest"]
    assert "| int8 ONNX Runtime |" in capsys.readouterr().out
