"""The torchvision handler against torchvision's own model, transform and categories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import ResNet18_Weights

from resnet_handler import ResNetHandler
from vmap_ensemble.errors import SettingsError


def test_answer_equals_torchvision(make_archive, make_context, make_model, ask, image_file):
    def build():
        return torchvision.models.resnet18(weights=None)

    models = {f"m{i}": make_model(build, i) for i in range(2)}
    handler = ResNetHandler()
    handler.initialize(make_context(make_archive({k: m.state_dict() for k, m in models.items()})))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    long = image_file(Image.new("L", (1, 100_000)))
    replies = ask(handler, [{"body": image_file(image)}, {"body": long}, {"body": image_file([[9]])}])
    x = ResNet18_Weights.DEFAULT.transforms()(image)[None]
    with torch.inference_mode():
        expected = torch.stack([m(x).softmax(-1) for m in models.values()]).mean(0)[0]
    assert [status for status, _ in replies] == [200, 413, 200]
    best = replies[0][1]["prediction"]
    assert best["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    assert best["label"] == ResNet18_Weights.DEFAULT.meta["categories"][int(expected.argmax())]


def test_unknown_transforms_are_refused(make_archive, make_context, make_model):
    state = make_model(lambda: torchvision.models.resnet18(num_classes=3), 0).state_dict()
    folder = make_archive({"a": state}, {"transforms": "Nothing.V1", "num_classes": 3})
    with pytest.raises(SettingsError, match=r"transforms: expected .* got 'Nothing\.V1'"):
        ResNetHandler().initialize(make_context(folder))


def test_images_are_brought_to_the_settings_input_shape(make_archive, make_context, make_model, ask, image_file):
    state = make_model(lambda: torchvision.models.resnet18(num_classes=3), 0).state_dict()
    folder = make_archive({"a": state}, {"input_shape": [3, 48, 64], "num_classes": 3})
    handler = ResNetHandler()
    handler.initialize(make_context(folder))
    photo = image_file(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    replies = ask(handler, [{"body": photo}, {"body": np.zeros((3, 48, 64)).tolist()}])
    assert handler.parse(photo).shape == (3, 48, 64)
    assert [status for status, _ in replies] == [200, 200]
