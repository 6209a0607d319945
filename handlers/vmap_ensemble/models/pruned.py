"""Turns a stock architecture into the narrower one that pruned members have: data says how wide each layer is.

    pruned.json     {"architecture": "torchvision:resnet18", "widths": {"conv1": [3, 32, 1], "bn1": [32], ...}}

No code comes with a pruned archive: the stock architecture is built, and layers are cut to their listed widths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from vmap_ensemble.errors import SettingsError

PRUNED_FILE, PRUNED_SUFFIX = "pruned.json", ".json"
# Kind of layer -> the attributes that its widths are, in the order of a row of `widths`.
WIDTHS: dict[type[nn.Module], tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _BatchNorm: ("num_features",),
}


@dataclass(frozen=True)
class Pruned:
    """What pruned.json says.

    Attributes:
        architecture: What is built first, as in `build_architecture`.
        widths: Name of a layer -> its widths, see WIDTHS.
    """

    architecture: str
    widths: Mapping[str, list[int]]

    def to_json(self) -> str:
        """The text of pruned.json: a line per layer."""
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(widths)}" for name, widths in self.widths.items())
        return f'{{"architecture": {json.dumps(self.architecture)}, "widths": {{\n{rows}\n}}}}\n'


def is_pruned(spec: str) -> bool:
    """Whether an architecture is a file of widths."""
    return spec.endswith(PRUNED_SUFFIX)


def read_pruned(spec: str, folder: Path | None) -> Pruned:
    """Read the file that an architecture names.

    Raises:
        SettingsError: It is missing, or says something else.
    """
    if folder is None or Path(spec).name != spec or not (folder / spec).is_file():
        raise SettingsError(f"architecture '{spec}': no such file in the root of the archive")
    try:
        told = json.loads((folder / spec).read_text(encoding="utf-8"))
        architecture, widths = told["architecture"], told["widths"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"got {type(error).__name__}: {error}"
        raise SettingsError(f"{spec}: expected {{'architecture': ..., 'widths': {{...}}}}, {told}") from None
    if not isinstance(architecture, str) or is_pruned(architecture) or not isinstance(widths, dict):
        raise SettingsError(f"{spec}: expected the name of an architecture, and widths by layer")
    return Pruned(architecture, widths)


def widths_of(model: nn.Module) -> dict[str, list[int]]:
    """Name -> widths of all layers that can be narrowed."""
    return {
        name: [int(getattr(module, attribute)) for attribute in attributes]
        for name, module in model.named_modules()
        for attributes in (_attributes(module),)
        if attributes
    }


def narrow(model: nn.Module, widths: Mapping[str, Any], where: str) -> nn.Module:
    """Cut the layers of a model to their widths, in place; which of their channels stay doesn't matter.

    Args:
        model: The stock architecture.
        widths: Name of a layer -> its widths.
        where: What errors call the file.

    Raises:
        SettingsError: There is no such layer, or a width isn't from 1 to what the layer has.
    """
    modules = dict(model.named_modules())
    for name, given in widths.items():
        module = modules.get(name)
        attributes = _attributes(module) if module is not None else ()
        if module is None or not attributes:
            raise SettingsError(f"{where}: widths: {type(model).__name__} has no layer '{name}' that can be narrowed")
        _check(f"{where}: widths of '{name}'", given, [getattr(module, attribute) for attribute in attributes])
        for attribute, width in zip(attributes, given, strict=True):
            setattr(module, attribute, width)
        for key, tensor in _own_tensors(module):
            cut = tensor[tuple(slice(size) for size in _shape(module, tensor))].clone()
            setattr(module, key, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)
    return model


def _attributes(module: nn.Module) -> tuple[str, ...]:
    return next((attributes for kind, attributes in WIDTHS.items() if isinstance(module, kind)), ())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that have an axis; a counter of batches has none."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return ((key, tensor) for key, tensor in named if tensor.dim())


def _shape(module: Any, tensor: Tensor) -> tuple[int, ...]:
    """The first axes of a tensor of a layer with its new widths; the others stay."""
    if isinstance(module, _BatchNorm):
        return (module.num_features,)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)[: tensor.dim()]
    if tensor.dim() == 1:
        return (module.out_channels,)
    if module.transposed:
        return (module.in_channels, module.out_channels // module.groups)
    return (module.out_channels, module.in_channels // module.groups)


def _check(where: str, given: Any, most: list[int]) -> None:
    if (
        not isinstance(given, list)
        or len(given) != len(most)
        or not all(type(width) is int and 1 <= width <= limit for width, limit in zip(given, most, strict=True))
    ):
        raise SettingsError(f"{where}: expected {len(most)} whole numbers from 1 to {most}, got {given!r}")
