"""Turns surveyed members into a .mar: stage, zip as torch-model-archiver does, move the result into place at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from archiver import HANDLERS
from archiver.blocks.request import ArchiveRequest
from archiver.blocks.worker_config import CONFIG_FILE, DEFAULT, config_name
from archiver.members.survey import Survey
from archiver.texts.traced import TracedMembers, copy_traced
from vmap_ensemble.archive.identity import DESCRIPTION
from vmap_ensemble.archive.labels import LABELS_FILE
from vmap_ensemble.archive.manifest import MANIFEST_FILE, MEMBERS_FOLDER, Manifest, hash_file, list_code
from vmap_ensemble.archive.modes import CHOICES_FOLDER
from vmap_ensemble.archive.precision import PRECISION_FILE
from vmap_ensemble.archive.settings import SETTINGS_FILE
from vmap_ensemble.core.members import Member
from vmap_ensemble.errors import ArchiveError
from vmap_ensemble.execution.compiled.packages import COMPILED_FOLDER
from vmap_ensemble.execution.onnx.packages import ONNX_FOLDER
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER
from vmap_ensemble.version import __version__

PACKAGE = "vmap_ensemble"
# Made by the archiver in every archive; an extra file of that name would replace it in silence.
RESERVED_NAMES = (
    *(SETTINGS_FILE, MANIFEST_FILE, MEMBERS_FOLDER, PACKAGE, LABELS_FILE, PRETRAINED_FOLDER, PRECISION_FILE),
    *(COMPILED_FOLDER, ONNX_FOLDER, CHOICES_FOLDER, "MAR-INF"),
)

Step = Callable[[str], None]


def target_path(output: Path, name: str, force: bool) -> Path:
    """Where the archive goes, checked before any work.

    Raises:
        ArchiveError: The folder can't be written to, or the archive is there and `force` is off.
    """
    target = output / f"{name}.mar"
    if target.exists() and not force:
        raise ArchiveError(f"{target}: exists; --force replaces it")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArchiveError(f"{output}: can't be made ({error.strerror})") from None
    if not os.access(output, os.W_OK):
        raise ArchiveError(f"{output}: not writable")
    return target


def pack_archive(
    request: ArchiveRequest,
    survey: Survey | TracedMembers,
    target: Path,
    step: Step,
    complete: Callable[[Path], object] = lambda stage: None,
) -> Manifest:
    """Build the archive beside its target and move it there in one step.

    Args:
        request: Handler, settings and files.
        survey: The members, checked.
        target: The .mar to write; what was there stays until the new one is whole.
        step: Called with a line of what is done: once per member, once for shared, once for packing.
        complete: Called with the archive's root before it is packed, to run it and add to it.

    Raises:
        ArchiveError: Something can't be written, or a file is in the way. The old archive is untouched.
    """
    with private_folder(target) as work:
        stage = work / "stage"
        try:
            manifest = _stage(request, survey, stage, step)
            write_description(stage, describe_model(request))
            complete(stage)
            for cache in list(stage.rglob("__pycache__")):
                shutil.rmtree(cache)  # of modules that `complete` imported
            manifest = dataclasses.replace(manifest, code=list_code(stage))
            (stage / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            step("pack")
            built = work / target.name
            write_mar(built, stage)
            os.replace(built, target)
        except OSError as error:
            raise ArchiveError(f"{target.name}: can't be written ({error})") from None
    return manifest


@contextmanager
def private_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target: os.replace is atomic only within one file system.

    TorchServe skips hidden entries of the model store (ModelServer.java, initModelStore).
    """
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    except OSError as error:
        raise ArchiveError(f"{target.parent}: can't be written to ({error.strerror})") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _stage(request: ArchiveRequest, survey: Survey | TracedMembers, stage: Path, step: Step) -> Manifest:
    """Lay out the root of the archive."""
    (stage / MEMBERS_FOLDER).mkdir(parents=True)
    shutil.copytree(HANDLERS / PACKAGE, stage / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    settings = settings_of(request, None if isinstance(survey, TracedMembers) else survey.num_classes)
    (stage / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(request.handler, stage / request.handler.name)
    if request.model_config is not None:
        _copy_extra(request.model_config, stage, request)
    else:
        (stage / CONFIG_FILE).write_text(DEFAULT, encoding="utf-8")
    if request.labels is not None:
        shutil.copyfile(request.labels, stage / LABELS_FILE)
    for path in (*request.extra_files, *((request.model_file,) if request.model_file else ())):
        _copy_extra(path, stage, request)
    if request.pretrained is not None:
        shutil.copytree(request.pretrained, stage / PRETRAINED_FOLDER)
    write = copy_traced if isinstance(survey, TracedMembers) else _write_members
    manifest = write(survey, stage, step)  # type: ignore[arg-type]
    (stage / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def settings_of(request: ArchiveRequest, num_classes: int | None) -> dict[str, Any]:
    """The flat block that goes into the archive, with what the members told."""
    return {**request.settings, **({"num_classes": num_classes} if num_classes else {})}


def _copy_extra(path: Path, stage: Path, request: ArchiveRequest) -> None:
    if path.name in RESERVED_NAMES or (stage / path.name).exists():
        raise ArchiveError(f"extra file '{path.name}': an archive has a file of that name already")
    if path.is_dir():
        shutil.copytree(path, stage / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    elif path.is_file():
        shutil.copyfile(path, stage / path.name)
    else:
        raise ArchiveError(f"extra file '{path.name}': no such file")


def _write_members(survey: Survey, stage: Path, step: Step) -> Manifest:
    members = []
    own = survey.own_keys()
    for source, digest, state in zip(survey.sources, survey.hashes, survey.states, strict=True):
        step(f"write {source.name}")
        row = _write(stage, source.name, source.shown, {key: state[key] for key in own}, digest)
        members.append(row)
    shared = None
    kept = [key for key in survey.shared if key not in survey.ties]
    step("write shared")
    if kept:
        shared = _write(stage, "shared", "", {key: survey.states[0][key] for key in kept}, "")
    return Manifest(tuple(members), shared, survey.ties)


def _write(stage: Path, name: str, source: str, tensors: Mapping[str, Tensor], digest: str) -> Member:
    file = f"{MEMBERS_FOLDER}/{name}.safetensors"
    # A clone apart: safetensors refuses views that overlap, as slices of one fused weight do.
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, stage / file)
    path = stage / file
    return Member(name, file, hash_file(path), source, path.stat().st_size, digest)


def describe_model(request: ArchiveRequest) -> dict[str, Any]:
    """MAR-INF/MANIFEST.json of an archive, with the keys that TorchServe reads (Manifest.java)."""
    model = {
        "modelName": request.name,
        "handler": request.handler.name,
        "modelVersion": request.version,
        "configFile": config_name(request),
    }
    created = datetime.now().strftime("%d/%m/%Y %H:%M:%S")
    return {"createdOn": created, "runtime": "python", "model": model, "archiverVersion": __version__}


def write_description(stage: Path, manifest: Mapping[str, Any]) -> None:
    """MAR-INF/MANIFEST.json of a folder that becomes an archive."""
    (stage / DESCRIPTION).parent.mkdir(parents=True, exist_ok=True)
    (stage / DESCRIPTION).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def write_mar(path: Path, stage: Path) -> None:
    """Zip a folder as TorchServe wants it: files and folders in the root, stored as they are, its manifest last.

    Weights don't compress; deflating them takes ten times as long, and so does the unpacking at every start.
    """
    files = [file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name in sorted(files, key=lambda name: (name == DESCRIPTION, name)):
            archive.write(stage / name, name)
