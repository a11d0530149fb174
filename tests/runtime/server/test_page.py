"""The page in a real Chromium, with a server that answers as each test tells it to."""

from __future__ import annotations

import base64
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import PICTURES
from helpers.browser import drop, opened_browser, opened_page
from helpers.stand_in_server import Exchange, StandIn, chunk, error_body, stand_in

PICTURE = PICTURES / "held_out_1.png"  # 173 x 119 pixels
OTHER = PICTURES / "held_out_6.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as found:
        yield found


@pytest.fixture(scope="module")
def started() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


@pytest.fixture
def server(started: StandIn) -> StandIn:
    started.reset()
    return started


@pytest.fixture
def page(browser: Any, server: StandIn) -> Iterator[Any]:
    with opened_page(browser, server.url) as found:
        yield found


def ask(page: Any, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def ended(page: Any, number: int = 1) -> Any:
    """The answer with this number, when it has ended."""
    answer = page.locator(".answer").nth(number - 1)
    answer.locator(".tools").wait_for()
    return answer


def text_of(answer: Any) -> str:
    text: str = answer.locator("> .text").evaluate("(each) => each.textContent")
    return text


def figures_of(answer: Any) -> dict[str, str]:
    return dict(zip(answer.locator("dt").all_text_contents(), answer.locator("dd").all_text_contents(), strict=True))


def data_url(path: Path, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# What is asked


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
        drop(page, tmp_path / name, svg="image/svg+xml", txt="text/plain")
        page.get_by_role("alert").get_by_text(f"{name} {message}").wait_for()
    assert page.locator("#attachments li").count() == 0


# Answers


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


# What goes wrong


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


# By keyboard, and by those who copy


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


# Events out of bytes

_STREAM = (
    "\ufeffdata: eins\r\n\r\n: a comment\ndata: zwei 犬🐕\ndata:zwei\r\rid: 4\nevent: x\n\ndata\n\n"
    "data:  drei\r\n\r\ndata: cut off\n"
)
_EVENTS = ["eins", "zwei 犬🐕\nzwei", "", " drei"]
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
