"""The page for all: axe-core finds no barrier, in light and dark, on small windows and in every state of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers import PICTURES
from helpers.browser import axe_script, drop, opened_page
from helpers.stand_in_server import Exchange, StandIn

# In a browser, with a stand-in server; test_page_engine.py and test_page_answers.py run always.
pytestmark = pytest.mark.slow

NARROWEST = 360  # pixels
_VIOLATIONS = """async () => {
  const rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
  const { violations } = await axe.run(document, { runOnly: rules });
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map((each) => each.html).join(" ")}`);
}"""
_OUTSIDE = """(most) => {
  const all = [...document.querySelectorAll("button, input, select, textarea, summary")];
  return all.filter((each) => {
    const { left, right, width } = each.getBoundingClientRect();
    return width && (left < 0 || right > most);
  }).map((each) => each.id || each.textContent);
}"""


@pytest.fixture(scope="module")
def axe() -> str:
    return axe_script()


@pytest.fixture
def server(started: StandIn) -> StandIn:
    started.reset()
    started.answer = thoughtful
    return started


def thoughtful(exchange: Exchange) -> None:
    """Answer with all that the page can show."""
    exchange.begin_stream()
    exchange.say("Let me see.", key="reasoning_content")
    exchange.say("A digit, and " + "averylongwordthatdoesnotfit" * 4)
    exchange.end(
        boxes=[{"label": "digit", "box": [10, 10, 80, 80], "image": 0}],
        points=[{"label": "", "point": [90, 20], "image": 0}],
        usage={"prompt_tokens": 90, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3}},
    )


def fill(page: Any, server: StandIn) -> Iterator[str]:
    """Bring the page into one state after the other, and name it."""
    yield "empty"
    drop(page, PICTURES / "held_out_1.png", PICTURES / "held_out_3.png")
    page.get_by_role("button", name="Remove held_out_3.png").wait_for()
    question = page.get_by_label("Question", exact=True)
    question.fill("What is it?")
    yield "asked"
    question.press("Enter")
    page.locator("svg text").first.wait_for()
    page.get_by_text("Thoughts").click()
    page.locator("summary", has_text="Settings").click()
    yield "answered"
    server.key = "secret-1"
    question.fill("And?")
    question.press("Enter")
    page.locator("#key-form").wait_for()
    page.get_by_role("alert").get_by_text("The server wants an API key.").wait_for()
    yield "refused"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barriers_are_found(browser: Any, server: StandIn, axe: str, scheme: str) -> None:
    with opened_page(browser, server.url, color_scheme=scheme, bypass_csp=True) as page:
        page.evaluate(axe)
        for state in fill(page, server):
            assert page.evaluate(_VIOLATIONS) == [], state


def test_barriers_would_be_found(browser: Any, server: StandIn, axe: str) -> None:
    with opened_page(browser, server.url, bypass_csp=True) as page:
        page.evaluate(axe)
        page.add_style_tag(content="#invitation { color: #bbb }")
        page.evaluate("document.querySelector('label[for=model]').remove()")
        found = [each.partition(":")[0] for each in page.evaluate(_VIOLATIONS)]
    assert {"color-contrast", "select-name"} <= set(found)


def test_nothing_is_wider_than_a_small_window(browser: Any, server: StandIn) -> None:
    with opened_page(browser, server.url) as page:
        page.set_viewport_size({"width": NARROWEST, "height": 640})
        for state in fill(page, server):
            assert page.evaluate("document.documentElement.scrollWidth") <= NARROWEST, state
            assert page.evaluate(_OUTSIDE, NARROWEST) == [], state


def test_nothing_moves_where_that_is_not_wanted(browser: Any, server: StandIn) -> None:
    """`opened_page` asks for reduced motion; without, the end of an answer that grows blinks."""
    name = """() => {
      document.querySelector("#turns").innerHTML = '<p class="growing"></p>';
      return getComputedStyle(document.querySelector(".growing"), "::after").animationName;
    }"""
    with opened_page(browser, server.url) as page:
        assert page.evaluate(name) == "none"
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate(name) == "blink"
