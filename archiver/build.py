"""Turns one ArchiveRequest into one .mar: check everything, show it, pack it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from archiver.blocks.handler_facts import architecture_of, check_block, load_handler
from archiver.blocks.request import ArchiveRequest, check_files
from archiver.blocks.worker_config import config_name, describe_worker, read_worker_config
from archiver.checking.check import TUNE_BUDGET_S, load_stage
from archiver.checking.precision import check_precision, judge_precision
from archiver.members.claims import (
    claimed_architecture,
    claimed_classes,
    claimed_transforms,
    count_outputs,
    note_on_input,
    stage_labels,
)
from archiver.members.guess import describe_assumption
from archiver.members.preprocessing import claimed_preprocessing
from archiver.members.resolve import resolve_members
from archiver.members.survey import Survey, survey_members
from archiver.packing.compile import check_compiler, compile_archive
from archiver.packing.kernels import add_kernels
from archiver.packing.onnx_graph import check_exporter, pack_graph
from archiver.packing.pack import pack_archive, settings_of, target_path
from archiver.report import show_archive, show_kernels, show_note, show_precision, show_survey, show_traced
from archiver.source import Source
from archiver.texts.pretrained import check_heads, check_num_labels, choose_pretrained, stage_pretrained
from archiver.texts.sentence import join_sentence_models
from archiver.texts.tokenizers import check_tokenizer, fit_tokenizer, set_lower_case
from archiver.texts.traced import TracedMembers, is_traced, survey_traced, trace_directories
from vmap_ensemble.archive.settings import known_keys, parse_settings
from vmap_ensemble.errors import ArchiveError, OtherArchitecture
from vmap_ensemble.models.architecture import TRANSFORMERS, build_architecture
from vmap_ensemble.models.text_modes import DEFAULT_MODE, is_labelled
from vmap_ensemble.models.transformers import PRETRAINED_FOLDER, read_config
from vmap_ensemble.tasks.task import Task

Step = Callable[[str], None]


def build_archive(request: ArchiveRequest, output: Path, force: bool, console: Console, debug: bool = False) -> Path:
    """Build one archive and print what went in and what came out.

    Args:
        request: What the archive is made of.
        output: Folder of the archive, the model store.
        force: Replace an archive that exists.
        console: Where reports and progress go.
        debug: Print the log of an archive that can't be loaded.

    Returns:
        The path of the archive.

    Raises:
        EnsembleError: One line that says what is refused; the archive that was there is untouched.
    """
    target = target_path(output, request.name, force)
    check_files(request)
    if request.compile:
        check_compiler()  # before minutes of other work
    if request.onnx:
        check_exporter()
    handler = load_handler(request.handler)
    where = f"setup_config.json, block '{request.name}'"
    check_block(request.settings, handler, where)
    check_precision(handler, request, parse_settings(request.settings, handler.settings_class, where))
    with tempfile.TemporaryDirectory(prefix="archive-") as scratch:
        return _build(request, handler, Path(scratch), target, console, debug)


def _build(
    request: ArchiveRequest, handler: type[Task], scratch: Path, target: Path, console: Console, debug: bool
) -> Path:
    sources = resolve_members(request.members, request.folder, scratch)
    request = _with_pretrained(request, handler, sources, scratch, console)
    survey: Survey | TracedMembers
    if is_traced(request.settings):
        if request.compile or request.onnx:
            asked = "--compile" if request.compile else "--onnx"
            raise ArchiveError(f"'{request.name}': {asked}: traced members run as they are; leave it away")
        if request.samples:
            raise ArchiveError(
                f"'{request.name}': samples: traced members have the precision that they were traced in, and are "
                "compared with their checkpoints at tracing and at every load; leave --samples away"
            )
        survey = _survey_traced(request, sources, scratch, console)
    else:
        assumed = not request.settings.get("architecture")
        request = _with_claims(_with_architecture(request, handler), handler, sources, console)
        survey = _survey(request, sources, console, assumed)
        request = _with_preprocessing(request, handler, survey, console)
        request = _with_labels(request, handler, survey, scratch)
        check_block(settings_of(request, survey.num_classes), handler, f"archive '{request.name}'")
        show_survey(console, request.name, survey)
    runs = []
    more = (3 if request.samples else 0) + (2 if request.compile else 0) + request.onnx + (1 if request.check else 0)
    with _progress(console, f"pack {request.name}", len(sources) + 2 + more) as step:

        def complete(stage: Path) -> None:
            show_kernels(console, add_kernels(stage))
            found = judge_precision(handler, request, stage, step)
            if found or request.samples:
                show_precision(console, found)
            if request.compile:
                compile_archive(handler, request, stage, step)
            if request.onnx:
                step("export one ONNX graph of all members")
                pack_graph(handler, stage)
            worker = read_worker_config(stage / config_name(request), config_name(request))
            runs.append(("serving", describe_worker(worker)))
            if request.check:
                step("load once, as a worker will")
                log = console if debug else None
                runs.append(("loaded once", _load_once(request.name, stage, worker, log, request.tune)))

        manifest = pack_archive(request, survey, target, step, complete)
    show_archive(console, target, manifest, runs)
    return target


def _with_pretrained(
    request: ArchiveRequest, handler: type[Task], sources: list[Source], scratch: Path, console: Console
) -> ArchiveRequest:
    """With config.json and the tokenizer staged, and the settings that sentence-transformers directories say."""
    pretrained = choose_pretrained(sources, request.pretrained)
    if pretrained is None:
        return request
    where = f"setup_config.json, block '{request.name}'"
    mode = str(getattr(parse_settings(request.settings, handler.settings_class, where), "mode", ""))
    check_heads(sources, mode)
    if mode == "embedding":
        folders = {source.name: source.folder for source in sources if source.folder is not None}
        told, notes = join_sentence_models(folders or {pretrained.name: pretrained}, request.settings)
        request = dataclasses.replace(request, settings={**request.settings, **told})
        for note in notes:
            show_note(console, note)
    root = stage_pretrained(pretrained, scratch / "root")
    check_num_labels(request.settings, root)
    check_tokenizer(pretrained.name, root)
    settings = parse_settings(request.settings, handler.settings_class, where)
    set_lower_case(getattr(settings, "do_lower_case", None), pretrained.name, root)
    architecture = architecture_of(handler, request.settings, where)
    if architecture.startswith(TRANSFORMERS):
        fit_tokenizer(pretrained.name, root, build_architecture(architecture, None, root))
    return dataclasses.replace(request, pretrained=root / PRETRAINED_FOLDER)


def _with_claims(
    request: ArchiveRequest, handler: type[Task], sources: list[Source], console: Console
) -> ArchiveRequest:
    """With what members say of their preprocessing, where the block doesn't say it and the handler knows it."""
    settings = dict(request.settings)
    architecture = claimed_architecture(str(settings.get("architecture", "")), sources)
    if architecture:
        settings["architecture"] = architecture
    if "transforms" in known_keys(handler.settings_class) and not settings.get("transforms"):
        transforms = claimed_transforms(sources)
        if transforms is not None:
            settings["transforms"] = transforms
    note = note_on_input(architecture)
    if note is not None:
        show_note(console, note)
    return dataclasses.replace(request, settings=settings)


def _with_preprocessing(
    request: ArchiveRequest, handler: type[Task], survey: Survey, console: Console
) -> ArchiveRequest:
    """With how the members say that images are prepared; a key of the block wins, and `transforms` over all."""
    if "interpolation" not in known_keys(handler.settings_class) or request.settings.get("transforms"):
        return request
    decided = {"crop" if key == "input_shape" else key for key in request.settings}
    added = claimed_preprocessing(survey.sources, survey.preprocessing, decided)
    if added:
        text = ", ".join(f"{key} {value}" for key, value in added.items())
        show_note(console, f"images are prepared as the members say: {text}")
    return dataclasses.replace(request, settings={**request.settings, **added})


def _count_outputs(request: ArchiveRequest, handler: type[Task]) -> int | None:
    """The classes of a network whose checkpoint doesn't tell them, where one input does."""
    folder = request.model_file.parent if request.model_file else None
    shape = request.settings.get("input_shape") or handler.default_input_shape
    return count_outputs(build_architecture(str(request.settings["architecture"]), None, folder), shape)


def _with_labels(request: ArchiveRequest, handler: type[Task], survey: Survey, scratch: Path) -> ArchiveRequest:
    """With a checked index_to_name.json, the members' own where the block brings none."""
    count = survey.num_classes
    mode = str(request.settings.get("mode", DEFAULT_MODE))
    if request.pretrained is not None and is_labelled(mode):
        count = int(read_config(request.pretrained, PRETRAINED_FOLDER).num_labels)
    has_labels = request.labels is not None or any(survey.classes)
    if has_labels and count is None and request.pretrained is None and survey.architecture_checked:
        count = _count_outputs(request, handler)
    if count == 1 and request.pretrained is None:
        count = 2  # one logit is the sigmoid of two classes
    claimed = claimed_classes(survey.sources, survey.classes, count if request.labels is None else None)
    return dataclasses.replace(request, labels=stage_labels(request.labels, claimed, count, scratch))


def _with_architecture(request: ArchiveRequest, handler: type[Task]) -> ArchiveRequest:
    where = f"setup_config.json, block '{request.name}'"
    architecture = architecture_of(handler, request.settings, where)
    if not architecture:
        return request
    return dataclasses.replace(request, settings={**request.settings, "architecture": architecture})


def _survey(request: ArchiveRequest, sources: list[Source], console: Console, assumed: bool) -> Survey:
    architecture = str(request.settings.get("architecture", ""))
    folder = request.model_file.parent if request.model_file else None
    if architecture.startswith(TRANSFORMERS) and request.pretrained is not None:
        folder = request.pretrained.parent
    with _progress(console, f"check {request.name}", 2 * len(sources) + 1) as step:
        given = request.settings.get("num_classes")
        num_classes = int(given) if given else None  # the settings take text, too
        options = (folder, request.allow_nan, step, request.checkpoint_weights)
        try:
            return survey_members(sources, architecture, num_classes, *options)
        except OtherArchitecture as error:
            told = describe_assumption(architecture, assumed, sources, request.checkpoint_weights)
            raise OtherArchitecture(f"{error}{told}") from None


def _survey_traced(request: ArchiveRequest, sources: list[Source], scratch: Path, console: Console) -> TracedMembers:
    if request.pretrained is None:
        raise ArchiveError(
            f"'{request.name}': traced members bring no config.json and no tokenizer; name the directory that they "
            "were traced from in the key 'pretrained' (--pretrained DIR)"
        )
    with _progress(console, f"check {request.name}", len(sources) + 2) as step:
        step("trace")
        traced = survey_traced(request, trace_directories(request, sources, scratch), step)
    show_traced(console, request.name, traced)
    return traced


def _load_once(name: str, stage: Path, worker: Mapping[str, Any], debug: Console | None, tune: bool) -> str:
    """How it is run, or why that can't be known here."""
    import torch

    device = str((worker.get("handler") or {}).get("device") or "")
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"no: {device} isn't on this machine; ./archive.sh --check where it is"
    return load_stage(f"{name}.mar", stage, debug, budget_s=TUNE_BUDGET_S if tune else None)


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Step]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=f"{title}: {text}")

        yield step
