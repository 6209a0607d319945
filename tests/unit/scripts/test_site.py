"""The documentation's site: it builds without a warning, needs no other host, and its navigation has every page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the group docs isn't installed: scripts/setup.sh docs")

from scripts import docs_hooks

ROOT = Path(__file__).resolve().parents[3]
# What a browser fetches by itself; <a href> is followed by people, and may lead anywhere.
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Links(HTMLParser):
    """Collects what a page fetches and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in FETCHED and values.get(FETCHED[tag]):
            self.fetched.append(str(values[FETCHED[tag]]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def read_links(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        fetched = read_links(page).fetched
        assert fetched
        assert not [target for target in fetched if re.match(r"(\w+:)?//", target)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\([\"']?|@import\s+[\"'])(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_page_is_in_the_navigation(site: Path) -> None:
    front = {link.partition("#")[0] for link in read_links(site / "index.html").links}
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in front
    assert {"CHANGELOG.html", "CONTRIBUTING.html", "SECURITY.html"} <= front


def test_every_link_within_the_site_leads_to_a_file(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links start at the root of the server
            continue
        seen = read_links(page)
        for target in (*seen.links, *seen.fetched):
            path = target.partition("#")[0]
            if path and not re.match(r"\w+:", path):
                assert (page.parent / path).exists(), f"{page.relative_to(site)}: {target}"


def test_pages_and_files_outside_docs_are_part_of_it(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "N checkpoints, one TorchServe model, one forward" in front
    assert 'href="bert.html"' in front
    assert (site / "LICENSE").is_file()
    assert 'href="data/LICENSE-MNIST.html"' in (site / "mnist.html").read_text(encoding="utf-8")
    figures = next((ROOT / "benchmarks" / "results").glob("loading-*.json")).relative_to(ROOT)
    assert f'href="results/{figures.name}"' in (site / "benchmarks" / "loading.html").read_text(encoding="utf-8")
    assert (site / figures).read_bytes() == (ROOT / figures).read_bytes()


def test_links_are_rewritten_where_they_mean_a_file() -> None:
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"))

    def move(source: str, uri: str, markdown: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / source), src_uri=uri))
        return docs_hooks.on_page_markdown(markdown, page, config, None)

    assert move("README.md", "index.md", "[a](docs/bert.md#long-texts)") == "[a](bert.md#long-texts)"
    assert move("docs/bert.md", "bert.md", "[a](../README.md)") == "[a](index.md)"
    assert move("docs/bert.md", "bert.md", "[a](../config/config.properties)") == "[a](config/config.properties)"
    assert move("docs/benchmarks/gpu.md", "benchmarks/gpu.md", "[a](../benchmarks.md#x)") == "[a](../benchmarks.md#x)"
    for same in ("[a](https://example.org/a)", "[a](#here)", "[a](missing.md)", "![a](packing.svg)"):
        assert move("docs/bert.md", "bert.md", same) == same
