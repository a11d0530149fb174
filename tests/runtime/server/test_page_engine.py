"""The page with this project's own server and the demo's engine behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import PICTURES
from helpers.browser import drop, opened_browser, opened_page
from helpers.clips import encode, moving
from runtime.model import Qwen3VLModel

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PICTURE = PICTURES / "held_out_0.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as found:
        yield found


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, max_sequences=2) as found:
        yield found


@contextmanager
def serving(model: Qwen3VLModel, **settings: Any) -> Iterator[str]:
    """Run the server in a thread and return where its page is; the model stays open."""
    from runtime.server.app import create_app
    from runtime.server.engines import Engines, Served
    from runtime.server.run import listen
    from runtime.server.settings import ServerSettings

    chosen = ServerSettings(port=0, **settings)
    app = create_app(Engines([Served("demo", model, chosen)]), chosen)
    listening = listen(chosen)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(model: Qwen3VLModel) -> Iterator[str]:
    with serving(model) as found:
        yield found


def ask(page: Any, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answered(page: Any, number: int = 1) -> str:
    answer = page.locator(".answer").nth(number - 1)
    answer.locator(".tools").wait_for()
    text: str = answer.locator("> .text").evaluate("(each) => each.textContent")
    return text


def figure(page: Any, name: str, number: int = 1) -> str:
    rows = page.locator(".answer").nth(number - 1).locator(".figures div").filter(has_text=name)
    text: str = rows.locator("dd").text_content()
    return text


def test_two_turns_about_a_picture(browser: Any, url: str, model: Qwen3VLModel) -> None:
    chat = model.chat()
    first = chat.ask("Read the digits.", images=[PICTURE])
    second = chat.ask("How many digits are there?")
    assert [first.text, second.text] == ["1654", "4"]
    with opened_page(browser, url) as page:
        assert page.locator("#model-facts").text_content() == f"ort-cpu-fp32, context of {model.max_context:,} tokens"
        drop(page, PICTURE)
        ask(page, "Read the digits.")
        assert answered(page) == first.text
        ask(page, "How many digits are there?")
        assert answered(page, 2) == second.text
        assert figure(page, "Visual") == f"{first.stats.visual_tokens} tokens"
        assert figure(page, "Prompt", 2) == f"{second.stats.prompt_tokens} tokens"
        assert figure(page, "From cache", 2).endswith(", 1 image")
        assert figure(page, "Ended", 2) == "complete"


def test_a_clip(browser: Any, url: str, model: Qwen3VLModel, tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = tmp_path / "clip.webm"
    clip.write_bytes(encode(moving(8), "webm", "libvpx", fps=4))
    part = {"type": "video", "video": str(clip)}
    own = model.generate([{"role": "user", "content": [part, {"type": "text", "text": "Read the digits."}]}])
    with opened_page(browser, url) as page:
        drop(page, clip, webm="video/webm")
        page.wait_for_function("() => document.querySelector('#attachments video')?.videoWidth === 64")
        ask(page, "Read the digits.")
        assert answered(page) == own.text
        assert figure(page, "Visual") == f"{own.stats.visual_tokens} tokens"


def test_stop_frees_the_engine(browser: Any, url: str, model: Qwen3VLModel) -> None:
    def longer(route: Any) -> None:
        """The demo's answers are a few tokens: let this one go on until the context is full."""
        body = {**json.loads(route.request.post_data), "ignore_eos": True, "max_completion_tokens": 900}
        route.continue_(post_data=json.dumps(body))

    before = model.statistics()["generated_tokens"]
    with opened_page(browser, url) as page:
        page.route("**/v1/chat/completions", longer)
        ask(page, "Read the digits.")
        page.wait_for_function("() => document.querySelector('.answer > .text')?.textContent.length > 3")
        assert model.statistics()["running"] == 1
        page.get_by_role("button", name="Stop").click()
        answered(page)
        assert figure(page, "Ended") == "stopped by you"
    deadline = time.monotonic() + 60
    while model.statistics()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert model.statistics()["running"] == 0
    assert model.statistics()["generated_tokens"] - before < 900


def test_an_error_of_the_server_is_shown_in_its_words(browser: Any, url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:60])
    with opened_page(browser, url) as page:
        drop(page, broken)
        ask(page, "Read the digits.")
        alert = page.get_by_role("alert")
        alert.get_by_role("button", name="Try again").wait_for()
        assert "Remedy: " in alert.text_content() and "status" not in alert.text_content()
        page.get_by_role("button", name="Remove broken.png").click()
        drop(page, PICTURE)
        page.get_by_role("button", name="Ask", exact=True).click()
        assert answered(page) == "1654"


def test_a_server_with_a_key_lets_the_page_in(browser: Any, model: Qwen3VLModel) -> None:
    with serving(model, api_keys=("secret-1",)) as url, opened_page(browser, url) as page:
        page.get_by_label("API key", exact=True).fill("secret-1")
        page.get_by_role("button", name="Use this key").click()
        drop(page, PICTURE)
        ask(page, "Read the digits.")
        assert answered(page) == "1654"
