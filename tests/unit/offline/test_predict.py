"""vmap-ensemble predict: the answers of the library, in order, for every kind of input; cut off and gone on."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archiver.command import main as command
from tests.conftest import seeded, write_archive
from vmap_ensemble import many
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.errors import ItemError, RequestError
from vmap_ensemble.many import Row, Windows, find_batch, load_windows
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.offline.command import main
from vmap_ensemble.offline.inputs import open_rows
from vmap_ensemble.tasks.answers import Options

ROWS = 150  # two windows of images, and a part of a third


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    states = {f"m{index}": seeded(MnistNet, index).state_dict() for index in range(3)}
    folder = write_archive(tmp_path_factory.mktemp("archive") / "ens", states, {"handler": "mnist_handler.py"})
    shutil.copy(Path(__file__).parents[3] / "handlers" / "mnist_handler.py", folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(ROWS):
        image = Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8))
        image.save(folder / f"{index}.png")
    (folder / "70.png").write_bytes(b"no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_text("not an image")
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(archive: Path, photos: Path) -> list[dict]:
    """Each file alone, by the library."""
    ensemble = Ensemble.load(archive)
    found = []
    for index in range(ROWS):
        (answer,) = ensemble.predict([photos / f"{index}.png"], errors="return")
        found.append(None if isinstance(answer, ItemError) else answer.body)
    return found


def check(lines: list[dict], expected: list[dict]) -> None:
    assert len(lines) == len(expected)
    for line, body in zip(lines, expected, strict=True):
        if body is None:
            assert line["error"]["code"] == 415
            continue
        assert line["answer"]["prediction"]["index"] == body["prediction"]["index"]
        assert line["answer"]["prediction"]["probability"] == pytest.approx(
            body["prediction"]["probability"], abs=1e-5
        )
        assert line["answer"]["uncertainty"] == pytest.approx(body["uncertainty"], abs=1e-5)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_in_natural_order(
    archive: Path, photos: Path, expected: list[dict], tmp_path: Path, workers: str
) -> None:
    target = tmp_path / "answers.jsonl"
    assert main([str(archive), str(photos), "--output", str(target), "--workers", workers]) == 0
    lines = read(target)
    assert [line["input"] for line in lines] == [f"{index}.png" for index in range(ROWS)]
    check(lines, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_two_devices_share_the_rows(archive: Path, photos: Path, expected: list[dict], tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    assert main([str(archive), str(photos), "--output", str(target), "--device", "cpu", "cpu", "--workers", "0"]) == 0
    check(read(target), expected)


@pytest.mark.parametrize("keep", [0, 1, 63, 64, 100, 128, 149])
def test_a_run_that_was_cut_off_goes_on(
    archive: Path, photos: Path, tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(archive), str(photos), "--workers", "0", "--batch-size", "16", "--output"]
    whole, target = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert main([*arguments, str(whole)]) == 0

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("os.replace", lambda a, b: stop() if b == target else Path(a).rename(b))
        assert main([*arguments, str(target)]) == 130
    part = target.with_name("cut.jsonl.part")
    lines = part.read_bytes().splitlines(keepends=True)
    # What a kill leaves behind: whole lines, and a piece of one.
    part.write_bytes(b"".join(lines[:keep]) + lines[keep][:20])
    assert main([*arguments, str(target)]) == 0
    assert target.read_bytes() == whole.read_bytes()


def test_a_part_of_something_else_is_not_continued(
    archive: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.part").write_text("{}\n" * 64)
    (tmp_path / "a.jsonl.state").write_text(json.dumps({"archive": ["other"]}))
    arguments = [str(archive), str(photos), "--output", str(target), "--workers", "0"]
    assert main(arguments) == 1
    assert "was made with archive" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main(arguments) == 1
    assert "a.jsonl: exists; --force replaces it" in capsys.readouterr().err


def test_tables_and_shards(archive: Path, photos: Path, expected: list[dict], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\ufeffid,image\n" + "".join(f"{i},p/{i}.png\n" for i in range(3)) + "9,\n")
    shutil.copytree(photos, tmp_path / "p")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for index in range(3):
            shard.add(photos / f"{index}.png", f"a/{index}.png")
        entry = tarfile.TarInfo("a/0.cls")
        shard.addfile(entry, io.BytesIO(b""))
    import base64

    body = base64.b64encode((photos / "0.png").read_bytes()).decode()
    (tmp_path / "items.jsonl").write_text(json.dumps({"b64": body}) + "\n\nnonsense\n")
    for name, keep in (("list.csv", 3), ("shard.tar", 3), ("items.jsonl", 1)):
        target = tmp_path / f"{name}.out.jsonl"
        assert main([str(archive), str(tmp_path / name), "--output", str(target), "--workers", "0"]) == 0
        lines = read(target)
        check(lines[:keep], expected[:keep])
        assert ["error" in line for line in lines[keep:]] == [True] * len(lines[keep:])
    assert read(tmp_path / "list.csv.out.jsonl")[3]["error"]["message"] == "column 'image' is empty"
    assert read(tmp_path / "shard.tar.out.jsonl")[0]["input"] == "shard.tar/a/0.png"


def test_parquet(archive: Path, photos: Path, expected: list[dict], tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": (photos / f"{i}.png").read_bytes(), "path": None} for i in (0, 70, 1)]
    parquet.write_table(arrow.table({"image": images, "n": [1, 2, 3]}), tmp_path / "in.parquet")
    target, summary = tmp_path / "out.parquet", tmp_path / "s.json"
    arguments = ["--workers", "0", "--summary", str(summary)]
    assert main([str(archive), str(tmp_path / "in.parquet"), "--output", str(target), *arguments]) == 0
    rows = parquet.read_table(target).to_pylist()
    assert [row["status"] for row in rows] == [200, 415, 200]
    assert json.loads(rows[2]["answer"])["prediction"]["index"] == expected[1]["prediction"]["index"]
    assert rows[2]["label"] == expected[1]["prediction"]["label"]
    told = json.loads(summary.read_text())
    assert (told["rows"], told["errors"], sum(told["disagreement"])) == (3, {"415": 1}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet", "s.json"]


def test_texts_with_several_columns_and_lengths(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer

    config = CONFIGS["bert"](num_labels=3)
    models = random_members("sequence_classification", config, 2)
    states = {name: model.state_dict() for name, model in models.items()}
    folder = write_archive(
        tmp_path / "ens", states, {"handler": "bert_handler.py", "mode": "sequence_classification"}
    )
    shutil.copy(Path(__file__).parents[3] / "handlers" / "bert_handler.py", folder)
    models["m0"].config.save_pretrained(folder / "pretrained")
    save_tokenizer(folder / "pretrained", token_types=True)
    texts = [" ".join(["great", "bad", "movie", "life"][: 1 + index % 4] * (1 + index % 7)) for index in range(300)]
    (tmp_path / "t.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    target = tmp_path / "answers.jsonl"
    page = tmp_path / "page.html"
    assert main([str(folder), str(tmp_path / "t.tsv"), "--output", str(target), "--summary", str(page)]) == 0
    ensemble = Ensemble.load(folder)
    for line, text in zip(read(target)[::50], texts[::50], strict=True):
        (answer,) = ensemble.predict([text])
        assert line["answer"]["prediction"]["label"] == answer.body["prediction"]["label"]
        got, own = line["answer"]["prediction"]["probability"], answer.body["prediction"]["probability"]
        assert got == pytest.approx(own, abs=1e-5)
    assert page.read_text().count("<rect") >= 3
    (tmp_path / "q.csv").write_text("a,b\n1,2\n")
    with pytest.raises(Exception, match="--column: name the one to be answered: a, b"):
        list(open_rows(tmp_path / "q.csv", True))
    assert [row.item for row in open_rows(tmp_path / "q.csv", True, ("a", "b"))] == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda folder: folder / "none", "no such file or folder"),
        (lambda folder: folder, "holds no file that ends in"),
        (lambda folder: _write(folder / "a.csv", "image\n"), "holds no row"),
        (lambda folder: _write(folder / "a.csv", "x,y\n1,2\n"), "name the one to be answered: x, y"),
        (lambda folder: _write(folder / "a.xyz", ""), "expected a folder or a file that ends in .csv"),
        (lambda folder: _write(folder / "a.tar", "x"), "can't be read as tar"),
        (lambda folder: _write(folder / "a.csv", b"image\n\xff\xfe\n"), "can't be read as UTF-8 .csv"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arrange: object, message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source = arrange(folder)  # type: ignore[operator]
    (tmp_path / "out").mkdir()
    assert main([str(archive), str(source), "--output", str(tmp_path / "out" / "a.jsonl")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_wrong_usage(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--output", "a.txt"], "ends in .jsonl or .parquet"),
        (["--output", "a.jsonl", "--batch-size", "0"], "--batch-size: expected 1 or more"),
        (["--output", "a.jsonl", "--workers", "-1"], "--workers: expected 0 or more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["ens.mar", "photos", *arguments])
        assert message in capsys.readouterr().err
    target = tmp_path / "a.jsonl"
    assert main([str(archive), str(Path(__file__).parent), "--output", str(target), "--subset", "m9"]) == 1
    assert "unknown member 'm9'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        command(["predict", "--help"])
    assert "goes on where it was" in capsys.readouterr().out


def test_predict_many_takes_any_iterable(archive: Path, photos: Path, expected: list[dict]) -> None:
    ensemble = Ensemble.load(archive)
    found = list(ensemble.predict_many((photos / f"{index}.png" for index in range(ROWS)), batch_size=8))
    assert isinstance(found[70], ItemError)
    check([{"answer": a.body} if not isinstance(a, ItemError) else {"error": {"code": 415}} for a in found], expected)
    with pytest.raises(ValueError, match="iterate over anew"):
        next(ensemble.predict_many(iter([torch.rand(1, 28, 28)]), workers=1))
    one = ensemble.predict_many([photos / "0.png"] * 70, workers=2, detail=True, subset=["m1"])
    assert next(one).body["ensemble"]["subset"] == ["m1"]


def test_memory_stays_and_reading_is_lazy(archive: Path) -> None:
    ensemble, taken = Ensemble.load(archive), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield torch.zeros(1, 28, 28)

    answers = ensemble.predict_many(endless(), batch_size=64)
    for _ in range(100):
        next(answers)
    assert taken <= 3 * many.WINDOW[False]


def test_errors_come_over_from_other_processes(archive: Path) -> None:
    class Refusing(type(Ensemble.load(archive).task)):
        def parse(self, item):
            if item == "odd":
                raise RequestError(422, "odd one")
            if item == "broken":
                raise KeyError("secret")
            return super().parse(item)

    ensemble = Ensemble.load(archive, task=Refusing)
    rows = [Row("a", "odd"), Row("b", torch.zeros(1, 28, 28)), Row("c", "broken"), Row("d", torch.ones(1, 28, 28))]
    for workers in (0, 1):
        ((names, examples),) = list(load_windows(Windows(ensemble.task, rows), workers))
        assert names == ["a", "b", "c", "d"]
        assert (examples[0].status, str(examples[0])) == (422, "odd one")
        assert str(examples[2]) == "this item could not be read"
        assert torch.equal(examples[1] != examples[3], torch.ones(1, 28, 28, dtype=torch.bool))


def test_the_batch_that_is_fastest_is_taken(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, clock = Ensemble.load(archive), [0.0]
    cost = {8: 8.0, 16: 12.0, 32: 16.0, 64: 64.0}  # 1, 0.75, 0.5 and 1 per row

    def answer(_ensemble: object, part: list, _options: object, size: int) -> None:
        clock[0] += cost[size] / 1000

    monkeypatch.setattr(many, "answer_window", answer)
    monkeypatch.setattr(many.time, "perf_counter", lambda: clock[0])
    examples = [torch.zeros(1, 28, 28)] * 64
    assert find_batch(ensemble, examples, Options()) == 32
    assert find_batch(ensemble, examples[:10], Options()) == 8
    assert find_batch(ensemble, [], Options()) == 8


def test_a_batch_that_fails_is_answered_one_by_one(archive: Path) -> None:
    ensemble = Ensemble.load(archive)
    plain = ensemble.answer
    failed = []

    def answer(examples, options):
        if len(examples) > 1 or bool((examples[0] == 7).all()):
            raise RuntimeError("no")
        return plain(examples, options)

    ensemble.answer = answer  # type: ignore[method-assign]
    examples = [torch.zeros(1, 28, 28), torch.full((1, 28, 28), 7.0)]
    found = many.answer_each(ensemble, examples, [Options()] * 2, lambda: failed.append(1))
    assert found[0].body["prediction"]
    assert str(found[1]) == "the model failed on this input"
    assert failed == [1]
