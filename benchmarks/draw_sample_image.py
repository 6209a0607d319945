"""Nothing -> data/images/sample.jpg: a drawn landscape, for trials where no photo may be carried along.

python -m benchmarks.draw_sample_image
"""

import argparse
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.options import SAMPLE_IMAGE

WIDTH, HEIGHT = 640, 480


def draw_landscape(seed: int = 0) -> Image.Image:
    """Draw sky, sun, two ridges and a lake, with seeded grain as a camera would add."""
    generator = np.random.default_rng(seed)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    sky = np.broadcast_to((1 - rows) * [70, 120, 200] + rows * [250, 215, 170], (HEIGHT, WIDTH, 3))
    image = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((440, 70, 520, 150), fill=(255, 240, 190))
    for base, height, colour in ((300, 60, (95, 110, 140)), (340, 45, (50, 80, 60))):
        steps = generator.normal(size=WIDTH).cumsum()
        ridge = base - height * (steps - steps.min()) / np.ptp(steps)
        outline = [(0, HEIGHT), *enumerate(ridge.tolist()), (WIDTH, HEIGHT)]
        pen.polygon(outline, fill=colour)
    pen.rectangle((0, 380, WIDTH, HEIGHT), fill=(60, 110, 150))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
    grain = generator.normal(scale=4, size=(HEIGHT, WIDTH, 1))
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


def main(arguments: list[str] | None = None) -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.draw_sample_image", description="Draw data/images/sample.jpg."
    )
    parser.parse_args(arguments)
    SAMPLE_IMAGE.parent.mkdir(parents=True, exist_ok=True)
    draw_landscape().save(SAMPLE_IMAGE, quality=80)
    print(SAMPLE_IMAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
