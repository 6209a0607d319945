"""The page of `vmap-ensemble demo` in a real, headless Chromium: by mouse, by keyboard alone, in light and dark."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: requirements-dev.txt")
pytest.importorskip("uvicorn")
pytest.importorskip("transformers")
pytest.importorskip("captum.attr")

from playwright import sync_api

from scripts.private_torchserve import ROOT
from tests.conftest import seeded, write_archive
from tests.unit.tasks.text.test_encoder_task import BIO, CONFIGS, random_members, save_tokenizer
from vmap_ensemble.ensemble import Ensemble
from vmap_ensemble.models.mnist import MnistNet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium isn't installed: apt-get install chromium")

PAGE = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
DIGIT = ROOT / "data" / "digits" / "3.png"
MEMBERS = {"X-Ensemble-Detail": "members"}
# The contrast of each text with what is behind it, as WCAG defines it; the paper of all parents is laid together.
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = (element) => {
    const own = numbers(getComputedStyle(element).backgroundColor), alpha = own[3] ?? 1;
    if (alpha === 1 || !element.parentElement) return own.slice(0, 3);
    const below = paper(element.parentElement);
    return below.map((c, i) => alpha * own[i] + (1 - alpha) * c);
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
    && [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
  return texts.map((e) => {
    const [one, two] = [light(numbers(getComputedStyle(e).color).slice(0, 3)), light(paper(e))].sort((a, b) => b - a);
    return [`${e.tagName} ${e.textContent.trim().slice(0, 30)}`, (one + 0.05) / (two + 0.05)];
  });
}"""
# As a file manager does it: a file that lies in a transfer is dropped.
DROP = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, {type: "image/png"}));
  const options = {dataTransfer, bubbles: true, cancelable: true};
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
}"""


@dataclass
class Demo:
    """A running `vmap-ensemble demo`."""

    process: subprocess.Popen[str]
    url: str = ""

    def ask(self, kind: str, **request: Any) -> dict[str, Any]:
        reply = httpx.post(f"{self.url}{kind}/ens", headers=MEMBERS, trust_env=False, timeout=60, **request)
        assert reply.status_code == 200, reply.text
        return reply.json()


def launch(archive: Path) -> Demo:
    """The line of the page, with another archive and a free port."""
    paths = os.pathsep.join([str(ROOT / "handlers"), str(ROOT)])
    (line,) = re.findall(r"^    vmap-ensemble (demo .*)$", PAGE, re.M)
    words = shlex.split(line.replace("model_store/mnist_ens.mar", str(archive)))
    command = [sys.executable, "-m", "archiver.command", *words, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": paths}
    # As in a terminal: a shell's jobs in the background are born deaf to Ctrl-C, and so would be what they start.
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return Demo(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=hear)
    )


def url_of(demo: Demo) -> str:
    """The address that the command prints once the archive is loaded."""
    assert demo.process.stdout is not None
    with demo.process.stdout as printed:
        line = printed.readline()
    assert line.startswith("http://127.0.0.1:"), line
    return line.split()[0]


def write_texts(folder: Path, mode: str, **config: Any) -> Path:
    """An unpacked archive of three tiny encoders whose answers differ."""
    made = CONFIGS["bert"](**config)
    members = random_members(mode, made, 3)
    states = {
        name: {key: tensor for key, tensor in member.state_dict().items() if not key.startswith("pooler.")}
        for name, member in members.items()
    }
    write_archive(folder, states, {"handler": "bert_handler.py", "mode": mode})
    made.save_pretrained(folder / "pretrained")
    save_tokenizer(folder / "pretrained", token_types=True)
    return folder


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Demo]]:
    """One for pictures and one for texts, of members whose answers differ."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("picture", "text")}
    states = {f"m{seed}": seeded(MnistNet, seed).state_dict() for seed in range(3)}
    write_archive(folders["picture"], states, {"handler": "mnist_handler.py", "abstain_below_probability": 0.999})
    write_texts(folders["text"], "sequence_classification", num_labels=3)
    running = {kind: launch(folder) for kind, folder in folders.items()}
    try:
        for demo in running.values():
            demo.url = url_of(demo)
        yield running
    finally:
        for demo in running.values():
            demo.process.send_signal(signal.SIGINT)  # Ctrl-C
        codes = [demo.process.wait(timeout=30) for demo in running.values()]
    assert codes == [130, 130]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Root's Chromium has no sandbox; the pages are our own.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, demos: dict[str, Demo]) -> Iterator[Any]:
    """Opens a page; afterwards nothing may have been fetched from elsewhere, or complained about in its console."""
    context = browser.new_context(viewport={"width": 1000, "height": 1400})
    asked: list[str] = []
    complaints: list[str] = []

    def opener(kind: str, **media: Any) -> Any:
        page = context.new_page()
        page.emulate_media(**media)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.goto(demos[kind].url)
        page.wait_for_selector("#fields > *")
        return page

    yield opener
    context.close()
    own = (*(demo.url for demo in demos.values()), "blob:", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    # A refusal is an answer; Chromium notes each as an error.
    assert [line for line in complaints if "the server responded with a status of 415" not in line] == []


def test_a_picture_that_is_dropped_is_answered(open_page: Any, demos: dict[str, Demo]) -> None:
    page = open_page("picture")
    page.evaluate(DROP, ["3.png", base64.b64encode(DIGIT.read_bytes()).decode()])
    page.wait_for_selector("#answer", state="visible")
    expected = demos["picture"].ask("predictions", content=DIGIT.read_bytes())
    assert page.text_content("#headline") == expected["prediction"]["label"]
    assert json.loads(page.text_content("#json")) == expected
    assert page.locator("#drop img").get_attribute("alt") == "The picture 3.png"
    assert page.text_content("#abstains") == "The ensemble abstains: probability below 0.999."
    rows = page.locator("#members li")
    names = [f"{member['name']}: {member['label']}" for member in expected["members"]]
    assert rows.locator(".name").all_text_contents() == names
    for index, member in enumerate(expected["members"]):
        width = rows.nth(index).locator(".fill").evaluate("bar => parseFloat(bar.style.width)")
        assert width == pytest.approx(100 * member["probability"], abs=0.01)
    agreeing = sum(member["label"] == expected["prediction"]["label"] for member in expected["members"])
    assert page.text_content("#votes") == f"{agreeing} of 3 say the same as the ensemble."
    assert page.locator("#members li.other").count() == 3 - agreeing
    assert page.locator("#explanation-part").is_hidden()


def test_the_command_that_is_shown_gets_the_same_answer(open_page: Any, demos: dict[str, Demo]) -> None:
    for kind, folder in (("picture", DIGIT.parent), ("text", ROOT)):
        page = open_page(kind)
        if kind == "picture":
            page.set_input_files("#file", DIGIT)
        else:
            page.fill("textarea", 'sarah\'s "great" movie')
            page.click("#submit")
        page.wait_for_selector("#answer", state="visible")
        command = page.text_content("#curl")
        done = subprocess.run(
            ["bash", "-c", f"{command} -sS"], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert json.loads(done.stdout) == json.loads(page.text_content("#json")), (command, done.stderr)


def test_a_text_is_asked_and_explained_by_keyboard_alone(open_page: Any, demos: dict[str, Demo]) -> None:
    page = open_page("text")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.press("Control+a")
    page.keyboard.type("sarah lives in new york")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer", state="visible")
    body = {"text": "sarah lives in new york"}
    assert page.text_content("#headline") == demos["text"].ask("predictions", json=body)["prediction"]["label"]
    assert page.evaluate("document.activeElement.id") == "answer"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "explain"
    page.keyboard.press("Enter")
    page.wait_for_selector(".words span")
    (expected,) = demos["text"].ask("explanations", json=body)["explanations"]
    assert page.locator(".words span").all_text_contents() == [word["word"] for word in expected["words"]]
    shown = [float(number) for number in page.locator("table td:nth-child(2)").all_text_contents()]
    assert shown == pytest.approx(expected["importances"], abs=0.001)
    strongest = max(range(len(shown)), key=lambda index: abs(expected["importances"][index]))
    papers = page.locator(".words span").evaluate_all("spans => spans.map(s => s.style.background)")
    assert "0.45" in papers[strongest]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("sequence_classification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "numbers": ("sequence_classification", {"num_labels": 1}),
    "entities": ("token_classification", {"id2label": BIO, "label2id": {name: i for i, name in BIO.items()}}),
    "a span": ("question_answering", {}),
    "masks": ("fill_mask", {}),
    "a vector": ("embedding", {}),
}


def expected_headline(kind: str, body: dict[str, Any]) -> str:
    if kind == "labels":
        return ", ".join(row["label"] for row in body["labels"]) or "none of the labels"
    if kind == "entities":
        return ", ".join(f"{row['text']} ({row['entity']})" for row in body["entities"]) or "no entities"
    if kind == "masks":
        return ", ".join(mask[0]["token"] for mask in body["masks"])
    if kind == "a span":
        return body["prediction"]["answer"] or "no answer"
    return "a vector of 16 numbers" if kind == "a vector" else ""


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_every_kind_are_shown(kind: str, open_page: Any, tmp_path: Path) -> None:
    mode, config = KINDS[kind]
    ensemble = Ensemble.load(write_texts(tmp_path / "ar", mode, **config))
    (answer,) = ensemble.predict([json.loads(ensemble.task.sample_request())], detail=True)
    page = open_page("text")
    page.route("**/predictions/ens", lambda route: route.fulfill(body=answer.to_json()))  # this archive's answer
    page.click("#submit")
    page.wait_for_selector("#answer", state="visible")
    body = json.loads(answer.to_json())
    shown = page.text_content("#headline")
    if kind == "numbers":  # JavaScript writes some floats otherwise
        assert [float(part) for part in shown.split(", ")] == body["prediction"]["values"]
    else:
        assert shown == expected_headline(kind, body)
    assert page.locator("#members li").count() == 3
    assert page.locator("#uncertainty li").count() == len(body["uncertainty"])
    shown_parts = page.locator("#answer").inner_text()
    assert not {"undefined", "NaN", "[object"} & set(shown_parts.replace(":", " ").split())


def test_a_refusal_says_why(open_page: Any) -> None:
    page = open_page("picture")
    page.click("#submit")
    assert page.text_content("#status") == "Choose a picture first"
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#status:has-text('415')")
    assert page.locator("#answer").is_hidden()
    assert page.evaluate("document.getElementById('status').className") == "wrong"


def test_figures_of_the_last_minutes_move(open_page: Any, demos: dict[str, Demo]) -> None:
    page = open_page("text")
    before = httpx.get(f"{demos['text'].url}figures", trust_env=False).json()["replies"].get("200", 0)
    demos["text"].ask("predictions", json={"text": "a"})  # by another client
    page.wait_for_selector(f"#numbers dd:has-text('{before + 1} × 200')")
    assert " requests in 5 minutes" in page.get_attribute("#spark", "aria-label")
    assert page.locator("#spark rect").count() == 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in(scheme: str, open_page: Any, tmp_path: Path) -> None:
    page = open_page("text", color_scheme=scheme)
    page.click("#submit")
    page.wait_for_selector("#answer", state="visible")
    page.click("#explain")
    page.wait_for_selector(".words span")
    contrasts = dict(page.evaluate(CONTRASTS))
    assert len(contrasts) > 20
    assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"demo-{scheme}.png", full_page=True)
    grey = Image.open(folder / f"demo-{scheme}.png").convert("L")
    mean = sum(value * count for value, count in enumerate(grey.histogram())) / (grey.width * grey.height)
    assert (mean > 200) if scheme == "light" else (mean < 60)


@pytest.mark.parametrize("kind", ["picture", "text"])
def test_everything_that_can_be_used_has_a_name(kind: str, open_page: Any) -> None:
    page = open_page(kind)
    if kind == "picture":
        page.set_input_files("#file", DIGIT)
    else:
        page.click("#submit")
    page.wait_for_selector("#answer", state="visible")
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "textbox", "image", "region", "form", "DisclosureTriangle", "heading", "StaticText"}
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"]]
    used = [(role, name) for role, name in named if role in wanted]
    assert {role for role, _ in used} >= {"button", "image", "region", "form", "heading"}
    assert [role for role, name in used if not name.strip()] == []
    assert page.get_attribute("html", "lang") == "en"
