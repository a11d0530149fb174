"""What the page shows of answers: text, thoughts, figures, boxes; and how they are stopped."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from helpers.browser import drop
from helpers.page import OTHER, PICTURE, ask, ended, figures_of, text_of
from helpers.stand_in_server import Exchange, StandIn, chunk


def test_an_answer_is_text_and_comes_piece_by_piece(page: Any, server: StandIn) -> None:
    go_on = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("Let me see <b>…", key="reasoning_content")
        exchange.say("<img src=x onerror=alert(1)>\n  zwei:", " 犬\n")
        assert go_on.wait(30)
        exchange.say("&amp; drei")
        exchange.end()

    server.answer = answer
    ask(page, "What?")
    growing = page.locator(".growing", has_text="犬")
    growing.wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    assert page.locator("#spoken").text_content() == "Asking"  # pieces are not read out one by one
    go_on.set()
    answered = ended(page)
    assert text_of(answered) == "<img src=x onerror=alert(1)>\n  zwei: 犬\n&amp; drei"
    assert answered.get_attribute("aria-busy") == "false"
    assert page.locator("#spoken").text_content() == "Answer: <img src=x onerror=alert(1)>\n  zwei: 犬\n&amp; drei"
    assert answered.locator("> .text").evaluate("(each) => getComputedStyle(each).whiteSpace") == "pre-wrap"
    thoughts = answered.get_by_text("Let me see <b>…")
    assert thoughts.is_hidden()
    answered.get_by_text("Thoughts").click()
    assert thoughts.is_visible()
    ask(page, "And?")
    ended(page, 2)
    assert server.exchanges[1].body["messages"][1]["reasoning_content"] == "Let me see <b>…"


def test_figures_of_the_server(page: Any, server: StandIn) -> None:
    timings = {"ttft_s": 0.2345, "tokens_per_s": 38.24, "prompt_tokens": 1234, "visual_tokens": 256, "new_tokens": 12}
    timings |= {"cached_tokens": 1100, "cached_images": 1}

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("Yes")
        exchange.end("length", timings=timings, usage={"prompt_tokens": 1, "completion_tokens": 1})

    server.answer = answer
    ask(page, "What?")
    assert figures_of(ended(page)) == {
        "Time to first token": "235 ms",
        "Speed": "38.2 tokens/s",
        "Answer": "12 tokens",
        "Prompt": "1,234 tokens",
        "Visual": "256 tokens",
        "From cache": "1,100 tokens, 1 image",
        "Ended": "limit of tokens reached",
    }


def test_figures_of_a_server_that_sends_few(page: Any, server: StandIn) -> None:
    ask(page, "What?")
    figures = figures_of(ended(page))
    assert figures.pop("Time to first token").endswith((" ms", " s"))
    figures.pop("Speed", None)  # two pieces that came together have none
    assert figures == {"Answer": "3 tokens", "Prompt": "9 tokens", "Ended": "complete"}


def test_boxes_and_points_are_drawn_on_their_pictures(page: Any, server: StandIn) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("Here.")
        exchange.end(
            boxes=[{"label": "<i>cup</i>", "box": [17.3, 11.9, 86.5, 59.5], "image": 1}],
            points=[{"label": None, "point": [173, 0], "image": 1}],
        )

    server.answer = answer
    drop(page, OTHER, PICTURE)
    ask(page, "Where?")
    figure = ended(page).get_by_role("figure")
    figure.locator("svg text").first.wait_for()
    assert figure.count() == 1 and figure.get_by_role("img").get_attribute("alt") == PICTURE.name
    assert figure.get_by_role("listitem").all_text_contents() == [
        "<i>cup</i>: box from (17, 12) to (87, 60)",
        "point at (173, 0)",
    ]
    assert figure.locator("svg text").all_text_contents() == ["1 <i>cup</i>", "2"]
    image, box = figure.get_by_role("img").bounding_box(), figure.locator("rect.over").bounding_box()
    scale = image["width"] / 173
    assert image["height"] / 119 == pytest.approx(scale, rel=0.01)
    assert box["x"] - image["x"] == pytest.approx(17.3 * scale, abs=2)  # half of its line is outside
    assert box["y"] - image["y"] == pytest.approx(11.9 * scale, abs=2)
    assert box["width"] == pytest.approx(69.2 * scale, abs=4)
    assert box["height"] == pytest.approx(47.6 * scale, abs=4)
    centre = figure.locator("circle.over").evaluate(
        "(each) => { const at = each.getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2] }"
    )
    assert centre == pytest.approx([image["x"] + image["width"], image["y"]], abs=1)


def test_stop_hangs_up_and_keeps_what_there_is(page: Any, server: StandIn) -> None:
    hung_up = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("One, two,")
        if exchange.is_hung_up(30):
            hung_up.set()

    server.answer = answer
    ask(page, "Count.")
    page.get_by_text("One, two,").wait_for()
    page.get_by_label("Question", exact=True).press("Enter")  # one question at a time
    page.get_by_role("button", name="Stop").click()
    answered = ended(page)
    assert hung_up.wait(30)
    assert text_of(answered) == "One, two," and figures_of(answered)["Ended"] == "stopped by you"
    assert page.evaluate("document.activeElement.id") == "ask"  # the button that Stop became
    server.reset()
    ask(page, "Go on.")
    ended(page, 2)
    assert [message["content"] for message in server.exchanges[0].body["messages"]] == ["Count.", "One, two,", "Go on."]


def test_stopped_before_it_said_anything(page: Any, server: StandIn) -> None:
    hung_up = threading.Event()
    arrived = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        arrived.set()
        if exchange.is_hung_up(30):
            hung_up.set()

    server.answer = answer
    drop(page, PICTURE)
    ask(page, "Count.")
    assert arrived.wait(30)
    page.keyboard.press("Escape")
    page.get_by_role("button", name=f"Remove {PICTURE.name}").wait_for()
    assert hung_up.wait(30)
    assert page.get_by_label("Question", exact=True).input_value() == "Count."
    assert page.locator(".turn").count() == 0 and page.get_by_role("alert").text_content() == ""


def test_a_new_conversation_stops_the_answer(page: Any, server: StandIn) -> None:
    hung_up = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.say("One, two,")
        if exchange.is_hung_up(30):
            hung_up.set()

    server.answer = answer
    ask(page, "Count.")
    page.get_by_text("One, two,").wait_for()
    page.get_by_role("button", name="New conversation").click()
    assert hung_up.wait(30)
    server.reset()
    ask(page, "Hello?")
    assert text_of(ended(page)) == "Hello, you."
    assert page.locator(".turn").count() == 1


# Events out of bytes

_STREAM = (
    "\ufeffdata: eins\r\n\r\n: a comment\ndata: zwei 犬🐕\ndata:zwei\r\rid: 4\nevent: x\n\ndata\n\n"
    "data:  drei\r\ndata: vier\r\n\r\ndata: cut off\n"
)
_EVENTS = ["eins", "zwei 犬🐕\nzwei", "", " drei\nvier"]
_READ = """async ([bytes, size]) => {
  const { eventsOf } = await import("/page/events.js");
  const all = Uint8Array.from(bytes);
  let start = 0;
  const body = new ReadableStream({
    pull(controller) {
      if (start >= all.length) return controller.close();
      controller.enqueue(all.slice(start, start + size));
      start += size;
    },
  });
  const found = [];
  for await (const each of eventsOf(body)) found.push(each);
  return found;
}"""


def test_events_are_found_wherever_bytes_are_cut(page: Any) -> None:
    for size in (1, 2, 3, 5, 7, 1000):
        assert page.evaluate(_READ, [list(_STREAM.encode()), size]) == _EVENTS, size


def test_a_stream_in_bytes_of_one(page: Any, server: StandIn) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        body = chunk({"choices": [{"index": 0, "delta": {"content": "犬 ist ein Hund"}}]}) + b"data: [DONE]\r\n\r\n"
        for byte in body:
            exchange.send(bytes([byte]))

    server.answer = answer
    ask(page, "What?")
    assert text_of(ended(page)) == "犬 ist ein Hund"
