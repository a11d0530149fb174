"""The page that reports are: it escapes what it quotes, asks no network, and is read in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.browser import axe_script, opened_browser, opened_page
from qwen3vl_export.reports.elements import element
from qwen3vl_export.reports.page import (
    MAX_BYTES,
    Card,
    Cell,
    Page,
    Section,
    Tone,
    facts,
    figure,
    folded,
    paragraph,
    picture,
    table,
)
from runtime.errors import UsageError

HOSTILE = '<script>alert("&amp;")</script><img src=http://127.0.0.1:9/x>\x1b[31m\u202e'
# One pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cfc0f01f00050001ff"
    "89993d1d0000000049454e44ae426082"
)


def page() -> Page:
    rows = [
        ("a", Cell("1.0", Tone.GOOD)),
        (HOSTILE, Cell("2.0", Tone.BAD)),
        ("hot", Cell("3.0", heat=1.5)),
        ("cold", Cell("4.0", heat=0.25)),
    ]
    parts = [
        paragraph(HOSTILE, " and ", element("code", "code"), " after"),
        table(
            ["name", "value"],
            rows,
            caption="A table of figures, each beside its name, and with some words more",
            numbers=["value"],
        ),
        figure(picture(PNG, "image/png", "a dot", width=1), "An image"),
        folded("More", facts({"processor": "Abacus"})),
    ]
    cards = [Card("TTFT", "12 ms", "p50"), Card("checks", "9 of 9", tone=Tone.GOOD), Card("x", HOSTILE, tone=Tone.BAD)]
    return Page(f"Report {HOSTILE}", "All is well.", cards, [Section("First", parts), Section(HOSTILE, [])], Tone.GOOD)


def test_a_text_stays_a_text_wherever_it_stands() -> None:
    text = page().render()
    assert text.startswith('<!doctype html>\n<html lang="en">') and len(text.encode()) < MAX_BYTES
    assert "<script" not in text and "<img src=http" not in text and "\x1b" not in text and "\u202e" not in text
    assert text.count("&lt;script&gt;") == 6, "title, two headings, card, paragraph, cell"
    assert 'style="--heat: 1.000"' in text and 'class="number heat" style="--heat: 0.250"' in text
    assert "\\x1b[31m\\u202e" in text


def test_attributes_of_elements() -> None:
    made = element("text", "a", element("b"), "c", "d", None, class_="x", text_anchor="end", x=12.50001, y=3, z=None)
    assert made.attrib == {"class": "x", "text-anchor": "end", "x": "12.5", "y": "3"}
    assert made.text == "a" and made[0].tail == "cd" and len(made) == 1


def test_a_row_has_as_many_cells_as_there_are_headers() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["1"]], caption="")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        page().write(tmp_path / "file" / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_reads_it(tmp_path: Path, scheme: str, width: int) -> None:
    file = tmp_path / "report.html"
    page().write(file)
    with (
        opened_browser() as browser,
        opened_page(browser, file.as_uri(), color_scheme=scheme, bypass_csp=True) as opened,
    ):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.title().startswith("Report <script>")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll"
        assert opened.evaluate("document.querySelector('caption').getBoundingClientRect().right") <= width
        assert opened.evaluate("document.scripts.length") == 0
        opened.get_by_text("More", exact=True).click()
        assert opened.get_by_text("Abacus").is_visible()
        opened.evaluate(axe_script())
        found = opened.evaluate("axe.run()")["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


def test_nothing_is_fetched_even_if_it_is_asked_for(tmp_path: Path) -> None:
    """The policy of the page, not only what reports hold, keeps it from the network."""
    file = tmp_path / "report.html"
    Page("Title", "Lead", [], [Section("S", [element("img", src="http://127.0.0.1:9/x.png", alt="none")])]).write(file)
    with opened_browser() as browser:
        opened = browser.new_context().new_page()
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.goto(file.as_uri())
        opened.wait_for_load_state("networkidle")
        assert len(said) == 1 and "Content Security Policy" in said[0], said
