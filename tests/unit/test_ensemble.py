"""The library: an archive or state dicts in memory, asked without a server, against the members' own forwards."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vmap_ensemble import Ensemble, ItemError, Task
from vmap_ensemble.errors import LoadError, MemberError, SettingsError, UnfitItem, UnknownKind
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.serving.batch import Incoming, answer_batch
from vmap_ensemble.tasks.images.mnist import MnistTask


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).eval()


def states(count: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    return {f"m{seed}": small(seed).state_dict() for seed in range(count)}


@pytest.fixture
def mnist(make_archive, make_model):
    """An unpacked archive and its plain members."""
    models = {f"m{seed}": make_model(MnistNet, seed) for seed in range(3)}
    folder = make_archive(
        {name: model.state_dict() for name, model in models.items()}, {"handler": "mnist_handler.py"}
    )
    return folder, models


def pack(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("example", [None, torch.randn(2, 3)])
def test_members_in_memory_equal_their_own_forwards(count, example):
    model, settings = small(9), {"execution_budget_s": 0.2}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ensemble = Ensemble.of(model, states(count), example=example, settings=settings)
    x = torch.randn(6, 3)
    outputs = ensemble.outputs(x)
    assert outputs.shape == (count, 6, 4)
    for seed in range(count):
        torch.testing.assert_close(outputs[seed], small(seed)(x), rtol=1e-5, atol=1e-6)
    expected = torch.stack([small(seed)(x).softmax(-1) for seed in range(count)]).mean(0)
    torch.testing.assert_close(ensemble.probabilities(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ensemble(x), outputs)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())  # it took a copy
    assert ensemble.proof is not None or example is None


def test_tensors_are_answered_as_a_server_answers_them():
    ensemble = Ensemble.of(small(0), states())
    x = torch.randn(2, 3)
    answers = ensemble.predict(list(x), top_k=2, detail=True, subset=["m2", "m0"])
    expected = torch.stack([small(seed)(x).softmax(-1) for seed in (0, 2)]).mean(0)
    for row, answer in zip(expected, answers, strict=True):
        assert answer.body["prediction"]["index"] == int(row.argmax())
        assert answer.body["prediction"]["probability"] == pytest.approx(row.max().item(), rel=1e-5)
        assert [member["name"] for member in answer.body["members"]] == ["m0", "m2"]
        assert json.loads(answer.to_json()) == answer.body
    assert ensemble.predict([]) == []


def test_weights_and_aggregation_are_settings_of_members_in_memory_too():
    settings = {"weights": {"m0": 1.0, "m1": 0.0, "m2": 3.0}, "aggregation": "mean_logit", "temperature": 2.0}
    ensemble = Ensemble.of(small(0), states(), settings=settings)
    x = torch.randn(5, 3)
    logits = sum(w * small(seed)(x).div(2).log_softmax(-1) for seed, w in ((0, 0.25), (2, 0.75)))
    torch.testing.assert_close(ensemble.probabilities(x), logits.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_answers_paths_pictures_tensors_and_bytes_alike(mnist, tmp_path, packed):
    folder, models = mnist
    ensemble = Ensemble.load(pack(folder, tmp_path / "ens.mar") if packed else folder)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "digit.png")
    tensor = ((torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081)[None]
    with torch.inference_mode():
        expected = torch.stack([model(tensor[None]).exp() for model in models.values()]).mean(0)[0]
    items = [tmp_path / "digit.png", image, tensor, (tmp_path / "digit.png").read_bytes(), image.convert("RGB")]
    answers = ensemble.predict(items, top_k=10)
    for answer in answers:
        for entry in answer.body["top_k"]:
            assert entry["probability"] == pytest.approx(expected[entry["index"]].item(), abs=2e-6)
    torch.testing.assert_close(ensemble.probabilities(tensor[None])[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ensemble.probabilities([image])[0], expected, rtol=1e-4, atol=1e-6)


def test_the_library_gives_what_a_server_gives(mnist, digit):
    ensemble = Ensemble.load(mnist[0], execution="eager")
    files = [digit(seed) for seed in range(4)]
    replies = answer_batch(ensemble, [Incoming({"body": file}, {}) for file in files])
    answers = ensemble.predict(files)
    assert [json.loads(reply.text) for reply in replies] == [answer.body for answer in answers]
    assert {reply.status for reply in replies} == {200}


def test_overrides_win_and_are_checked(mnist):
    ensemble = Ensemble.load(mnist[0], dtype="bf16", execution="reference", device="cpu")
    assert (ensemble.settings.dtype, ensemble.execution.name) == ("bf16", "reference")
    assert ensemble.outputs(torch.zeros(1, 1, 28, 28)).dtype == torch.bfloat16
    with pytest.raises(SettingsError, match="dtype"):
        Ensemble.load(mnist[0], dtype="fp8")
    with pytest.raises(SettingsError, match="execution"):
        Ensemble.load(mnist[0], execution="fastest")


def test_the_description_tells_members_run_and_proof(mnist):
    folder, _ = mnist
    description = Ensemble.load(folder).describe()
    rows = json.loads(description.to_json())
    assert [member["name"] for member in rows["members"]] == ["m0", "m1", "m2"]
    assert rows["equivalence"]["largest_difference"] <= rows["equivalence"]["tolerance"]
    text = str(description)
    assert "3 members of mnist, fp32 on cpu" in text
    assert "run      eager: asked for" in text
    assert all(f"member   m{seed}" in text for seed in range(3))


def test_a_bad_item_is_numbered_or_returned_in_its_place(mnist, digit):
    ensemble = Ensemble.load(mnist[0])
    with pytest.raises(UnknownKind, match="item 1: "):
        ensemble.predict([digit(), b"no image", digit()])
    first, error, last = ensemble.predict([digit(), b"no image", digit()], errors="return")
    assert isinstance(error, ItemError)
    assert first.body == last.body
    with pytest.raises(UnfitItem, match="unknown member 'zz'; known: m0, m1, m2"):
        ensemble.predict([digit()], subset=["zz"])
    with pytest.raises(ValueError, match="'raise' or 'return'"):
        ensemble.predict([digit()], errors="ignore")


def test_what_does_not_fit_is_refused(tmp_path):
    other = nn.Linear(3, 4).state_dict()
    with pytest.raises(MemberError, match="b: key"):
        Ensemble.of(small(0), {"a": small(0).state_dict(), "b": other})
    with pytest.raises(SettingsError, match="unknown key 'temprature'; did you mean 'temperature'"):
        Ensemble.of(small(0), states(), settings={"temprature": 2})
    with pytest.raises(LoadError, match=r"gone\.mar: no such archive"):
        Ensemble.load(tmp_path / "gone.mar")
    (tmp_path / "text.mar").write_text("no zip")
    with pytest.raises(LoadError, match=r"text\.mar: not a whole archive"):
        Ensemble.load(tmp_path / "text.mar")
    with pytest.raises(LoadError, match=r"holds no setup_config\.json"):
        Ensemble.load(tmp_path)


def test_members_in_memory_with_a_task(digit, make_model):
    models = {f"m{seed}": make_model(MnistNet, seed) for seed in range(2)}
    given = {name: model.state_dict() for name, model in models.items()}
    ensemble = Ensemble.of(MnistNet(), given, task=MnistTask)
    (answer,) = ensemble.predict([digit(3)])
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(digit(3)))))
    x = ((pixels.float() / 255 - 0.1307) / 0.3081)[None, None]
    with torch.inference_mode():
        expected = torch.stack([model(x).exp() for model in models.values()]).mean(0)[0]
    assert answer.body["prediction"]["label"] == str(int(expected.argmax()))
    assert answer.body["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)


def test_members_that_differ_from_their_own_forwards_are_refused_at_the_first_batch(monkeypatch):
    ensemble = Ensemble.of(small(0), states())
    monkeypatch.setattr(ensemble.forward, "member", lambda index, x: small(index)(x) + 1)
    with pytest.raises(LoadError, match="differs from the member's own"):
        ensemble.outputs(torch.randn(2, 3))


class Whitened(nn.Module):
    """Batch norm that takes its statistics from the batch, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.first(x).unsqueeze(-1).expand(-1, -1, 5) * torch.arange(5))[..., -1]


def test_rows_that_depend_on_each_other_are_run_one_by_one(make_archive):
    class Whitening(Task):
        default_input_shape = (3,)

        def build_model(self):
            return Whitened().eval()

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Whitened().eval())
    folder = make_archive({f"m{seed}": model.state_dict() for seed, model in enumerate(models)})
    ensemble = Ensemble.load(folder, task=Whitening)
    assert "each example alone" in ensemble.execution.reason
    x = torch.randn(3, 3)
    expected = torch.stack([torch.cat([model(row[None]) for row in x]) for model in models])
    torch.testing.assert_close(ensemble.outputs(x), expected, rtol=1e-5, atol=1e-6)
    together = [answer.body["prediction"] for answer in ensemble.predict(list(x))]
    assert together == [ensemble.predict([row])[0].body["prediction"] for row in x]


def test_independent_rows_stay_one_batch(mnist):
    assert not Ensemble.load(mnist[0]).alone
