"""One member before it is packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One member before it is packed.

    Attributes:
        name: Of the member.
        path: The file of its weights.
        shown: What errors and the manifest call it; never an absolute path.
        folder: The directory that save_pretrained wrote, where the member is one.
        weights: The entry of torchvision's weights, such as `ResNet50_Weights.IMAGENET1K_V2`, where it is one.
    """

    name: str
    path: Path
    shown: str
    folder: Path | None = None
    weights: str | None = None
