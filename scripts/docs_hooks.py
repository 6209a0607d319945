"""Files of the repository that docs/ links to -> pages and files of the site; MkDocs calls this (mkdocs.yml).

On GitHub links are paths in the repository: docs/bert.md says ../SECURITY.md, README.md says docs/bert.md. The site
has no docs/ in its addresses, and README.md is its front page. So each linked file outside docs/ becomes part of the
site under its own path, and links are rewritten to where their file is in it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FRONT = ROOT / "README.md"
# Always part of the site, whether or not a page links to them: the navigation has them.
LISTED = (FRONT, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
# [text](target#anchor) and ![text](target), on one line or with the text over two.
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and what those pages link to in turn."""
    docs = Path(config.docs_dir)
    pages = [Path(file.abs_src_path or "") for file in files.documentation_pages()]
    waiting, seen = [*LISTED, *pages], set(pages)
    while waiting:
        path = waiting.pop()
        if path not in seen and not path.is_relative_to(docs):
            files.append(File.generated(config, site_path(path, docs), abs_src_path=str(path)))
        seen.add(path)
        if path.suffix == ".md":
            waiting += [target for target in linked_files(path) if target not in seen]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point a page's links to where their files are in the site."""
    docs = Path(config.docs_dir)
    source, folder = Path(page.file.abs_src_path), os.path.dirname(page.file.src_uri)

    def move(link: re.Match[str]) -> str:
        target = resolve(source, link["target"])
        if target is None:
            return link[0]
        return os.path.relpath(site_path(target, docs), folder or ".") + (link["anchor"] or "")

    return LINK.sub(move, markdown)


def linked_files(page: Path) -> list[Path]:
    """Files of the repository that a page of Markdown links to."""
    targets = (resolve(page, link["target"]) for link in LINK.finditer(page.read_text(encoding="utf-8")))
    return [target for target in targets if target is not None]


def resolve(page: Path, target: str) -> Path | None:
    """The file that a link means, or None: MkDocs complains of those that are wrong."""
    path = (page.parent / target).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def site_path(path: Path, docs: Path) -> str:
    """Where a file is among the site's sources: below docs/ as it is there, others as in the repository."""
    if path == FRONT:
        return "index.md"
    return path.relative_to(docs if path.is_relative_to(docs) else ROOT).as_posix()
