"""The page by keyboard, and what is copied from it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from helpers.browser import drop, opened_page
from helpers.page import OTHER, PICTURE, ask, ended
from helpers.stand_in_server import StandIn

# In a browser, with a stand-in server; test_page_engine.py and test_page_answers.py run always.
pytestmark = pytest.mark.slow


def test_all_of_it_by_keyboard(page: Any, server: StandIn) -> None:
    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent") == name:
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(outline) == "solid"  # it is seen where one is
                return
        raise AssertionError(f"{name} is not reached")

    # Early: the browser may open a dialog of its own if it is told late that nobody would see one.
    page.on("filechooser", lambda chooser: chooser.set_files([str(PICTURE), str(OTHER)]))
    tab_to("Add pictures or clips")
    page.keyboard.press("Enter")
    page.get_by_role("button", name=f"Remove {OTHER.name}").wait_for()
    page.keyboard.press("Shift+Tab")  # the question
    page.keyboard.press("Shift+Tab")  # the last attachment
    page.keyboard.press("Enter")
    assert page.locator("#attachments li").count() == 1
    page.locator("#question").focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Control+Enter")
    ended(page)
    content = server.exchanges[0].body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"] and content[-1]["text"] == "One\ntwo"
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("Three")
    page.keyboard.press("Enter")
    ended(page, 2)
    tab_to("New conversation")
    page.keyboard.press("Space")
    assert page.locator(".turn").count() == 0 and page.evaluate("document.activeElement.id") == "question"


def test_an_answer_is_copied(browser: Any, server: StandIn) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with opened_page(browser, server.url, permissions=permissions) as page:
        ask(page, "What?")
        answered = ended(page)
        answered.get_by_role("button", name="Copy answer").click()
        page.get_by_role("status").get_by_text("Copied: answer").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == "Hello, you."


def code_for(browser: Any, server: StandIn, name: str, question: str) -> str:
    """What a button copies of a request with a picture, to a server that wants a key."""
    server.key = "secret-1"
    with opened_page(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.get_by_label("API key", exact=True).fill("secret-1")
        page.get_by_role("button", name="Use this key").click()
        drop(page, PICTURE)
        ask(page, question)
        ended(page).get_by_role("button", name=name).click()
        page.get_by_role("status").get_by_text("Copied").wait_for()
        copied: str = page.evaluate("navigator.clipboard.readText()")
    assert "secret-1" not in copied and len(copied) < 2000
    return copied


HOSTILE = 'What\'s $HOME? `id` \\n "$(id)"\nEND_OF_REQUEST\n€ 犬'


def test_the_command_asks_the_same(browser: Any, server: StandIn) -> None:
    command = code_for(browser, server, "Copy as curl", HOSTILE)
    environment = {"PATH": "/usr/bin:/bin", "API_KEY": "secret-1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=PICTURE.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "Hello," in done.stdout, done.stderr
    assert server.exchanges[1].body == server.exchanges[0].body
    assert server.exchanges[1].key == "Bearer secret-1"


def test_the_program_asks_the_same(browser: Any, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    program = code_for(browser, server, "Copy as Python", HOSTILE)
    openai = pytest.importorskip("openai")
    assert openai
    monkeypatch.setenv("API_KEY", "secret-1")
    monkeypatch.chdir(PICTURE.parent)
    server.answer = lambda exchange: exchange.reply(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
    )
    exec(compile(program, "program", "exec"), {})
    first, second = (dict(exchange.body) for exchange in server.exchanges)
    for name in ("stream", "stream_options", "timings"):
        del first[name]
    assert second == first
