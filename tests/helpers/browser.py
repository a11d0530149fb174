"""A real Chromium without a window, which playwright drives; tests are skipped where one of them is missing."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

DROP = """([target, kind, files]) => {
  const transfer = new DataTransfer();
  for (const { name, type, contents } of files) {
    const bytes = Uint8Array.from(atob(contents), (each) => each.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  const names = kind === "paste" ? ["paste"] : ["dragenter", "dragover", "drop"];
  for (const each of names) {
    const options = { bubbles: true, cancelable: true };
    const event = kind === "paste"
      ? new ClipboardEvent(each, { ...options, clipboardData: transfer })
      : new DragEvent(each, { ...options, dataTransfer: transfer });
    document.querySelector(target).dispatchEvent(event);
  }
}"""
"""Drops or pastes files onto an element, as a person would with the mouse."""


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Start Chromium; skips the test without it or without playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def opened_page(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Open a page of its own; what it logs as an error, throws or asks of other hosts fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 900}, reduced_motion="reduce", **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"thrown: {error}"))
    page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
    page.on("request", lambda request: faults.append(request.url) if is_elsewhere(request.url, url) else None)
    page.goto(url)
    yield page
    context.close()
    assert faults == []


def is_fault(message: Any) -> bool:
    """Whether a line of the console tells of a fault of the page; statuses that tests ask for are none."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def is_elsewhere(address: str, url: str) -> bool:
    """Whether an address is of another place than the page's own."""
    return not address.startswith((url, "blob:" + url, "data:"))


def drop(
    page: Any, *paths: Path, kind: str = "drop", target: str = "main", is_taken: bool = True, **types: str
) -> None:
    """Drop or paste files, and wait until they are attached if they are to be; `types` are those of the endings."""
    before = page.locator("#attachments li").count()
    known = {"png": "image/png", "jpg": "image/jpeg", **types}
    files = [
        {
            "name": path.name,
            "type": known.get(path.suffix[1:], ""),
            "contents": base64.b64encode(path.read_bytes()).decode(),
        }
        for path in paths
    ]
    page.evaluate(DROP, [target, kind, files])
    if is_taken:  # they are read one after the other
        least = before + len(paths)
        page.wait_for_function("(n) => document.querySelectorAll('#attachments li').length >= n", arg=least)


def axe_script() -> str:
    """Return the source of axe-core, which finds barriers; skips the test without it."""
    try:
        packed = resources.files("axe_playwright_python") / "axe.min.js"
    except ModuleNotFoundError:
        packed = ROOT / "build" / "node_modules" / "axe-core" / "axe.min.js"
    if not packed.is_file():
        pytest.skip("axe-core is missing: pip install axe-playwright-python, or npm install --prefix build axe-core")
    return packed.read_text(encoding="utf-8")
