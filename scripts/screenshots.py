"""Take the pictures of docs/images: the server's page with an answer, reports of verify and bench, a graph.

    python scripts/screenshots.py           # all
    python scripts/screenshots.py page.png  # some of them

It builds the demo engine, and drives a Chromium of the system's with playwright. Figures in the pictures are those of
the machine that took them, so no test compares them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PICTURE = ROOT / "qwen3vl_export" / "demo" / "images" / "held_out_1.png"

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_READY = re.compile(r"http://127\.0\.0\.1:\d+")
_WIDTH, _HEIGHT = 1100, 800


def command(name: str, *arguments: str | Path) -> list[str]:
    """Return the command line of one of the project's commands, in this environment."""
    module = {"qwen3vl": "run", "qwen3vl-export": "export"}[name]
    return [sys.executable, "-m", f"qwen3vl_export.cli.{module}", *map(str, arguments)]


def run(name: str, *arguments: str | Path) -> None:
    """Run one of the project's commands; what it prints is shown if it fails."""
    done = subprocess.run(command(name, *arguments), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


@contextmanager
def served(engine: Path) -> Iterator[str]:
    """Serve an engine on a free port; gives the address of its page."""
    process = subprocess.Popen(
        command("qwen3vl", "serve", engine, "--port", "0"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = next(filter(None, map(_READY.search, process.stdout)), None)
        if found is None:
            sys.exit(f"qwen3vl serve ended with exit code {process.wait()} before it was ready")
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


def page(browser: Any, engine: Path, work: Path, target: Path) -> None:
    """Ask about a picture on the server's page."""
    with served(engine) as url:
        opened = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        opened.goto(url)
        opened.locator("input[type=file]").set_input_files(PICTURE)
        opened.locator("#attachments li").wait_for()
        opened.get_by_label("Question", exact=True).fill("Read the digits.")
        opened.get_by_role("button", name="Ask", exact=True).click()
        opened.locator(".answer .tools").wait_for()
        opened.screenshot(path=target)


def verify(browser: Any, engine: Path, work: Path, target: Path) -> None:
    """Compare the engine with PyTorch."""
    report = work / "verify.html"
    run("qwen3vl", "verify", engine, "--checkpoint", "demo", "--reference", "own", "--html", report)
    _shot(browser, report, target)


def bench(browser: Any, engine: Path, work: Path, target: Path) -> None:
    """Measure the engine at two sizes of a prompt."""
    report = work / "bench.html"
    run("qwen3vl", "bench", engine, "--prompt-tokens", "64,256", "--new-tokens", "32", "--html", report)
    _shot(browser, report, target)


def graph(browser: Any, engine: Path, work: Path, target: Path) -> None:
    """Draw the graphs of the engine."""
    drawing = work / "graph.html"
    run("qwen3vl", "inspect", engine, "--graph", drawing)
    _shot(browser, drawing, target)


def _shot(browser: Any, report: Path, target: Path) -> None:
    opened = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
    opened.goto(report.as_uri())
    opened.screenshot(path=target)


PICTURES: dict[str, Callable[[Any, Path, Path, Path], None]] = {
    "page.png": page,
    "verify.png": verify,
    "bench.png": bench,
    "graph.png": graph,
}


def main(names: list[str]) -> None:
    """Take the pictures that are named, or all."""
    unknown = set(names) - set(PICTURES)
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: unknown; there are {', '.join(PICTURES)}")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        sys.exit(f"error: no browser: install one of {', '.join(_BROWSERS)}")
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        work = Path(folder)
        engine = work / "demo"
        run("qwen3vl-export", "demo", "--target", "ort-cpu-int8", "--output", engine)
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name in names or PICTURES:
            PICTURES[name](browser, engine, work, IMAGES / name)
            print(f"docs/images/{name}: {(IMAGES / name).stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
