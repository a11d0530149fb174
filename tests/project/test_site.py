"""The site: it is built without a warning, all its links lead somewhere, and nothing of it comes from another host."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from engines.registry import all_targets
from helpers import ROOT
from scripts import site_pages, target_pages

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")


class Page(HTMLParser):
    """What a page links to, what it loads, where it can be linked to, and its paragraphs' texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loads += [values[name] for name in ("src", "href") if name in values and tag not in ("a", "base")]
        if tag in ("p", "li", "code", "pre"):
            self.inside.append(tag)
        if tag == "p":
            self.texts.append("")
        if "doc-heading" in values.get("class", ""):
            self.headings.append(values["id"])

    def handle_endtag(self, tag: str) -> None:
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "p" in self.inside and not {"code", "pre"} & set(self.inside):
            self.texts[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it."""
    recipe = re.search(
        r"^\t(?:\w+=\S+ )?\$\(BIN\)/python -m (mkdocs build .*)$", (ROOT / "Makefile").read_text("utf-8"), re.M
    )
    assert recipe is not None and "--strict" in recipe[1]
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", *recipe[1].split(), "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_document_result_and_target_is_a_page_that_the_navigation_names(pages: dict[Path, Page]) -> None:
    (site,) = {path.parent for path in pages if path.name == "index.html"}
    expected = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    expected |= {f"results/{path.stem}.html" for path in (ROOT / site_pages.RESULTS).glob("*.md")}
    expected |= {f"targets/{target.name}.html" for target in all_targets()}
    expected |= {"index.html", "contributing.html", "changelog.html"}
    assert len(expected) > 60
    found = {path.relative_to(site).as_posix() for path in pages}
    assert expected <= found
    # From the tabs on, by links that every page has, all pages are reached.
    reached, front = set[Path](), {site / "index.html"}
    while front:
        reached |= front
        front = {there for path in front for there, _ in internal(path, pages[path])} & pages.keys() - reached
    assert pages.keys() - reached == {site / "404.html"}


def internal(path: Path, page: Page) -> Iterator[tuple[Path, str]]:
    """Files that a page links to, with the anchors in them."""
    for link in page.links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc and not parts.path.startswith("/"):
            yield (path.parent / unquote(parts.path)).resolve() if parts.path else path, unquote(parts.fragment)


def test_links_lead_to_pages_and_to_places_in_them(pages: dict[Path, Page]) -> None:
    broken, num_anchors = [], 0
    for path, page in pages.items():
        for there, anchor in internal(path, page):
            num_anchors += bool(anchor)
            target = there / "index.html" if there.is_dir() else there
            if not target.is_file() or (anchor and target in pages and anchor not in {*pages[target].ids, "__top"}):
                broken.append((path.name, there.name, anchor))
    assert broken == []
    assert num_anchors > 500


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert {load for page in pages.values() for load in page.loads if urlsplit(load).netloc} == set()
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles and not [style for style in styles if re.search(r"url\([\"']?(https?:)?//|@import", style)]


def test_what_github_shows_as_a_list_or_a_table_is_one_here(pages: dict[Path, Page]) -> None:
    """Both dialects of Markdown differ in what has to stand before lists and tables, and in links with brackets."""
    raw = re.compile(r"\n\s*(- |\* |\d+\. |\|)|^\||\]\(|\*\*|:::|```")
    assert [(path.name, text[:80]) for path, page in pages.items() for text in page.texts if raw.search(text)] == []


@pytest.mark.parametrize("place", site_pages.reference())
def test_every_public_name_has_its_docstring(place: str, site: Path, pages: dict[Path, Page]) -> None:
    module = place.removeprefix("reference/").removesuffix(".md")
    names = {name for name in importlib.import_module(module).__all__ if name not in ("__version__", "errors")}
    page = pages[site / f"reference/{module}.html"]
    assert names and {f"{module}.{name}" for name in names} <= page.ids


def test_the_page_of_a_target_says_what_its_registry_and_the_results_say() -> None:
    pages = target_pages.target_pages()
    text = pages["targets/ort-cpu-int4.md"]
    for words in ("4-bit decoder", "`--kernels own`", "| int4, block 128 |", "| `qwen3-vl-2b` | graphs", "run here"):
        assert words in text
    assert "only by name" not in text and "only by name" in pages["targets/ort-cpu-fp32.md"]
    text = pages["targets/trt-rtx-int4.md"]
    assert "needs a GPU to run" in text and "SM 8.0, 8.6, 8.9, 12.0, 12.1" in text and "2,526.6 MB" in text
    assert (
        "--calibration FOLDER" in pages["targets/trt-fp8.md"]
        and "on the GPU that runs it" in pages["targets/trt-fp8.md"]
    )
    assert "| `model.language_model.layers.[01].*` | float16 |" in pages["targets/trt-fp8.md"]
    assert "answers as on the CPU" in pages["targets/ort-cuda-fp16.md"]


@pytest.mark.parametrize(
    ("markdown", "page", "expected"),
    [
        ("[a](docs/serving.md#x)", "index.md", "[a](serving.md#x)"),
        ("[a](../CONTRIBUTING.md)", "targets.md", "[a](contributing.md)"),
        ("![a](../benchmarks/results/speed.svg)", "benchmarks.md", "![a](results/speed.svg)"),
        ("[a](../../docs/demo.md)", "results/import.md", "[a](../demo.md)"),
        ("[a](../configs/tolerances.toml), [`b`](../LICENSE)", "demo.md", "`a`, `b`"),
        ("[a](https://x.org/y.md) [b](#c)", "demo.md", "[a](https://x.org/y.md) [b](#c)"),
        ("```md\n[a](../LICENSE)\n```", "demo.md", "```md\n[a](../LICENSE)\n```"),
    ],
)
def test_links_of_the_checkout_become_those_of_the_site(markdown: str, page: str, expected: str) -> None:
    assert site_pages.linked(markdown, page) == expected
