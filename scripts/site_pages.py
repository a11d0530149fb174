"""Hooks of MkDocs (mkdocs.yml): the pages that are made of something else, and links that lead to them.

README.md is the first page, CONTRIBUTING.md and CHANGELOG.md are pages, and so is each result of benchmarks/results.
A target has a page of what its registry, its file in configs/targets and the results say. Each public module has a page
of its docstrings. A link to a file of the sources that is no page is shown as text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

RESULTS = PurePosixPath("benchmarks/results")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages that lie outside of docs/, and their places on the site."""
_FENCED = re.compile(r"(^ {0,3}```.*?^ {0,3}```$)", re.M | re.S)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def place(path: PurePosixPath) -> str | None:
    """Return where a file of the checkout is on the site, or None if it is not there."""
    if str(path) in PAGES:
        return PAGES[str(path)]
    if path.parts[:1] == ("docs",):
        return str(path.relative_to("docs"))
    if path.parent == RESULTS and path.suffix in (".md", ".svg"):
        return f"results/{path.name}"
    return None


def source(page: str) -> PurePosixPath:
    """Return which file of the checkout a page of the site is, or would be in docs/."""
    for path, there in PAGES.items():
        if there == page:
            return PurePosixPath(path)
    name = PurePosixPath(page)
    return RESULTS / name.name if name.parts[0] == "results" else "docs" / name


def linked(markdown: str, page: str) -> str:
    """Return a text of the checkout with links as they are on the site.

    Args:
        markdown: The text; what stands between fences stays as it is.
        page: Its place on the site.
    """
    folder = source(page).parent

    def replace(found: re.Match[str]) -> str:
        is_image, text, link = found.groups()
        target, hash_sign, anchor = link.partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = PurePosixPath(os.path.normpath(folder / target))
        there = place(path)
        if there is None:
            return text if "`" in text else f"`{text}`"
        to = os.path.relpath(there, PurePosixPath(page).parent)
        return f"{is_image}[{text}]({to}{hash_sign}{anchor})"

    parts = _FENCED.split(markdown)
    return "".join(part if _FENCED.fullmatch(part) else _LINK.sub(replace, part) for part in parts)


def reference() -> dict[str, str]:
    """Return a page of docstrings for each public module, by its place."""
    from importlib import import_module

    rows = re.findall(r"^\| `(qwen3_vl[\w.]*)` \|", (ROOT / "docs" / "public_api.md").read_text(encoding="utf-8"), re.M)
    pages = {}
    for module in dict.fromkeys(rows):
        names = [name for name in import_module(module).__all__ if name not in ("__version__", "errors")]
        blocks = [f"::: {module}.{name}" for name in names]
        pages[f"reference/{module}.md"] = "\n\n".join([f"# {module}", *blocks]) + "\n"
    return pages


def results() -> dict[str, str]:
    """Return the tables and drawings of benchmarks/results, by their places."""
    paths = [path for path in sorted((ROOT / RESULTS).iterdir()) if path.suffix in (".md", ".svg")]
    return {f"results/{path.name}": path.read_text(encoding="utf-8") for path in paths}


def generated() -> dict[str, str]:
    """Return all pages that do not lie in docs/, by their places."""
    from scripts.target_pages import target_pages

    outside = {there: (ROOT / path).read_text(encoding="utf-8") for path, there in PAGES.items()}
    return {**outside, **results(), **target_pages(), **reference()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and name them and those that mkdocs.yml leaves out in the navigation."""
    from mkdocs.structure.files import File

    assert config.nav is not None
    for there, text in generated().items():
        files.append(File.generated(config, there, content=text))
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    named = {page for pages in sections.values() for page in pages}
    folders = {"results": "Performance", "targets": "Targets", "reference": "Python"}
    for file in files.documentation_pages():
        if file.src_uri not in named:
            folder = PurePosixPath(file.src_uri).parts[0]
            sections[folders.get(folder, "Extend")].append(file.src_uri)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Make a page's links those of the site."""
    return linked(markdown, page.file.src_uri)
