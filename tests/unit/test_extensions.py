"""One of each, added from outside of the package by one file: a model, a text mode, a front end.

An execution mode is added in execution/test_modes.py, a CPU kernel in execution/cpu/.
"""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from vmap_ensemble import Ensemble
from vmap_ensemble.archive.settings import Settings, parse_settings
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.architecture import ARCHITECTURES, architecture, build_architecture
from vmap_ensemble.models.text_modes import TEXT_MODES, register_text_mode
from vmap_ensemble.serving.batch import Incoming, answer_batch


@pytest.fixture
def clean_registers():
    """What a test registers is gone behind it."""
    before = dict(ARCHITECTURES), dict(TEXT_MODES)
    yield
    for register, own in zip((ARCHITECTURES, TEXT_MODES), before, strict=True):
        for name in set(register) - set(own):
            del register[name]


def test_a_model(clean_registers, make_archive):
    @architecture("two-layers")
    class TwoLayers(nn.Module):
        def __init__(self, num_classes: int = 3) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, num_classes))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    models = [TwoLayers(5).eval() for _ in range(3)]
    settings = {"architecture": "two-layers", "num_classes": 5, "input_shape": [4]}
    folder = make_archive({f"m{i}": model.state_dict() for i, model in enumerate(models)}, settings)
    ensemble = Ensemble.load(folder)
    x = torch.randn(7, 4)
    expected = torch.stack([model(x).softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(ensemble.probabilities(x), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(SettingsError, match="or one of mnist, two-layers"):
        build_architecture("three-layers")
    with pytest.raises(SettingsError, match="'mnist': expected a new name"):
        architecture("mnist")(TwoLayers)


def test_a_text_mode(clean_registers, make_archive):
    pytest.importorskip("transformers")
    from tests.unit.tasks.text.test_encoder_task import CONFIGS, random_members, save_tokenizer
    from vmap_ensemble.tasks.text.sequence_classification import SingleLabel
    from vmap_ensemble.tasks.text.settings import TextSettings

    class Loud(SingleLabel):
        """A classification in capitals."""

        def answer_batch(self, outputs, weights, options, examples):
            answers = super().answer_batch(outputs, weights, options, examples)
            for answer in answers:
                answer.body["prediction"]["label"] = answer.body["prediction"]["label"].upper()
            return answers

    theirs = ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING")
    register_text_mode("loud_classification", *theirs, Loud, is_labelled=True)
    config = CONFIGS["bert"](num_labels=2, id2label={0: "bad", 1: "good"})
    members = random_members("sequence_classification", config, 2)
    settings = {"handler": "bert_handler.py", "mode": "loud_classification", "max_length": 32}
    folder = make_archive({name: model.state_dict() for name, model in members.items()}, settings)
    config.save_pretrained(folder / "pretrained")
    save_tokenizer(folder / "pretrained", token_types=True)
    (answer,) = Ensemble.load(folder).predict(["a great movie"])
    assert answer.body["prediction"]["label"] in ("BAD", "GOOD")
    with pytest.raises(
        SettingsError, match="loud_classification, got 'loud_clasification'; did you mean 'loud_classification'"
    ):
        parse_settings({"mode": "loud_clasification"}, TextSettings, "block")
    with pytest.raises(SettingsError, match="expected a new name"):
        register_text_mode("fill_mask", *theirs, Loud)


def make_app(ensemble):
    """A front end in ten lines: one WSGI request is a batch of one."""

    def app(environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        headers = {k[5:].replace("_", "-"): v for k, v in environ.items() if k.startswith("HTTP_")}
        (reply,) = answer_batch(ensemble, [Incoming({"body": body}, headers)])
        phrase = "OK" if reply.status == 200 else "Error"
        start_response(f"{reply.status} {phrase}", [("Content-Type", "application/json")])
        return [reply.text.encode()]

    return app


def test_a_front_end():
    states = {name: nn.Linear(3, 2).state_dict() for name in "ab"}
    app = make_app(Ensemble.of(nn.Linear(3, 2), states, example=torch.zeros(1, 3), settings={"execution": "eager"}))
    seen = []

    def post(body, **headers):
        environ = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), **headers}
        (text,) = app(environ, lambda status, _: seen.append(status))
        return seen[-1], json.loads(text)

    status, answer = post(b"[1, 2, 3]", HTTP_X_ENSEMBLE_SUBSET="b")
    x = torch.tensor([1.0, 2.0, 3.0])
    expected = torch.nn.functional.linear(x, states["b"]["weight"], states["b"]["bias"]).softmax(-1)
    assert status == "200 OK"
    assert answer["prediction"]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)
    assert answer["ensemble"] == {"size": 2, "used": 1, "subset": ["b"]}
    assert post(b"[1, 2]")[0] == "422 Error"


def test_settings_know_what_is_registered():
    with pytest.raises(SettingsError, match=r"expected one of auto, eager, .* did you mean 'prepared'"):
        parse_settings({"execution": "prepare"}, Settings, "block")
