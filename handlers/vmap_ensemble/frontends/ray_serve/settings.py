"""Turns the `args` of a Ray Serve application into checked settings: which archives, in batches of which size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vmap_ensemble.archive.settings import NotNegative, PositiveInt, parse_settings
from vmap_ensemble.errors import SettingsError
from vmap_ensemble.frontends.limits import MOST_BYTES

# As TorchServe's names; one slash parts a name from its version, so that /predictions/ens/2.0 is asked as there.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How one archive is served.

    Attributes:
        archive: A .mar, or the folder that one was unpacked into; where each replica finds it.
        batch_size: Requests that share one forward, at most.
        batch_wait_s: Seconds that a request waits for others while no forward is run.
        settings: Instead of the archive's own, as in setup_config.json; `threads` and `device` among them.
    """

    archive: str
    batch_size: PositiveInt = 8
    batch_wait_s: NotNegative = 0.002
    settings: dict[str, Any] = field(default_factory=dict)

    def changed(self, given: Mapping[str, Any]) -> ModelSettings:
        """These settings with some of them replaced, by a deployment's user_config.

        Raises:
            SettingsError: A key or value is wrong.
        """
        return parse_settings({**asdict(self), **given}, ModelSettings, "user_config")


@dataclass(frozen=True, kw_only=True)
class ApplicationSettings:
    """What an application serves.

    Attributes:
        models: Name that clients ask for -> the archive.
        max_request_bytes: Of a request's body.
        invocations: Whether the one archive that is served answers SageMaker's addresses, too.
    """

    models: dict[str, Any]
    max_request_bytes: PositiveInt = MOST_BYTES
    invocations: bool = False


def read_application(args: Mapping[str, Any]) -> ApplicationSettings:
    """Check an application's arguments.

    Args:
        args: As in `ApplicationSettings`; or without `models` a single archive's own and its `name`, as on a command
            line.

    Raises:
        SettingsError: A key or value is wrong, or a name can't be asked for.
    """
    block = dict(args)
    if "models" not in block:
        own: dict[str, Any] = {key: block.pop(key) for key in ("max_request_bytes", "invocations") if key in block}
        block = {"models": {str(block.pop("name", "ens")): block}, **own}
    read = parse_settings(block, ApplicationSettings, "args")
    if not read.models:
        raise SettingsError("args: models: expected at least one archive")
    if read.invocations and len(read.models) > 1:
        raise SettingsError(f"args: invocations: expected one archive in models, got {len(read.models)}")
    models = {name: _read_model(name, model) for name, model in read.models.items()}
    names = [deployment_name(name) for name in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SettingsError(f"args: models: two of them would be the deployment '{twice}'")
    return replace(read, models=models)


def _read_model(name: str, block: Any) -> ModelSettings:
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"args: models: '{name}': expected letters, digits, '_', '.' and '-', and a '/' before a version"
        )
    if not isinstance(block, Mapping):
        raise SettingsError(f"args: models: {name}: expected an object with 'archive', got {type(block).__name__}")
    return parse_settings(block, ModelSettings, f"args: models: {name}")


def deployment_name(name: str) -> str:
    """What Ray calls the deployment of a model: its name, in which Ray wants no slash."""
    return name.replace("/", "-")
