"""What goes wrong, as the page says it, and what becomes of the question."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.browser import drop
from helpers.http_server import data_url
from helpers.page import PICTURE, ask, ended, figures_of, text_of
from helpers.stand_in_server import Exchange, StandIn, chunk, error_body

# In a browser, with a stand-in server; test_page_engine.py and test_page_answers.py run always.
pytestmark = pytest.mark.slow


def refused(exchange: Exchange) -> None:
    exchange.reply(error_body("the picture is broken. Remedy: send another"), 400)


def overloaded(exchange: Exchange) -> None:
    exchange.reply(error_body("too many requests"), 429, retry_after="7")


def proxy(exchange: Exchange) -> None:
    exchange.reply(b"<html>Bad gateway", 502)


def failed_at_once(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.send(chunk(error_body("the engine failed")))


def silent(exchange: Exchange) -> None:
    exchange.begin_stream()


def nonsense(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.send(b"data: {nonsense\n\n")


SAID = {
    refused: "The picture is broken. Remedy: send another.",
    overloaded: "Too many requests. Try again in 7 s.",
    proxy: "The server answers with status 502 and does not say why.",
    failed_at_once: "The engine failed.",
    silent: "The connection ended before the answer did. Ask again; if that repeats, look at the server’s log.",
    nonsense: "The server sent something that is no chunk of an answer. Look at its log.",
}


def test_an_error_is_said_and_the_question_comes_back(page: Any, server: StandIn) -> None:
    drop(page, PICTURE)
    page.get_by_label("Question", exact=True).fill("What?")
    again = page.get_by_role("button", name="Ask", exact=True)
    alert = page.get_by_role("alert")
    for answer, message in SAID.items():
        server.answer = answer
        again.click()
        alert.get_by_text(message).wait_for()
        assert alert.locator("p").evaluate("(each) => each.firstChild.textContent") == message
        assert page.locator(".turn").count() == 0
        again = alert.get_by_role("button", name="Try again")
    server.reset()
    again.click()
    assert text_of(ended(page)) == "Hello, you."
    assert alert.text_content() == ""
    part = {"type": "image_url", "image_url": {"url": data_url(PICTURE)}}
    content = [part, {"type": "text", "text": "What?"}]
    assert server.exchanges[0].body["messages"] == [{"role": "user", "content": content}]


def test_an_answer_that_breaks_off_stays(page: Any, server: StandIn) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("One, two,")
        exchange.send(chunk(error_body("the engine failed")))

    server.answer = answer
    ask(page, "Count.")
    page.get_by_role("alert").get_by_text("The engine failed.").wait_for()
    answered = ended(page)
    assert text_of(answered) == "One, two," and figures_of(answered)["Ended"] == "broken off"


def test_a_server_that_is_gone(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page, "What?")
    page.get_by_role("alert").get_by_text("The server cannot be reached, or hung up before it answered.").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == "What?"


def test_no_question(page: Any, server: StandIn) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("alert").get_by_text("There is no question yet. Write one, then ask.").wait_for()
    assert server.exchanges == []


def test_the_api_key_is_asked_for_and_kept_in_the_tab(page: Any, server: StandIn) -> None:
    server.key = "secret-1"
    ask(page, "What?")
    field = page.get_by_label("API key", exact=True)
    for key, said in (
        ("wrong", "The server wants an API key."),
        ("secret-1", "The server does not take this API key."),
    ):
        page.get_by_role("alert").get_by_text(said).wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        field.fill(key)
        field.press("Enter")
    assert text_of(ended(page)) == "Hello, you."  # what was asked is asked again
    assert page.locator("#key-form").is_hidden() and field.input_value() == ""
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert "secret-1" not in page.content()
    page.reload()
    ask(page, "Again?")
    ended(page)
    assert server.exchanges[-1].key == "Bearer secret-1"
