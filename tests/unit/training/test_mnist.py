"""Training data, training and evaluation of MNIST members, on tiny data and against torchvision and numpy."""

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

import training.evaluate
import training.mnist
import training.mnist_data
from training.runs import evaluate, mnist, mnist_data
from training.runs.mnist_data import DataError, Digits, load_digits, read_idx, write_idx
from vmap_ensemble.models.mnist import MnistNet


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """MNIST's first sample images: 96 to train on and 32 to test on."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for (split, names), count in zip(mnist_data.FILES.items(), (96, 32), strict=True):
        digits = load_digits(mnist_data.SAMPLE_DIR, split)
        write_idx(folder / f"{names[0]}.gz", digits.images[:count])
        write_idx(folder / f"{names[1]}.gz", digits.labels[:count].byte())
    return folder


# --- data ---------------------------------------------------------------------------------------------------


def test_sample_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for names in mnist_data.FILES.values():
        for name in names:
            packed = (mnist_data.SAMPLE_DIR / f"{name}.gz").read_bytes()
            (raw / name).write_bytes(gzip.decompress(packed))
    for split in ("train", "test"):
        theirs = MNIST(str(tmp_path), train=split == "train", download=False)
        for folder in (mnist_data.SAMPLE_DIR, tmp_path):  # ours gzipped, and torchvision's folder unpacked
            ours = load_digits(folder, split)
            assert torch.equal(ours.images, theirs.data)
            assert torch.equal(ours.labels, theirs.targets)


def test_sample_has_every_digit_and_fits_the_repository() -> None:
    train, test = load_digits(mnist_data.SAMPLE_DIR, "train"), load_digits(mnist_data.SAMPLE_DIR, "test")
    assert (len(train), len(test)) == (6000, 2000)
    assert train.labels.bincount().min() > 500
    assert test.labels.bincount().min() > 150
    files = [file for file in (mnist_data.REPOSITORY / "data").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3e6


def test_digit_pictures_are_test_images_of_their_label() -> None:
    test = load_digits(mnist_data.SAMPLE_DIR, "test")
    for digit in range(10):
        picture = torch.from_numpy(np.array(Image.open(mnist_data.REPOSITORY / f"data/digits/{digit}.png")))
        matches = (test.images == picture).all(2).all(1)
        assert test.labels[matches].tolist() == [digit]


def test_normalise_equals_torchvision_transforms() -> None:
    images = load_digits(mnist_data.SAMPLE_DIR, "test").images[:5]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    expected = torch.stack([theirs(image.numpy()) for image in images])
    torch.testing.assert_close(mnist_data.normalise(images), expected)


def test_written_idx_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("a.gz", "b.gz"):
        write_idx(tmp_path / name, values)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert torch.equal(read_idx(tmp_path / "a.gz", 3), values)


HEADER = struct.pack(">II", 0x801, 3)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x00\x00", "expected a header of 8 bytes, got a file of 2"),
        (struct.pack(">II", 0x803, 3) + b"abc", "expected the magic number 2049 .* got 2051"),
        (HEADER + b"ab", r"its header states \(3,\), 3 bytes, got 2; the file is truncated"),
        (HEADER + b"abcd", r"3 bytes, got 4"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "labels").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "labels", ndim=1)


@pytest.mark.parametrize("raw", [gzip.compress(HEADER + b"abc")[:-9], b"no gzip at all"], ids=["cut", "none"])
def test_damaged_gzip_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "labels.gz").write_bytes(raw)
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_idx(tmp_path / "labels.gz", ndim=1)


def test_missing_file_names_the_folder_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: expected train-images-idx3-ubyte.gz .* --download"):
        load_digits(tmp_path, "train")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((3, 27, 28), [1, 2, 3], "expected images of 28x28, got 27x28"),
        ((3, 28, 28), [1, 2], "holds 3 images, but .* 2 labels"),
        ((3, 28, 28), [1, 2, 10], "expected labels 0 to 9, got 10"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, images, labels, message: str) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", torch.zeros(images, dtype=torch.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.tensor(labels, dtype=torch.uint8))
    with pytest.raises(DataError, match=message):
        load_digits(tmp_path, "train")


def test_make_sample_takes_every_tenth_and_every_fifth(tiny_data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    full = load_digits(tiny_data, "train")
    many = torch.arange(10, dtype=torch.uint8).repeat_interleave(5)  # every fifth: each digit once
    write_idx(tiny_data / "t10k-images-idx3-ubyte.gz", torch.zeros((50, 28, 28), dtype=torch.uint8))
    write_idx(tiny_data / "t10k-labels-idx1-ubyte.gz", many)
    assert training.mnist_data.main(["--make-sample", str(tiny_data), str(target)]) == 0
    sample = load_digits(target / "mnist", "train")
    assert torch.equal(sample.images, full.images[::10])
    assert torch.equal(sample.labels, full.labels[::10])
    assert load_digits(target / "mnist", "test").labels.tolist() == list(range(10))
    assert len(list((target / "digits").glob("*.png"))) == 10


def test_default_data_is_the_download_or_else_the_sample(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mnist_data, "DOWNLOAD_DIR", tmp_path)
    assert mnist_data.resolve_folder(None, download=False) == mnist_data.SAMPLE_DIR
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    assert mnist_data.resolve_folder(None, download=False) == tmp_path
    assert mnist_data.resolve_folder(Path("own"), download=False) == Path("own")


def test_download_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    assert training.mnist.main(["--download", "--data-dir", str(tmp_path)]) == 1
    assert "could not be downloaded" in capsys.readouterr().err


# --- training -----------------------------------------------------------------------------------------------


def test_network_has_the_names_and_shapes_of_the_pytorch_example() -> None:
    shapes = {key: tuple(value.shape) for key, value in MnistNet().state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3), "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3), "conv2.bias": (64,),
        "fc1.weight": (128, 9216), "fc1.bias": (128,), "fc2.weight": (10, 128), "fc2.bias": (10,),
    }  # fmt: skip


def test_command_writes_one_loadable_file_a_seed(tiny_data: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "members"
    arguments = ["--num-models", "2", "--epochs", "1", "--seed", "7", "--threads", "1"]
    arguments += ["--data-dir", str(tiny_data), "--output-dir", str(output)]
    assert training.mnist.main(arguments) == 0
    assert not output.exists()
    assert "nothing was written" in capsys.readouterr().out
    assert training.mnist.main([*arguments, "--save-model"]) == 0
    assert sorted(file.name for file in output.iterdir()) == ["mnist-seed7.pt", "mnist-seed8.pt"]
    assert f"data: 96 training and 32 test images of {tiny_data}\n" in capsys.readouterr().out
    states = [torch.load(file, weights_only=True) for file in sorted(output.iterdir())]
    for state in states:
        MnistNet().load_state_dict(state)
        assert all(value.is_contiguous() for value in state.values())
    assert not torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])


def test_a_seed_gives_the_same_member_alone_or_among_others(tiny_data: Path, tmp_path: Path) -> None:
    arguments = ["--save-model", "--epochs", "1", "--threads", "1", "--data-dir", str(tiny_data)]
    training.mnist.main([*arguments, "--seed", "1", "--num-models", "2", "--output-dir", str(tmp_path / "two")])
    training.mnist.main([*arguments, "--seed", "2", "--num-models", "1", "--output-dir", str(tmp_path / "one")])
    first, second = (torch.load(tmp_path / folder / "mnist-seed2.pt", weights_only=True) for folder in ("two", "one"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_image_is_seen_once_an_epoch_and_the_loss_falls(tiny_data: Path) -> None:
    digits, losses, seen = load_digits(tiny_data, "train"), [], []
    settings = mnist.TrainingSettings(epochs=8, batch_size=40)
    model = mnist.train_member(digits, 1, settings, lambda n, loss: (seen.append(n), losses.append(loss)))
    assert seen == [40, 40, 16] * 8
    assert losses[0] > 2.0  # about ln 10: it knew nothing
    assert sum(losses[-3:]) / 3 < 0.8
    assert not model.training
    assert mnist.measure_accuracy(model, digits) > 0.8


def test_accuracy_equals_a_plain_loop(tiny_data: Path) -> None:
    test = load_digits(tiny_data, "test")
    model = MnistNet().eval()
    right = 0
    with torch.no_grad():
        for image, label in DataLoader(list(zip(mnist_data.normalise(test.images), test.labels, strict=True))):
            right += int(model(image).argmax() == label)
    assert mnist.measure_accuracy(model, test) == pytest.approx(right / 32)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def fail(*_arguments) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        mnist.save_state_dict(MnistNet(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.pt", b"old")]


@pytest.mark.parametrize("arguments", [["--num-models", "0"], ["--lr", "-1"], ["--epochs", "0"]])
def test_senseless_counts_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        training.mnist.main(arguments)
    assert "expected a number above 0" in capsys.readouterr().err


def test_missing_data_is_one_line_and_exit_1(tmp_path: Path, capsys) -> None:
    assert training.mnist.main(["--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: expected train-images")


# --- evaluation ---------------------------------------------------------------------------------------------


def test_score_equals_hand_computed_values() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    score = evaluate.score("m", probabilities.log(), torch.tensor([0, 1, 1, 0]))
    assert score.accuracy == pytest.approx(0.75)
    assert score.nll == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean(), rel=1e-6)
    assert score.brier == pytest.approx(np.mean([0.02, 0.72, 0.08, 0.18]), rel=1e-5)
    # each image falls into a bin of its own: |confidence - right|
    assert score.ece == pytest.approx(np.mean([0.1, 0.6, 0.2, 0.3]), rel=1e-5)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_combine_averages_probabilities(members: int) -> None:
    outputs = torch.randn(members, 4, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    torch.testing.assert_close(evaluate.combine(outputs).probabilities, outputs.exp().mean(0))


def test_disagreement_of_certain_opposites_is_ln_2() -> None:
    # two members: sure of different labels for image 0, of the same for image 1
    outputs = torch.tensor([[[0.0, -math.inf], [0.0, -math.inf]], [[-math.inf, 0.0], [0.0, -math.inf]]])
    found = evaluate.measure_disagreement(evaluate.combine(outputs), torch.tensor([1, 0]))
    assert found.mutual_information_wrong == pytest.approx(math.log(2))
    assert found.mutual_information_right == pytest.approx(0, abs=1e-6)
    assert found.mutual_information == pytest.approx(math.log(2) / 2)
    assert found.agreement == pytest.approx(0.75)


def test_evaluate_command_prints_and_writes_the_same_figures(tiny_data: Path, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    for name in ("a", "b"):
        mnist.save_state_dict(MnistNet(), tmp_path / "members" / f"{name}.pt")
    arguments = ["--members", str(tmp_path / "members"), "--data-dir", str(tiny_data)]
    file = tmp_path / "figures.json"
    assert training.evaluate.main([*arguments, "--markdown", "--json", str(file)]) == 0
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert [score["name"] for score in figures["scores"]] == ["a", "b", "ensemble"]
    assert figures["images"] == 32
    for score in figures["scores"]:
        assert f"| {score['name']} | {score['accuracy']:.2%} | {score['nll']:.4f} |" in printed
    assert training.evaluate.main(arguments) == 0
    assert f"{figures['scores'][-1]['accuracy']:.2%}" in capsys.readouterr().out


def test_evaluate_without_members_says_how_to_train_some(tmp_path: Path, capsys) -> None:
    assert training.evaluate.main(["--members", str(tmp_path)]) == 1
    assert "python -m training.mnist --save-model" in capsys.readouterr().err


def test_empty_digits_have_no_length() -> None:
    assert len(Digits(torch.zeros(0, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))) == 0
