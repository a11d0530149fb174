"""What is asked on the page: questions, pictures, clips, settings, models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.browser import drop, opened_page
from helpers.http_server import data_url
from helpers.page import OTHER, PICTURE, ask, ended, text_of
from helpers.stand_in_server import StandIn

# In a browser, with a stand-in server; test_page_engine.py and test_page_answers.py run always.
pytestmark = pytest.mark.slow


def test_pictures_text_and_settings_reach_the_server(page: Any, server: StandIn) -> None:
    drop(page, PICTURE, OTHER)
    page.locator("summary", has_text="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max visual tokens").fill("256")
    ask(page, "  What is it?\nAnd why? ")
    ended(page)
    pictures = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in (PICTURE, OTHER)]
    assert server.exchanges[0].body == {
        "model": "small",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [*pictures, {"type": "text", "text": "What is it?\nAnd why?"}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "max_visual_tokens": 256,
        "timings": True,
        "boxes": True,
    }
    assert server.exchanges[0].key is None


def test_settings_that_are_empty_are_left_to_the_server(page: Any, server: StandIn) -> None:
    ask(page, "Hello?")
    ended(page)
    body = server.exchanges[0].body
    assert body["messages"] == [{"role": "user", "content": "Hello?"}]
    assert not {"max_completion_tokens", "temperature", "max_visual_tokens"} & body.keys()


def test_earlier_turns_and_their_pictures_are_sent_again(page: Any, server: StandIn) -> None:
    drop(page, PICTURE)
    ask(page, "First?")
    ended(page)
    ask(page, "Second?")
    assert text_of(ended(page, 2)) == "Hello, you."
    part = {"type": "image_url", "image_url": {"url": data_url(PICTURE)}}
    assert server.exchanges[1].body["messages"] == [
        {"role": "user", "content": [part, {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "Hello, you."},
        {"role": "user", "content": "Second?"},
    ]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    ask(page, "Third?")
    ended(page)
    assert server.exchanges[2].body["messages"] == [{"role": "user", "content": "Third?"}]


def test_one_of_several_models_is_chosen(browser: Any, server: StandIn) -> None:
    server.models.append({"id": "large/one", "target": "ort-cpu-int4", "max_model_len": 8192})
    with opened_page(browser, server.url) as page:
        page.get_by_label("Model").select_option("large/one")
        assert page.locator("#model-facts").text_content() == "ort-cpu-int4, context of 8,192 tokens"
        ask(page, "Hello?")
        ended(page)
    assert server.exchanges[0].body["model"] == "large/one"


def test_a_question_waits_for_the_models(page: Any, server: StandIn) -> None:
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    ask(page, "Hello?")
    assert page.get_by_label("Question", exact=True).input_value() == "Hello?" and server.exchanges == []
    held[0].continue_()
    ended(page)
    assert server.exchanges[0].body["model"] == "small"


@pytest.mark.parametrize("models", [b"<html>", b'{"data": []}'])
def test_a_server_without_models(page: Any, server: StandIn, models: bytes) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(body=models))
    page.reload()
    ask(page, "Hello?")
    page.get_by_role("alert").get_by_text("The server names no models. See whether it is").wait_for()
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    ended(page)
    assert server.exchanges[0].body["model"] == "small"


def test_a_number_out_of_range_is_shown_and_not_sent(page: Any, server: StandIn) -> None:
    page.get_by_label("Question", exact=True).fill("Hello?")
    page.locator("#max-tokens").evaluate("(each) => { each.value = '-3' }")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert page.get_by_label("Max tokens").is_visible()  # the settings opened
    assert page.evaluate("document.activeElement.id") == "max-tokens"
    assert server.exchanges == []


# Attachments


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_attachments_are_shown_and_can_be_removed(page: Any, server: StandIn, kind: str) -> None:
    drop(page, PICTURE, OTHER, kind=kind)
    tray = page.get_by_role("list", name="Attached pictures and clips")
    assert tray.locator("li .name").all_text_contents() == [PICTURE.name, OTHER.name]
    page.wait_for_function("() => document.querySelector('#attachments img').naturalWidth === 173")
    page.get_by_role("button", name=f"Remove {PICTURE.name}").click()
    assert page.evaluate("document.activeElement.ariaLabel") == f"Remove {OTHER.name}"
    assert page.locator("#drop-hint").is_hidden()
    ask(page, "What?")
    ended(page)
    (part, _) = server.exchanges[0].body["messages"][0]["content"]
    assert part["image_url"]["url"] == data_url(OTHER)


def test_the_place_to_drop_is_shown_while_files_are_dragged(page: Any) -> None:
    hint = page.locator("#drop-hint")
    move = """(name) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File(["x"], "a.png", { type: "image/png" }));
      document.querySelector("h1").dispatchEvent(new DragEvent(name, { bubbles: true, dataTransfer }));
    }"""
    page.evaluate(move, "dragenter")
    assert hint.is_visible()
    page.evaluate(move, "dragleave")
    assert hint.is_hidden()


def test_files_by_their_endings(page: Any, server: StandIn, tmp_path: Path) -> None:
    """Browsers know no type of HEIC and Matroska, and cannot show them; the server may read them all the same."""
    for name in ("phone.heic", "clip.mkv"):
        (tmp_path / name).write_bytes(b"contents")
    drop(page, tmp_path / "phone.heic", tmp_path / "clip.mkv")
    page.get_by_text("No preview of phone.heic").wait_for()
    ask(page, "What?")
    ended(page)
    (picture, clip, _) = server.exchanges[0].body["messages"][0]["content"]
    assert picture == {"type": "image_url", "image_url": {"url": "data:image/heic;base64,Y29udGVudHM="}}
    assert clip == {"type": "video_url", "video_url": {"url": "data:video/x-matroska;base64,Y29udGVudHM="}}


REFUSED = {
    "notes.txt": (b"text", "is neither a picture nor a clip. Choose a file such as a PNG, JPEG, WebP or MP4."),
    "none.png": (b"", "is empty. Choose another file."),
    "a.svg": (b"<svg/>", "is a drawing in SVG, which models do not take. Save it as PNG first."),
}


def test_files_that_are_no_pictures_are_refused(page: Any, tmp_path: Path) -> None:
    for name, (contents, message) in REFUSED.items():
        (tmp_path / name).write_bytes(contents)
        drop(page, tmp_path / name, is_taken=False, svg="image/svg+xml", txt="text/plain")
        page.get_by_role("alert").get_by_text(f"{name} {message}").wait_for()
    assert page.locator("#attachments li").count() == 0
