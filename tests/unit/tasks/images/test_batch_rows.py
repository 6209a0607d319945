"""Rows of a batch against torchvision's transforms and torch.stack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from resnet_handler import ResNetHandler
from vmap_ensemble.tasks.images.batch_rows import PixelNormaliser, allocate_rows, copy_rows, join_rows

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise_image(height=20, width=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_bit_for_bit_torchvisions(channels, channels_last):
    mean, deviation = MEAN[:channels], DEVIATION[:channels]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, deviation)])
    normaliser = PixelNormaliser(mean, deviation)
    batch = allocate_rows(2, (channels, 20, 30), channels_last)
    images = [noise_image(channels=channels, seed=seed) for seed in range(2)]
    for image, row in zip(images, batch, strict=True):
        normaliser.write(image, row)
    assert torch.equal(batch, torch.stack([theirs(image) for image in images]))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [True, False])
def test_neighbouring_rows_are_joined_without_a_copy(channels_last):
    batch = allocate_rows(4, (3, 5, 6), channels_last)
    batch.copy_(torch.randn(4, 3, 5, 6))
    rows = batch.unbind()
    for start, stop in ((0, 4), (1, 3), (2, 3)):
        joined = join_rows(rows[start:stop])
        assert torch.equal(joined, batch[start:stop])
        assert joined.data_ptr() == rows[start].data_ptr()
        assert joined.stride() == batch.stride()


def test_rows_that_lie_apart_are_copied():
    rows = allocate_rows(4, (3, 5, 6), channels_last=True).normal_().unbind()
    for apart in ([rows[0], rows[2]], [rows[1], rows[0]], [torch.randn(3, 5, 6) for _ in range(2)]):
        assert join_rows(apart) is None
        assert torch.equal(copy_rows(apart, channels_last=True), torch.stack(apart))


@pytest.fixture
def resnet(make_archive, make_context, make_model):
    def make(handler=ResNetHandler, settings=None):
        def build():
            return torchvision.models.resnet18(num_classes=3)

        states = {f"m{i}": make_model(build, i).state_dict() for i in range(2)}
        block = {"num_classes": 3, "execution": "prepared", "input_shape": [3, 48, 64], **(settings or {})}
        served = handler()
        served.initialize(make_context(make_archive(states, block), config={"handler": {"threads": 2}}))
        return served

    return make


def test_bad_images_leave_their_rows_out_of_one_batch(resnet, ask, image_file):
    handler = resnet()
    photos = [image_file(noise_image(60 + 10 * seed, 90, seed=seed)) for seed in range(4)]
    seen, run = [], handler.ensemble.run
    handler.ensemble.run = lambda batch: seen.append(batch) or run(batch)
    good = [{"body": photo} for photo in photos]
    bad = {"body": b"no image"}
    assert handler.channels_last
    for rows in (good, [*good, bad], [bad, *good[:2], bad, bad, *good[2:]]):
        replies = ask(handler, rows)
        batch = seen.pop()
        assert [status for status, _ in replies] == [415 if row is bad else 200 for row in rows]
        assert torch.equal(batch, torch.stack([handler.parse(photo) for photo in photos]))
        assert batch.is_contiguous(memory_format=torch.channels_last)
        answers = [body for status, body in replies if status == 200]
        for answer, row in zip(answers, good, strict=True):
            alone = ask(handler, [row])[0][1]["prediction"]
            assert answer["prediction"]["index"] == alone["index"]
            assert answer["prediction"]["probability"] == pytest.approx(alone["probability"], rel=1e-4)
        seen.clear()


def test_parse_equals_the_weights_own_transform(resnet, image_file):
    image = noise_image(300, 400)
    handler = resnet(settings={"input_shape": None, "execution": "eager"})
    assert torch.equal(handler.parse(image_file(image)), ResNet18_Weights.DEFAULT.transforms()(image))


def test_large_photos_are_decoded_scaled_where_the_settings_say_so(resnet, image_file):
    y, x = np.mgrid[0:400, 0:400] * 0.6
    photo = image_file(np.stack([x, y, 255 - x], -1).astype(np.uint8), "JPEG")
    settings = {"execution": "eager"}
    whole = resnet(settings=settings).parse(photo)
    scaled = resnet(settings={**settings, "jpeg_scaled_decoding": True}).parse(photo)
    assert 0 < (whole - scaled).abs().max() < 4 / 255 / min(DEVIATION)


class Inverted(ResNetHandler):
    """A parse of one's own."""

    def parse(self, item):
        return -super().parse(item)


def test_a_parse_of_ones_own_is_used(resnet, image_file):
    photo = image_file(noise_image(60, 80))
    handler = resnet(Inverted, {"execution": "eager"})
    (own,) = handler.parse_items([photo])
    assert torch.equal(own, -ResNetHandler.parse(handler, photo))
    assert torch.equal(handler.collate([own, own])[0], torch.stack([own, own]))
