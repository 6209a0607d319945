"""Pages can't rot: each command and Python block is run by a test or says why not, and what pages quote exists."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from archiver.command_line import parse_arguments
from scripts.private_torchserve import ROOT

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
LINKED = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
REASONS = (
    "a GPU",
    "the network",
    "minutes",
    "a running server",
    "a running production server",
    "a Java development kit",
    "members of your own",
    "a Docker daemon",
    "a cluster",
)
# Page -> part of a block -> the test that runs it. An empty part stands for all blocks of the page.
RUN_BY: dict[str, dict[str, str]] = {
    "README.md": {
        "--members a.pth": "tests/server/test_readme.py::test_every_curl_line_is_answered",
        "curl -T": "tests/server/test_readme.py::test_every_curl_line_is_answered",
        "Ensemble.load": "tests/archive/test_library_page.py::test_blocks_of_the_pages_run_as_written",
        "vmap-ensemble predict": "tests/archive/test_library_page.py::test_the_command_for_a_folder_runs_as_written",
        "python -m benchmarks": "tests/server/test_readme.py::test_benchmarks_run_as_written",
    },
    "docs/checkpoints.md": {"": "tests/archive/test_checkpoints_page.py::test_blocks_of_a_section_run_as_written"},
    "docs/clients.md": {
        "GrpcClient": "tests/server/test_serving.py::test_the_clients_of_the_package",
        "vmap_ensemble.client": "tests/unit/client/test_clients.py::test_the_blocks_of_the_page_run",
    },
    "docs/demo.md": {"vmap-ensemble demo": "tests/server/test_demo_page.py::launch"},
    "docs/deployment.md": {
        "openssl": "tests/server/test_deployment_page.py::running",
        "export TEMP": "tests/server/test_deployment_page.py::running",
        "--foreground": "tests/server/test_deployment_page.py::running",
        "key=": "tests/server/test_deployment_page.py::test_a_key_and_the_certificate_open_predictions",
        "api=": "tests/server/test_deployment_page.py::test_another_key_is_made",
        "health https": "tests/server/test_deployment_page.py::test_health_is_asked_with_a_key",
        "health http:": "tests/server/test_probes.py::test_the_line_of_the_page_is_healthy",
    },
    "docs/proxy.md": {
        "ensembles_grpc.conf": "tests/server/deploy/test_nginx.py::test_grpc_reaches_torchserve_with_a_known_key",
        **dict.fromkeys(
            ("install -D", "openssl rand", "curl"), "tests/server/deploy/test_nginx.py::test_the_page_as_written"
        ),
    },
    "docs/monitoring.md": {"curl": "tests/server/test_probes.py::test_the_line_of_the_page_gives_metrics"},
    "docs/from_torchserve.md": {
        "torch-model-archiver": "tests/server/test_from_torchserve.py::images",
        "ens --handler": "tests/server/test_from_torchserve.py::images",
        "curl": "tests/server/test_from_torchserve.py::test_one_archive_answers_the_mean_of_the_others",
        "my_bert": "tests/server/test_from_torchserve.py::test_an_archive_of_the_hugging_face_example_is_a_directory",
    },
    "docs/distil.md": dict.fromkeys(
        ("vmap-ensemble distil", "./archive.sh mnist_ens_heads"),
        "tests/unit/optimise/test_distil.py::test_the_commands_of_the_page_run_as_written",
    )
    | {"bert_ens": "tests/unit/optimise/test_texts.py::test_the_commands_of_the_page_run_as_written"},
    "docs/precision.md": {
        "vmap-ensemble quantise": "tests/unit/optimise/test_quantise.py::"
        "test_the_command_of_the_page_builds_what_it_judged",
    },
    "docs/prune.md": dict.fromkeys(
        ("vmap-ensemble prune", "./archive.sh photos_ens_pruned"),
        "tests/unit/optimise/test_prune.py::test_the_commands_of_the_page_run_as_written",
    ),
    "docs/export.md": {"": "tests/archive/test_library_page.py::test_the_page_of_exports_runs_as_written"},
    "docs/kserve.md": {"curl": "tests/server/test_kserve.py::test_the_lines_of_the_page_are_answered"},
    "docs/library.md": {"": "tests/archive/test_library_page.py::test_blocks_of_the_pages_run_as_written"},
    "docs/offline.md": {
        "predict_many": "tests/archive/test_library_page.py::test_blocks_of_the_pages_run_as_written",
        "vmap-ensemble predict": "tests/archive/test_library_page.py::test_the_command_for_a_folder_runs_as_written",
    },
    "docs/moving.md": {
        ":8000/predictions": "tests/server/test_ray_serve.py::test_the_lines_of_the_page_are_answered",
        ":8080/predictions": "tests/server/test_kserve.py::test_the_lines_of_the_page_are_answered",
        "export": "tests/archive/test_library_page.py::test_the_page_of_exports_runs_as_written",
        "litserve": "tests/server/test_litserve.py::served",
        "predict model_store": "tests/archive/test_library_page.py::test_the_command_for_a_folder_runs_as_written",
    },
    "docs/own_handler.md": {"": "tests/unit/frontends/torchserve/test_own_handler.py::space"},
    "docs/versions.md": {"curl": "tests/server/test_versions.py::test_update_and_roll_back_lose_nothing"},
}
SHELL = re.compile(
    r"(\$ )?(\./|\.venv/|\. |scripts/|[A-Z_]+=|etc=|\w+=\$\()|"
    r"(\$ )?(python|pip|curl|torchserve|torch-model-archiver|vmap-ensemble)\b|"
    r"(\$ )?(git|mkdir|export|for|openssl|keytool|docker|kubectl|nginx|prometheus|install|umask)\b|"
    r"(\$ )?(ray|serve (run|deploy|status))\b"
)
PYTHON = re.compile(r"(from [\w.]+ import |import \w|with \w+\(|@\w+)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
INDENTED = re.compile(r"(?:\A|\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)")
MARK = re.compile(r"<!-- not run: needs (.*?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A block of commands or of Python, and the reason why it isn't run, if its page gives one."""

    page: str
    text: str
    is_shell: bool
    reason: str | None


@functools.cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str) -> list[Block]:
    found = []

    def add(kind: str, block: str, before: str) -> None:
        first = block.strip().partition("\n")[0]
        is_shell = kind in ("bash", "sh") or (not kind and SHELL.match(first) is not None)
        if is_shell or kind == "python" or (not kind and PYTHON.match(first)):
            mark = MARK.search(before)
            found.append(Block(page, block, is_shell, mark[1] if mark else None))

    for match in FENCE.finditer(text):
        add(match[2], match[3], text[: match.start()])
    # Fences go, but their lines stay apart from what is indented; list items aren't code.
    plain = FENCE.sub("\n", text)
    for match in INDENTED.finditer(plain):
        add("", match[1], plain[: match.start(1)])
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page, read(page))]


def name_of(block: Block) -> str:
    return f"{block.page}: {block.text.strip().partition(chr(10))[0][:60]}"


def problem_with(block: Block) -> str | None:
    """What is wrong with a block; None where a test runs it, or its mark is one of the list."""
    runs = next((test for part, test in RUN_BY.get(block.page, {}).items() if part in block.text), None)
    if block.reason is not None:
        if block.reason in REASONS:
            return None
        return f"'{block.reason}' is no reason of the list; expected one of: {', '.join(REASONS)}"
    if runs is None:
        return (
            "no test runs it. Run the page's own lines in a test and name it in RUN_BY "
            "(tests/unit/scripts/test_pages.py), or "
            f" write on the line before the block: <!-- not run: needs ... -->, one of: {', '.join(REASONS)}"
        )
    return None


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    problem = problem_with(block)
    assert problem is None, f"{name_of(block)}: {problem}"


def test_new_commands_are_noticed() -> None:
    page = (
        "# X\n\n    ./archive.sh x\n\n```bash\ncurl x\n```\n\n"
        "<!-- not run: needs luck -->\n\n    python -m x\n\ntext\n\n    y = x\n"
    )
    problems = [problem_with(block) for block in blocks_of("docs/new.md", page)]
    assert len(problems) == 3
    assert sum("name it in RUN_BY" in str(problem) for problem in problems) == 2
    assert sum("no reason of the list" in str(problem) for problem in problems) == 1


@pytest.mark.parametrize("test", sorted({test for page in RUN_BY.values() for test in page.values()}))
def test_the_tests_that_are_named_exist(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}(" in read(file)


# --- what runs quickly of any block ------------------------------------------------------------------------------


def lines_with(start: str) -> Iterator[str]:
    """Command lines of all blocks that begin so, continued lines joined, comments and parentheses cut."""
    for block in BLOCKS:
        for line in block.text.replace("\\\n", " ").splitlines() if block.is_shell else ():
            found = re.search(rf"(?:^|\s){re.escape(start)}(.*)", line.strip())
            if found:
                yield re.sub(r"\s{2,}(#|\().*", "", found[1]).strip()


@pytest.mark.parametrize("line", sorted(set(lines_with("./archive.sh "))))
def test_archive_lines_parse(line: str) -> None:
    parse_arguments(shlex.split(line))


def modules() -> list[str]:
    """Every `python -m X` that a page names, in blocks and in sentences."""
    named = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", read(page))}
    return sorted(named - {"X", "x", "pytest", "zipfile", "venv"})


def is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    return spec.submodule_search_locations is not None


@pytest.mark.parametrize("module", modules())
def test_modules_that_pages_name_have_a_help(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module if not is_package(module) else f"{module}.__main__"
    pytest.importorskip("transformers")
    main = importlib.import_module(name).main
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "usage" in capsys.readouterr().out


# --- links ---------------------------------------------------------------------------------------------------------


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    plain = FENCE.sub("", read(page))
    titles = re.findall(r"^#+ (.*)$", plain, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_links_and_anchors_exist(page: str) -> None:
    plain = FENCE.sub("", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(str(path.relative_to(ROOT))), target


def test_the_readme_leads_to_every_page() -> None:
    missing = [page for page in PAGES[1:] if f"({page}" not in read("README.md")]
    assert missing == ["docs/benchmarks.md"] or not missing


# --- what pages quote --------------------------------------------------------------------------------------------


@functools.cache
def texts_in_source() -> str:
    """Every text of our Python files, formatted values as `…`, one per line."""
    found = []
    for folder in ("archiver", "handlers", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def messages_of_ours() -> list[str]:
    """The first column of the tables of docs/troubleshooting.md, but for TorchServe's own messages."""
    ours = read("docs/troubleshooting.md").partition("## serve.sh")[2]
    return re.findall(r"^\| `([^`]+)`", ours, re.M)


@pytest.mark.parametrize("message", messages_of_ours())
def test_messages_that_are_quoted_are_in_the_source(message: str) -> None:
    assert re.search(re.escape(message).replace("…", ".*"), texts_in_source()), message


def test_there_are_messages() -> None:
    assert len(messages_of_ours()) >= 15


def test_metrics_of_the_page_are_declared_and_all_are_there() -> None:
    page = read("docs/monitoring.md")
    declared = yaml.safe_load(read("config/metrics.yaml"))
    names = {row["name"] for rows in declared["model_metrics"].values() for row in rows}
    own = {name for name in names if name.startswith("Ensemble")}
    alerts = yaml.safe_load(read("deploy/prometheus/alerts.yml"))["groups"][1]["rules"]
    assert re.findall(r"^\| `(Ensemble\w+)` \|", page.partition("## Worth an alarm")[2], re.M) == [
        rule["alert"] for rule in alerts
    ]
    assert set(re.findall(r"`(Ensemble\w+)`", page.partition("## Prometheus")[0])) == own
    histograms = {row["name"] for row in declared["model_metrics"]["histogram"]}
    for name, part in re.findall(
        r"(Ensemble[A-Za-z]+)(_sum|_count)?", page.partition("## Worth a panel")[2].partition("##")[0]
    ):
        assert name in own, name
        assert not part or name in histograms, name
    theirs = {row["name"] for row in declared["ts_metrics"]["counter"]}
    assert set(re.findall(r"ts_\w+", page)) <= theirs
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])["scrape_configs"]


def test_torchserves_messages_are_its_own() -> None:
    installed = importlib.util.find_spec("ts")
    if installed is None or installed.origin is None:
        pytest.skip("no TorchServe here")
    folder = Path(installed.origin).parent
    said = b"".join(path.read_bytes() for path in folder.rglob("*.py"))
    with zipfile.ZipFile(folder / "frontend" / "model-server.jar") as jar:
        said += b"".join(jar.read(name) for name in jar.namelist() if name.startswith("org/pytorch/serve/"))
    table = read("docs/troubleshooting.md").partition("## serve.sh")[0]
    firsts = re.findall(r"^\| (.*?) \|", table, re.M)[2:]
    quoted = [message for first in firsts for message in re.findall(r"`([^`]{9,})`", first)]
    assert len(quoted) >= 9
    kernel = "Address already in use"
    for message in set(quoted) - {kernel}:
        # A model is called ens on the page; the log's formatter fills in names.
        for part in re.split(r'"?\bens\b"?|, error: Worker died\.', message):
            assert part.strip().encode() in said, part
