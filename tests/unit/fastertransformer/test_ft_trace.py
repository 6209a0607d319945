"""Traced files against Hugging Face: same logits on any batch, in a fresh process too; and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastertransformer.build
import fastertransformer.trace
from fastertransformer import library as build
from fastertransformer import tracing as trace
from fastertransformer.modules import PADDING_LOGIT
from vmap_ensemble.encoders.traced.library import accepts_token_types, load_ft_library, load_traced
from vmap_ensemble.errors import LoadError

transformers = pytest.importorskip("transformers")
CLASSES = {
    "sequence_classification": transformers.BertForSequenceClassification,
    "question_answering": transformers.BertForQuestionAnswering,
    "token_classification": transformers.BertForTokenClassification,
}
ROOT = Path(__file__).resolve().parents[3]
LENGTHS = [[1], [512], [15], [80, *[8] * 7], [3, 1, 40, 17], [(7 * i) % 60 + 1 for i in range(32)]]


@pytest.fixture(scope="module", autouse=True)
def library(ft_library: Path) -> Path:
    return ft_library


def make_config(**changes):
    sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 128, "num_labels": 2, "initializer_range": 0.15}  # fmt: skip
    return transformers.BertConfig(**{**sizes, **changes})


def make_model(mode: str, **changes):
    torch.manual_seed(1)
    return CLASSES[mode](make_config(**changes)).eval()


def make_batch(lengths: list[int], extra: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and token types, padded beyond the longest."""
    generator = torch.Generator().manual_seed(len(lengths))
    longest = min(512, max(lengths) + extra)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 200, mask.shape, generator=generator) * mask
    types = torch.randint(0, 2, mask.shape, generator=generator) * mask
    return ids, mask, types


def assert_equal_on_real_tokens(traced, model, mode: str, batch, tolerance: float, token_types: bool) -> None:
    ids, mask, types = batch
    extra = {"token_type_ids": types} if token_types else {}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **extra).to_tuple()
        got = traced(ids, mask, *extra.values())
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        if mode != "sequence_classification":
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=list(CLASSES))
def traced_mode(request, tmp_path_factory):
    """(mode, Hugging Face model, loaded file) with padding removed."""
    mode = request.param
    file = tmp_path_factory.mktemp(mode) / "traced.pt"
    model = make_model(mode)
    trace.trace_checkpoint(model, mode, file, batch_size=2, max_length=512)
    return mode, model, load_traced(file), file


@pytest.mark.parametrize("token_types", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_equals_hugging_face(traced_mode, lengths: list[int], token_types: bool) -> None:
    mode, model, traced, _ = traced_mode
    assert_equal_on_real_tokens(traced, model, mode, make_batch(lengths), 1e-5, token_types)


@pytest.mark.parametrize("seed", range(6))
def test_equals_hugging_face_on_random_batches(traced_mode, seed: int) -> None:
    """Any batch of 1 to 32 texts of 1 to 512 tokens; the sum is bounded for the sake of time."""
    mode, model, traced, _ = traced_mode
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 33, (1,), generator=generator))
    longest = min(512, 3000 // count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    assert_equal_on_real_tokens(traced, model, mode, make_batch(lengths, extra=seed), 1e-5, bool(seed % 2))


def test_mask_with_holes_keeps_positions(traced_mode) -> None:
    mode, model, traced, _ = traced_mode
    ids, mask, types = make_batch([9, 12])
    mask[0, 4] = 0
    mask[1, 7:9] = 0
    assert_equal_on_real_tokens(traced, model, mode, (ids, mask, types), 1e-5, False)


def make_odd_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Padding on the left, holes, and both."""
    ids, mask, types = make_batch([9, 12, 7], extra=0)
    mask[0, :4], mask[1, 3], mask[1, 7:9], mask[2, 0], mask[2, 4] = 0, 0, 0, 0, 0
    return ids, mask, types


def classify_first_real_token(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Hugging Face's own classifier on the first token that the mask keeps."""
    with torch.no_grad():
        states = model.bert(ids, attention_mask=mask).last_hidden_state
        first = states[torch.arange(len(ids)), mask.argmax(1)]
        return model.classifier(torch.tanh(model.bert.pooler.dense(first)))


def test_padding_on_the_left_and_holes(traced_mode) -> None:
    mode, model, traced, _ = traced_mode
    ids, mask, types = make_odd_batch()
    if mode == "sequence_classification":
        torch.testing.assert_close(traced(ids, mask), classify_first_real_token(model, ids, mask), rtol=0, atol=1e-5)
    else:
        assert_equal_on_real_tokens(traced, model, mode, (ids, mask, types), 1e-5, True)


def test_a_text_without_any_token(traced_mode) -> None:
    mode, model, traced, _ = traced_mode
    ids, mask, types = make_batch([5, 3, 8])
    mask[1] = 0
    if mode == "sequence_classification":
        with pytest.raises(torch.jit.Error, match="a text without any token has nothing to classify"):
            traced(ids, mask)
        return
    assert_equal_on_real_tokens(traced, model, mode, (ids, mask, types), 1e-5, False)
    filling = PADDING_LOGIT if mode == "question_answering" else 0.0
    for some in (mask, torch.zeros_like(mask)):
        outputs = traced(ids, some)
        for logits in outputs if isinstance(outputs, tuple) else (outputs,):
            assert (logits[some.sum(1) == 0] == filling).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask, types: (ids, mask[:, :-1], types), r"input_ids and attention_mask of one shape"),
        (lambda ids, mask, types: (ids, mask[:1], types), r"input_ids and attention_mask of one shape"),
        (lambda ids, mask, types: (ids[0], mask[0], types[0]), r"one shape \(batch, length\)"),
        (lambda ids, mask, types: (ids, mask, types[:, 1:]), r"token_type_ids: expected shape"),
        (lambda ids, mask, types: (ids + 1000, mask, types), "index out of range"),
        (lambda ids, mask, types: (ids, mask, types + 5), "index out of range"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(traced_mode, change, message: str) -> None:
    with pytest.raises((torch.jit.Error, RuntimeError, IndexError), match=message):
        traced_mode[2](*change(*make_batch([4, 9])))


def test_fresh_process_gives_the_same_logits(traced_mode, library: Path, tmp_path: Path) -> None:
    _, _, traced, file = traced_mode
    ids, mask, _ = make_batch([6, 20, 1])
    torch.save({"ids": ids, "mask": mask}, tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        "from vmap_ensemble.encoders.traced.library import load_ft_library, load_traced\n"
        "load_ft_library(sys.argv[1])\n"
        "inputs = torch.load(sys.argv[3], weights_only=True)\n"
        "output = load_traced(sys.argv[2])(inputs['ids'], inputs['mask'])\n"
        "torch.save(output, sys.argv[4])\n"
        "assert 'transformers' not in sys.modules\n"
    )
    arguments = [str(library), str(file), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=environment, timeout=120)
    got = torch.load(tmp_path / "outputs.pt", weights_only=True)
    expected = traced(ids, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_file_names_nothing_but_the_interface(traced_mode) -> None:
    file = traced_mode[3]
    with zipfile.ZipFile(file) as archive:
        code = b"".join(archive.read(n) for n in archive.namelist() if n.endswith(".py"))
    assert b"__torch__.torch.classes.FasterTransformer.Encoder" in code
    assert set(re.findall(rb"torch\.classes\.[\w.]+", code)) == {b"torch.classes.FasterTransformer.Encoder"}
    operators = {name for name in re.findall(rb"ops\.(\w+\.\w+)", code) if not name.startswith(b"prim.")}
    assert operators <= {b"fastertransformer.rebuild_padding"}, operators
    assert b'torch.device("' not in code, "a device in the code would bind the file to it"


@pytest.mark.parametrize("mode", list(CLASSES))
@pytest.mark.parametrize("options", [{"remove_padding": False}, {"plain": True}], ids=["padded", "plain"])
def test_padding_kept(mode: str, options: dict, tmp_path: Path) -> None:
    model = make_model(mode)
    trace.trace_checkpoint(model, mode, tmp_path / "t.pt", batch_size=3, max_length=64, **options)
    traced = load_traced(tmp_path / "t.pt")
    for lengths in ([15], [30, 2, 9]):
        assert_equal_on_real_tokens(traced, model, mode, make_batch(lengths), 1e-5, True)
    # Position 0 is pooled, real or not, as Hugging Face does.
    assert_equal_on_real_tokens(traced, model, mode, make_odd_batch(), 1e-5, True)


# Against Hugging Face in the same dtype: both round each of three layers, in another order.
@pytest.mark.parametrize(("data_type", "tolerance"), [("fp16", 2e-2), ("bf16", 2e-1)])
@pytest.mark.parametrize("mode", list(CLASSES))
def test_half_precision(mode: str, data_type: str, tolerance: float, tmp_path: Path) -> None:
    model = make_model(mode)
    trace.trace_checkpoint(model, mode, tmp_path / "t.pt", batch_size=3, max_length=512, data_type=data_type)
    traced = load_traced(tmp_path / "t.pt")
    for lengths in ([1], [512], [30, 2, 9], [(7 * i) % 60 + 1 for i in range(32)]):
        assert_equal_on_real_tokens(traced, model, mode, make_batch(lengths), tolerance, True)


def test_padding_never_wins_a_question(tmp_path: Path) -> None:
    model = make_model("question_answering")
    trace.trace_checkpoint(model, "question_answering", tmp_path / "t.pt", max_length=64)
    ids, mask, _ = make_batch([4, 9])
    start, end = load_traced(tmp_path / "t.pt")(ids, mask)
    assert (start[mask == 0] == PADDING_LOGIT).all()
    assert (end[mask == 0] == PADDING_LOGIT).all()


def test_batch_equals_single_texts(traced_mode) -> None:
    _, _, traced, _ = traced_mode
    ids, mask, _ = make_batch([6, 20, 1])
    together = traced(ids, mask)
    for i in range(3):
        alone = traced(ids[i : i + 1], mask[i : i + 1])
        pairs = zip(together, alone, strict=True) if isinstance(together, tuple) else [(together, alone)]
        for batched, single in pairs:
            torch.testing.assert_close(batched[i : i + 1], single, rtol=0, atol=1e-5)


def test_too_long_an_input_is_refused(tmp_path: Path) -> None:
    trace.trace_checkpoint(
        make_model("token_classification"), "token_classification", tmp_path / "t.pt", max_length=8
    )
    ids, mask, _ = make_batch([9], extra=0)
    with pytest.raises(torch.jit.Error, match="length 9: this file was traced for at most 8"):
        load_traced(tmp_path / "t.pt")(ids, mask)


def test_command_line_in_one_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_model("sequence_classification").save_pretrained(tmp_path / "checkpoint")
    tokenizer = transformers.BertTokenizer(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    )
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    checkpoint = str(tmp_path / "checkpoint")
    options = ["--mode", "sequence_classification", "--model_name_or_path", checkpoint,
               "--tokenizer_name", checkpoint,
               "--batch_size", "2", "--max_seq_length", "32", "--data_type", "fp32", "--model_type", "thsext",
               "--remove_padding", "--do_lower_case", "--output", str(tmp_path / "out" / "traced.pt")]  # fmt: skip
    assert fastertransformer.trace.main(options) == 0
    assert "equal to the checkpoint within" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert accepts_token_types(load_traced(tmp_path / "out" / "traced.pt"))
    assert fastertransformer.trace.main([*options[:-1], str(tmp_path / "none.pt"), "--model_type", "ori"]) == 0
    assert "writes nothing" in capsys.readouterr().out
    assert not (tmp_path / "none.pt").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.RobertaConfig(), "expected 'bert', got 'roberta'"),
        (make_config(hidden_act="relu"), "hidden_act of the checkpoint: expected 'gelu', got 'relu'"),
        (make_config(layer_norm_eps=1e-5), "layer_norm_eps of the checkpoint: expected 1e-12, got 1e-05"),
        (make_config(is_decoder=True), "is_decoder of the checkpoint"),
        (make_config(max_position_embeddings=16), r"--max_seq_length: expected 1 to 16 .* got 32"),
    ],
)
def test_checkpoints_that_the_class_cannot_compute(config, message: str) -> None:
    with pytest.raises(trace.TraceError, match=message):
        trace.check_config(config, 32)


def test_checkpoint_without_the_head(tmp_path: Path) -> None:
    transformers.BertModel(make_config()).save_pretrained(tmp_path)
    with pytest.raises(trace.TraceError, match=r"no weights for .*: expected a checkpoint fine-tuned for --mode"):
        trace.load_checkpoint(str(tmp_path), "question_answering", 32)


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--mode", "question_answering", "--model_name_or_path", str(tmp_path / "none")]
    assert fastertransformer.trace.main(options) == 1
    assert "error: --model_name_or_path" in capsys.readouterr().err


def test_difference_above_the_tolerance_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trace.TOLERANCES, "fp32", -1.0)
    with pytest.raises(trace.TraceError, match="nothing was written"):
        trace.trace_checkpoint(make_model("sequence_classification"), "sequence_classification", tmp_path / "t.pt")
    assert list(tmp_path.iterdir()) == []


def load_alone(library: Path, *traced: Path) -> str:
    """Load in a process that has no library yet; return the LoadError's text."""
    script = (
        "import sys\n"
        "from vmap_ensemble.errors import LoadError\n"
        "from vmap_ensemble.encoders.traced.library import load_ft_library, load_traced\n"
        "try:\n"
        "    load_ft_library(sys.argv[1])\n"
        "    load_traced(sys.argv[2])\n"
        "except LoadError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    command = [sys.executable, "-c", script, str(library), *map(str, traced)]
    return subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True, text=True).stdout


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"libth_bert.so is missing: .*python -m fastertransformer.build"):
        load_ft_library(tmp_path / "libth_bert.so")


def compile_library(source: str, output: Path) -> Path:
    command = [build.find_compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(output)]
    subprocess.run(command, input=source, text=True, check=True, timeout=60)
    return output


def test_library_of_another_torch(tmp_path: Path) -> None:
    source = "namespace c10 { void gone_since_1_8(); } void use() { c10::gone_since_1_8(); } void (*keep)() = use;"
    message = load_alone(compile_library(source, tmp_path / "libth_bert.so"))
    assert "built for another PyTorch" in message
    assert "undefined symbol _ZN3c1014gone_since_1_8Ev" in message
    assert "build --force" in message


def test_library_without_the_class(tmp_path: Path) -> None:
    message = load_alone(compile_library("int nothing;", tmp_path / "libother.so"))
    assert "registers no class FasterTransformer.Encoder" in message


def test_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"text")
    assert "lib.so is no library that loads on this machine" in load_alone(tmp_path / "lib.so")


def test_missing_and_damaged_traced_files(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"traced file none.pt is missing"):
        load_traced(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no zip")
    with pytest.raises(LoadError, match=r"bad.pt is damaged or no TorchScript file"):
        load_traced(tmp_path / "bad.pt")


def rewrite(source: Path, target: Path, changes: dict[bytes, bytes]) -> Path:
    """Copy a traced file with the names in its code and pickles changed."""
    with zipfile.ZipFile(source) as old_zip, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new_zip:
        for name in old_zip.namelist():
            data = old_zip.read(name)
            if name.endswith((".py", ".pkl")):
                for old, new in changes.items():
                    data = data.replace(old, new)
            new_zip.writestr(name, data)
    return target


def test_file_of_an_older_build_without_a_namespace(traced_mode, tmp_path: Path) -> None:
    spaced, plain = b"__torch__.torch.classes.FasterTransformer", b"__torch__.torch.classes"
    changes = {
        spaced + b"\nEncoder\n": plain + b"\nFasterTransformerEncoder\n",
        spaced + b".Encoder": plain + b".FasterTransformerEncoder",
    }
    old = load_traced(rewrite(traced_mode[3], tmp_path / "old.pt", changes))
    ids, mask, _ = make_batch([6, 20, 1])
    expected = traced_mode[2](ids, mask)
    torch.testing.assert_close(old(ids, mask), expected, rtol=0, atol=0)
    old.save(str(tmp_path / "again.pt"))
    torch.testing.assert_close(load_traced(tmp_path / "again.pt")(ids, mask), expected, rtol=0, atol=0)


def test_traced_before_the_library_is_loaded(traced_mode) -> None:
    script = "import sys; from vmap_ensemble.encoders.traced.library import load_traced; load_traced(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    command = [sys.executable, "-c", script, str(traced_mode[3])]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert "needs the FasterTransformer library: load it first" in done.stderr


def test_traced_for_another_class_version(traced_mode, tmp_path: Path) -> None:
    file = rewrite(traced_mode[3], tmp_path / "t.pt", {b"FasterTransformer.Encoder": b"FasterTransformer.Decoder"})
    with pytest.raises(LoadError, match="another version of the FasterTransformer class"):
        load_traced(file)


def test_state_of_another_class_version(traced_mode, tmp_path: Path) -> None:
    """Of the tensor of eight scalars only seven are there."""
    size_and_stride = b"(K\x08t(K\x01t"
    file = rewrite(traced_mode[3], tmp_path / "t.pt", {size_and_stride: size_and_stride.replace(b"\x08", b"\x07")})
    with pytest.raises(
        LoadError, match=r"t\.pt was traced for another version of the FasterTransformer class"
    ) as error:
        load_traced(file)
    assert "expected an int64 tensor of 8 scalars" in str(error.value)


def test_traced_for_int8(traced_mode, tmp_path: Path) -> None:
    scalars = torch.tensor([4, 16, 1, 0, 3, 1, 0, 1])
    quantized = torch.tensor([4, 16, 1, 1, 3, 1, 0, 1])
    old, new = (tensor.numpy().tobytes() for tensor in (scalars, quantized))
    with zipfile.ZipFile(traced_mode[3]) as before, zipfile.ZipFile(tmp_path / "t.pt", "w") as after:
        rows = {name: before.read(name) for name in before.namelist()}
        assert list(rows.values()).count(old) == 1
        for name, data in rows.items():
            after.writestr(name, new if data == old else data)
    with pytest.raises(LoadError, match=r"t\.pt: int8_mode 1 is not supported by this library, only 0; trace"):
        load_traced(tmp_path / "t.pt")


def test_tensors_saved_on_cuda_load_on_a_cpu(traced_mode, tmp_path: Path) -> None:
    changes = {b"X\x03\x00\x00\x00cpu": b"X\x06\x00\x00\x00cuda:0"}
    moved = rewrite(traced_mode[3], tmp_path / "t.pt", changes)
    with zipfile.ZipFile(moved) as archive:
        assert any(b"cuda:0" in archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    ids, mask, _ = make_batch([6, 20, 1])
    torch.testing.assert_close(load_traced(moved)(ids, mask), traced_mode[2](ids, mask), rtol=0, atol=0)


def test_traced_on_cuda(tmp_path: Path) -> None:
    class OnDevice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.device("cuda:0"))

    torch.jit.script(OnDevice()).save(str(tmp_path / "t.pt"))
    with pytest.raises(LoadError, match=r"traced on cuda:0 and its code names that device, but .* runs on cpu"):
        load_traced(tmp_path / "t.pt")


def test_build_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert fastertransformer.build.main(["--output", str(tmp_path / "x.so")]) == 1
    assert "No C++ compiler: expected g++" in capsys.readouterr().err


def test_library_is_current_only_for_this_torch(tmp_path: Path) -> None:
    copy = tmp_path / "libpyt_fastertransformer.so"
    copy.write_bytes(b"")
    stamp = build.stamp_path(copy)
    assert not build.is_current(copy)
    stamp.write_text(json.dumps(build.describe_build()))
    assert build.is_current(copy)
    stamp.write_text(stamp.read_text().replace(torch.__version__.split("+")[0], "1.8.0"))
    assert not build.is_current(copy)
