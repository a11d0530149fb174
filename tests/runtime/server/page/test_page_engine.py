"""The page with this project's own server and the demo's engine behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import PICTURES
from helpers.browser import drop, opened_page
from helpers.clips import encode, moving
from helpers.http_server import Client, running, until
from helpers.page import ask, ended, figures_of, text_of
from runtime.model import Qwen3VLModel

PICTURE = PICTURES / "held_out_0.png"


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine)


@pytest.fixture(scope="module")
def url(model: Qwen3VLModel) -> Iterator[str]:
    with running(model) as client:
        yield address(client)


def address(client: Client) -> str:
    return f"http://127.0.0.1:{client.port}/"


def answered(page: Any, number: int = 1) -> str:
    return text_of(ended(page, number))


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
        assert figures_of(ended(page))["Visual"] == f"{first.stats.visual_tokens} tokens"
        assert figures_of(ended(page, 2))["Prompt"] == f"{second.stats.prompt_tokens} tokens"
        assert figures_of(ended(page, 2))["From cache"].endswith(", 1 image")
        assert figures_of(ended(page, 2))["Ended"] == "complete"


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
        assert figures_of(ended(page))["Visual"] == f"{own.stats.visual_tokens} tokens"


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
        assert figures_of(ended(page))["Ended"] == "stopped by you"
    until(lambda: model.statistics()["running"] == 0)
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


def test_a_server_with_a_key_lets_the_page_in(browser: Any, demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine)
    with running(model, api_keys=("secret-1",)) as client, opened_page(browser, address(client)) as page:
        page.get_by_label("API key", exact=True).fill("secret-1")
        page.get_by_role("button", name="Use this key").click()
        drop(page, PICTURE)
        ask(page, "Read the digits.")
        assert answered(page) == "1654"


def test_boxes_that_the_server_finds_are_drawn(browser: Any, url: str) -> None:
    """The demo knows no boxes, so it is held to an answer with one."""
    pytest.importorskip("llguidance")
    properties = {"bbox_2d": {"const": [100, 200, 500, 600]}, "label": {"const": "seven"}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "box", "schema": schema}}

    def held(route: Any) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "response_format": form}))

    with opened_page(browser, url) as page:
        page.route("**/v1/chat/completions", held)
        drop(page, PICTURES / "held_out_4.png", PICTURE)
        ask(page, "Where is the 7?")
        figure = ended(page).get_by_role("figure")
        figure.locator("svg rect.over").wait_for()
        assert json.loads(answered(page)) == {"bbox_2d": [100, 200, 500, 600], "label": "seven"}
        # A thousandth each of the last picture's 70 x 105 pixels.
        assert figure.get_by_role("img").get_attribute("alt") == PICTURE.name
        assert figure.get_by_role("listitem").all_text_contents() == ["seven: box from (7, 21) to (35, 63)"]
