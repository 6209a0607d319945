"""Turns the name of an architecture into a module in eval mode, without spending time on random weights."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.models.transformers import build_transformers

TORCHVISION = "torchvision:"
TRANSFORMERS = "transformers:"

_RANDOM_FILLS = {
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.erfinv_.default,
    torch.ops.aten.bernoulli_.float,
    torch.ops.aten.exponential_.default,
}


class SkipRandomFills(TorchDispatchMode):
    """Leaves out random fills of parameters, whose memory is about to be replaced and is never touched.

    Everything else runs: buffers that are computed and stand in no checkpoint (position tables, masks) get
    their real values, which building on the meta device would lose.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or hand back its tensor as it is."""
        # Parameters only: initialisers that draw until all values are in range (nn.init.trunc_normal_)
        # never end when their scratch tensors aren't filled.
        if func in _RANDOM_FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def build_architecture(spec: str, num_classes: int | None = None, folder: Path | None = None) -> nn.Module:
    """Build the module that the members' weights go into.

    Args:
        spec: `torchvision:resnet18` (any torchvision classification model), `mnist`,
            `transformers:sequence_classification` (any mode; `folder`/pretrained/config.json says the rest),
            `model.py` (a file in `folder` with one nn.Module class) or `model.py:ClassName`.
        num_classes: Width of the last layer of a torchvision model; its default (1000) when None. Other
            architectures get it only if their constructor has a parameter of that name.
        folder: Where `model.py` or pretrained/ lies: the unpacked archive.

    Returns:
        The module in eval mode; its random weights are left uninitialised.

    Raises:
        SettingsError: The spec is unknown, or the file doesn't hold what it should.
    """
    build = _builder(spec, folder)
    options: dict[str, Any] = {}
    parameters = inspect.signature(build).parameters
    if num_classes is not None and (spec.startswith(TORCHVISION) or "num_classes" in parameters):
        options["num_classes"] = num_classes
    try:
        with SkipRandomFills():
            model = build(**options)
    except TypeError as error:
        raise SettingsError(f"architecture '{spec}': can't be built without arguments ({error})") from None
    # Weights come from the members, and a forward must not track gradients through them.
    return model.eval().requires_grad_(False)


def infer_num_classes(spec: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Width of the last layer, as a checkpoint says: axis 0 of the architecture's last parameter.

    Args:
        spec: As in `build_architecture`.
        shapes: Key -> shape of one member.

    Returns:
        The number of classes; None when the architecture isn't torchvision's or the key is missing.
    """
    if not spec.startswith(TORCHVISION):
        return None
    with torch.device("meta"):
        last = list(_builder(spec, None)().state_dict())[-1]
    return shapes[last][0] if shapes.get(last) else None


def _builder(spec: str, folder: Path | None) -> Callable[..., nn.Module]:
    if spec == "mnist":
        return MnistNet
    if spec.startswith(TORCHVISION):
        return _torchvision_builder(spec)
    if spec.startswith(TRANSFORMERS):
        return functools.partial(build_transformers, spec.removeprefix(TRANSFORMERS), folder)
    file, _, name = spec.partition(":")
    if file.endswith(".py"):
        return _class_in_file(file, name, folder)
    raise SettingsError(
        f"architecture '{spec}': expected 'torchvision:NAME', 'transformers:MODE', 'mnist' or 'model.py:ClassName'"
    )


def _torchvision_builder(spec: str) -> Callable[..., nn.Module]:
    import torchvision  # here, since its import takes a second that MNIST or text members needn't pay

    name = spec.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see torchvision.models.list_models()"
        raise SettingsError(f"architecture '{spec}': unknown to torchvision {torchvision.__version__}; {hint}")
    make = torchvision.models.get_model_builder(name)

    def build(**options: Any) -> nn.Module:
        # GoogLeNet and Inception would draw truncated normals in scipy, for minutes.
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return make(weights=None, **slow, **options)

    return build


def _class_in_file(file: str, name: str, folder: Path | None) -> type[nn.Module]:
    if folder is None or Path(file).name != file or not (folder / file).is_file():
        raise SettingsError(f"architecture '{file}': no such file in the root of the archive")
    module = _import_file(folder / file)
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }
    if name and name not in classes:
        raise SettingsError(f"{file}: no nn.Module class '{name}'; it defines {', '.join(classes) or 'none'}")
    if not name and len(classes) != 1:
        raise SettingsError(
            f"{file}: expected one nn.Module class, got {', '.join(classes) or 'none'}; "
            f"name the one to use as '{file}:ClassName'"
        )
    return classes[name or next(iter(classes))]


def _import_file(path: Path) -> ModuleType:
    # A name of its own: two archives' model.py must not meet in sys.modules.
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{uuid.uuid4().hex[:8]}", path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path.name}: can't be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Any error at all may come out of a user's own file.
        raise SettingsError(f"{path.name}: importing it fails ({type(error).__name__}: {error})") from error
    return module
