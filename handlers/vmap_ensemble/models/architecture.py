"""Turns the name of an architecture into a module in eval mode, without spending time on random weights."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmap_ensemble.errors import SettingsError
from vmap_ensemble.models.mnist import MnistNet
from vmap_ensemble.models.pruned import is_pruned, narrow, read_pruned
from vmap_ensemble.models.transformers import build_transformers

TORCHVISION = "torchvision:"
TRANSFORMERS = "transformers:"
# What torchvision's own weights of GoogLeNet and Inception are loaded with, and a checkpoint doesn't tell.
TRANSFORM_INPUT = "transform_input"
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
# Auxiliary heads of these two, which evaluation never computes.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# torchvision/models/densenet.py, _load_state_dict: the published files say norm.1 where the network says norm1.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")

_RANDOM_FILLS = {
    torch.ops.aten.uniform_.default,
    torch.ops.aten.normal_.default,
    torch.ops.aten.erfinv_.default,
    torch.ops.aten.bernoulli_.float,
    torch.ops.aten.exponential_.default,
}


# Name -> what builds the module, without arguments or with `num_classes`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mnist": MnistNet}

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def architecture(name: str) -> Callable[[Builder], Builder]:
    """Register a class or function under a name that the setting `architecture` may say.

    Raises:
        SettingsError: There is one of this name.
    """

    def register(build: Builder) -> Builder:
        if name in ARCHITECTURES:
            raise SettingsError(f"architecture '{name}': expected a new name; known: {', '.join(ARCHITECTURES)}")
        ARCHITECTURES[name] = build
        return build

    return register


class SkipRandomFills(TorchDispatchMode):
    """Leaves out random fills of parameters, whose memory is about to be replaced and is never touched.

    Everything else runs: buffers that are computed and stand in no checkpoint (position tables, masks) get
    their real values, which building on the meta device would lose.
    """

    def __init__(self) -> None:
        super().__init__()
        # Whether anything but a parameter was drawn.
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, or hand back its tensor as it is."""
        # Parameters only: initialisers that draw until all values are in range (nn.init.trunc_normal_)
        # never end when their scratch tensors aren't filled.
        if func in _RANDOM_FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def build_architecture(spec: str, num_classes: int | None = None, folder: Path | None = None) -> nn.Module:
    """Build the module that the members' weights go into.

    Args:
        spec: `torchvision:resnet18` (any torchvision classification model), `mnist`,
            `torchvision:googlenet:transform_input` for members made from torchvision's weights (and inception_v3),
            `transformers:sequence_classification` (any mode; `folder`/pretrained/config.json says the rest),
            `model.py` (a file in `folder` with one nn.Module class) or `model.py:ClassName`, `pruned.json` (a file
            there that says which of these, and how narrow its layers are).
        num_classes: Width of the last layer of a torchvision model; its default (1000) when None. Other
            architectures get it only if their constructor has a parameter of that name.
        folder: Where `model.py` or pretrained/ lies: the unpacked archive.

    Returns:
        The module in eval mode; its random weights are left uninitialised.

    Raises:
        SettingsError: The spec is unknown, or the file doesn't hold what it should.

    Note:
        A class of one's own that draws or holds more than its state dict is built once more without leaving fills
        out: a seed that it sets gives the same numbers only if everything is drawn. GoogLeNet and Inception come
        without the auxiliary heads, which evaluation never computes.
    """
    if is_pruned(spec):
        pruned = read_pruned(spec, folder)
        return narrow(build_architecture(pruned.architecture, num_classes, folder), pruned.widths, spec)
    build = _builder(spec, folder)
    options: dict[str, Any] = {}
    parameters = inspect.signature(build).parameters
    if num_classes is not None and (spec.startswith(TORCHVISION) or "num_classes" in parameters):
        options["num_classes"] = num_classes
    skip = SkipRandomFills()
    with skip:
        model = _construct(spec, build, options)
    if is_own_class(spec) and (skip.drew or _has_more_than_weights(model)):
        model = _construct(spec, build, options)
    # Weights come from the members, and a forward must not track gradients through them.
    return model.eval().requires_grad_(False)


def _construct(spec: str, build: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    try:
        return build(**options)
    except TypeError as error:
        raise SettingsError(f"architecture '{spec}': can't be built without arguments ({error})") from None


def _has_more_than_weights(model: nn.Module) -> bool:
    """Whether tensors lie beside the state dict, which may follow from random parameters."""
    return any(
        module._non_persistent_buffers_set or any(isinstance(value, Tensor) for value in vars(module).values())
        for module in model.modules()
    )


def build_plainly(spec: str, num_classes: int | None, folder: Path | None) -> nn.Module:
    """As `build_architecture`, everything drawn: a network to be trained, or compared with another construction."""
    if is_pruned(spec):
        pruned = read_pruned(spec, folder)
        return narrow(build_plainly(pruned.architecture, num_classes, folder), pruned.widths, spec)
    build = _builder(spec, folder)
    takes = spec.startswith(TORCHVISION) or "num_classes" in inspect.signature(build).parameters
    return _construct(spec, build, {"num_classes": num_classes} if takes and num_classes is not None else {})


def is_own_class(spec: str) -> bool:
    """Whether a spec names a class in a file of the user's."""
    return spec.partition(":")[0].endswith(".py")


def torchvision_name(spec: str) -> str:
    """`torchvision:inception_v3:transform_input` -> `inception_v3`."""
    return spec.removeprefix(TORCHVISION).partition(":")[0]


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
    last = _last_key(spec)
    return shapes[last][0] if shapes.get(last) else None


@functools.cache
def _last_key(spec: str) -> str:
    # Not on the meta device, where RegNet computes the widths of its stages.
    return list(build_architecture(spec).state_dict())[-1]


def current_key(spec: str, key: str) -> str | None:
    """What torchvision calls a key of an older checkpoint today; None for an auxiliary head, which isn't built."""
    if not spec.startswith(TORCHVISION):
        return key
    name = torchvision_name(spec)
    if name in WITH_AUXILIARY_HEADS and key.startswith(AUXILIARY):
        return None
    return _OLD_DENSENET.sub(r"\1\2.", key) if name.startswith("densenet") else key


def _builder(spec: str, folder: Path | None) -> Callable[..., nn.Module]:
    if spec in ARCHITECTURES:
        return ARCHITECTURES[spec]
    if spec.startswith(TORCHVISION):
        return _torchvision_builder(spec)
    if spec.startswith(TRANSFORMERS):
        return functools.partial(build_transformers, spec.removeprefix(TRANSFORMERS), folder)
    file, _, name = spec.partition(":")
    if file.endswith(".py"):
        return _class_in_file(file, name, folder)
    raise SettingsError(
        f"architecture '{spec}': expected 'torchvision:NAME', 'transformers:MODE', 'model.py:ClassName' or one of "
        f"{', '.join(ARCHITECTURES)}"
    )


def _torchvision_builder(spec: str) -> Callable[..., nn.Module]:
    import torchvision  # here, since its import takes a second that MNIST or text members needn't pay

    name, _, option = spec.removeprefix(TORCHVISION).partition(":")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see torchvision.models.list_models()"
        raise SettingsError(f"architecture '{spec}': unknown to torchvision {torchvision.__version__}; {hint}")
    if option and (option != TRANSFORM_INPUT or name not in WITH_AUXILIARY_HEADS):
        raise SettingsError(
            f"architecture '{spec}': expected nothing after '{name}'; ':{TRANSFORM_INPUT}' goes with "
            f"{' and '.join(WITH_AUXILIARY_HEADS)} alone"
        )
    make = torchvision.models.get_model_builder(name)

    def build(**options: Any) -> nn.Module:
        fixed: dict[str, Any] = {}
        if name in WITH_AUXILIARY_HEADS:
            # They would draw truncated normals in scipy, for minutes.
            fixed = {"init_weights": False, "aux_logits": False, TRANSFORM_INPUT: bool(option)}
        return make(weights=None, **fixed, **options)

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
    # A file of helpers beside it is found while it is imported, as beside a handler.
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Any error at all may come out of a user's own file.
        raise SettingsError(f"{path.name}: importing it fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
