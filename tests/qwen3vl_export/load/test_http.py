"""A load over HTTP: what is sent, what is understood of the answers, and what becomes of those that are none."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.chat_server import Asked, ChatServer, answer, chat_server
from qwen3vl_export.load.chunks import read_reply
from qwen3vl_export.load.client import Reply
from qwen3vl_export.load.connections import Address
from qwen3vl_export.load.events import MAX_EVENT_BYTES, MalformedEventError, read_events
from qwen3vl_export.load.generator import Load, Trace, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.report import report_rows, summarise
from qwen3vl_export.load.server import HttpServer
from runtime.errors import OverloadError, RequestError, UsageError

PROMPTS = Prompts(3)


def connected(server: ChatServer, **options: Any) -> HttpServer:
    return HttpServer(Address.parse(server.url), **options)


def ask(server: ChatServer, prompts: Prompts = PROMPTS, new_tokens: int = 4, **options: Any) -> Reply:
    client = connected(server, **options)
    return client.ask(client.prepare(prompts.messages(1), new_tokens))


def offered(server: ChatServer, load: Load) -> Trace:
    return offer(connected(server), PROMPTS, load)


class Numbered:
    """A script that answers, but some requests, by their number, otherwise."""

    def __init__(self, **others: Any) -> None:
        self.others = {int(name.removeprefix("at_")): script for name, script in others.items()}
        self.number = -1
        self.lock = threading.Lock()

    def __call__(self, asked: Asked, body: dict[str, Any]) -> None:
        with self.lock:
            self.number += 1
            script = self.others.get(self.number, answer)
        script(asked, body)


def test_what_a_request_holds() -> None:
    prompts = Prompts(5, (8, 6), shared_words=4)
    with chat_server(answer) as server:
        ask(server, prompts, new_tokens=7)
    (body,) = server.bodies
    system, user = prompts.messages(1)
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "stand-in",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    assert body["messages"][0] == system
    image, text = body["messages"][1]["content"]
    assert text == user["content"][1]
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), user["content"][0]["image"])


def test_times_run_to_the_first_text_and_to_the_last() -> None:
    now = 100.0
    deltas: tuple[tuple[float, dict[str, Any]], ...] = (
        (1.0, {"role": "assistant", "content": ""}),
        (0.5, {"reasoning_content": "hm"}),
        (0.2, {"content": "one"}),
        (0.2, {"content": "two"}),
    )

    def pieces() -> Iterator[bytes]:
        nonlocal now
        for seconds, delta in deltas:
            now += seconds
            yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode()
        now += 3.0
        yield b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}\n\ndata: [DONE]\n\n'

    reply = read_reply(pieces(), 99.0, lambda: now)
    assert reply.ttft_s == pytest.approx(2.5), "the role is no text, thoughts are"
    assert reply.tpot_s == pytest.approx(0.4 / 8), "of 9 tokens, as the usage says, 8 are later ones"
    assert (reply.new_tokens, reply.prompt_tokens, reply.queue_s) == (9, 7, None)


def test_a_load_is_reported_without_what_only_the_server_knows() -> None:
    with chat_server(answer) as server:
        trace = offered(server, Load(3, num_requests=12, new_tokens=5))
    assert len(server.bodies) == 13, "one warms up"
    assert len(server.addresses) <= 4, "a client keeps its connection"
    report = summarise(trace)
    assert (report.offered, report.done, report.new_tokens, report.prompt_tokens) == (12, 12, 60, 12 * 16)
    assert report.cached_tokens == 36 and report.queue_s == {} and report.rss_peak_bytes is None
    assert report.ttft_s["p50"] <= report.latency_s["p50"] and report.batch_size is None
    assert [name for name, _ in report_rows(report)] == ["requests", "speed", "TTFT", "TPOT", "latency", "cache hits"]


def test_requests_arrive_at_a_rate() -> None:
    with chat_server(answer) as server:
        trace = offered(server, Load(8, rate=400.0, num_requests=20))
    assert len(trace.answered) == 20 and all(each.latency_s > 0 for each in trace.answered)


def test_each_request_is_answered_refused_or_failed() -> None:
    def refuse(asked: Asked, body: dict[str, Any]) -> None:
        asked.refuse(429, "the queue is full", Retry_After="0")

    def fail(asked: Asked, body: dict[str, Any]) -> None:
        asked.refuse(500, "broken")

    def cut(asked: Asked, body: dict[str, Any]) -> None:
        asked.begin()
        asked.send_delta(content="word")
        asked.cut()

    def hang_up(asked: Asked, body: dict[str, Any]) -> None:
        asked.cut()

    script = Numbered(at_2=refuse, at_4=fail, at_5=fail, at_6=cut, at_8=refuse, at_9=hang_up)
    with chat_server(script) as server:
        trace = offered(server, Load(1, num_requests=10))
    report = summarise(trace)
    # Who hangs up on a connection that was used before may have closed it in between: it is asked again.
    assert (report.offered, report.done, report.refused, report.failed) == (10, 5, 2, 3)
    assert report.errors == {"HTTP 500: broken": 2, "the answer ended before it was complete": 1}


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([b"data: {\n\n"], "an event is no chunk of a chat completion"),
        ([b"data: []\n\n"], "an event is no chunk of a chat completion"),
        ([b'data: {"choices": [3]}\n\n'], "an event is no chunk of a chat completion"),
        ([b"data: \xff\n\n"], "an event is no chunk of a chat completion"),
        ([b"<html>\n\n"], "a line is no field of an event"),
        ([b'data: {"error": {"message": "no memory"}}\n\n'], "error within the answer: no memory"),
        ([b'data: {"error": "no memory"}\n\n'], "error within the answer: no memory"),
        ([b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"], "the answer has no text"),
        ([b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'], "the answer ended before it was complete"),
    ],
)
def test_answers_that_are_none(events: list[bytes], said: str) -> None:
    def script(asked: Asked, body: dict[str, Any]) -> None:
        asked.begin()
        for event in events:
            asked.send(event)
        asked.wfile.write(b"0\r\n\r\n")

    with chat_server(script) as server, pytest.raises(RequestError) as caught:
        ask(server)
    assert caught.value.message == said and caught.value.remedy


def test_an_answer_that_is_no_stream() -> None:
    def script(asked: Asked, body: dict[str, Any]) -> None:
        asked.send_json(200, {"choices": []})

    with chat_server(script) as server, pytest.raises(RequestError, match="no stream of events"):
        ask(server)


def test_tokens_are_counted_where_the_server_does_not() -> None:
    def script(asked: Asked, body: dict[str, Any]) -> None:
        answer(asked, {**body, "stream_options": {}})

    with chat_server(script) as server:
        client = connected(server)
        reply = client.ask(client.prepare(PROMPTS.messages(1), 6))
        assert (reply.new_tokens, reply.prompt_tokens, reply.cached_tokens) == (6, None, None)
        assert client.tokens_per_word() is None


def test_a_word_has_as_many_tokens_as_the_server_says() -> None:
    with chat_server(answer) as server:
        assert connected(server).tokens_per_word() == 2.0


@pytest.mark.parametrize("status", [400, 422])
def test_fields_that_a_server_refuses_are_left_out_and_told(status: int) -> None:
    def script(asked: Asked, body: dict[str, Any]) -> None:
        if "ignore_eos" in body:
            asked.refuse(status, "Unrecognized request argument", "ignore_eos")
        elif "stream_options" in body:
            asked.refuse(status, "stream_options: extra fields are not permitted")
        else:
            answer(asked, body)

    with chat_server(script) as server:
        client = connected(server)
        for _ in range(2):
            assert client.ask(client.prepare(PROMPTS.messages(1), 6)).new_tokens == 6
    assert client.left_out == ["ignore_eos", "stream_options"]
    assert len(server.bodies) == 4, "they are not tried again"


def test_other_bad_requests_fail() -> None:
    with (
        chat_server(lambda asked, body: asked.refuse(400, "no such model", "model")) as server,
        pytest.raises(RequestError, match="HTTP 400: no such model"),
    ):
        ask(server)


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), ("Fri, 27 Nov 2026 04:00:00 GMT", 1.0), ("-3", 1.0), (None, 1.0)]
)
def test_a_refusal_says_how_long_to_wait(value: str | None, seconds: float) -> None:
    headers = {} if value is None else {"Retry_After": value}
    with (
        chat_server(lambda asked, body: asked.refuse(429, "full", **headers)) as server,
        pytest.raises(OverloadError, match="HTTP 429: full") as caught,
    ):
        ask(server)
    assert caught.value.retry_after_s == seconds


def test_an_error_that_is_no_json_is_quoted() -> None:
    def script(asked: Asked, body: dict[str, Any]) -> None:
        asked.send_json(502, "bad gateway " + 10_000 * "x")

    with chat_server(script) as server, pytest.raises(RequestError, match='HTTP 502: "bad gateway x') as caught:
        ask(server)
    assert len(str(caught.value)) < 400


def test_the_model_and_the_key() -> None:
    with chat_server(answer, models=("one", "two")) as server:
        with pytest.raises(UsageError, match="2 models: one, two"):
            connected(server)
        ask(server, model="two", api_key="secret")
    assert server.bodies[0]["model"] == "two" and server.headers[-1]["Authorization"] == "Bearer secret"


def test_nobody_answers() -> None:
    with chat_server(answer) as server:
        address = Address.parse(server.url)
    with pytest.raises(RequestError, match=r"no connection to http://127\.0\.0\.1") as caught:
        HttpServer(address)
    assert "--url" in str(caught.value.remedy)


def test_a_server_that_is_silent() -> None:
    is_over = threading.Event()
    with chat_server(lambda asked, body: (is_over.wait(10), asked.cut())) as server:  # type: ignore[arg-type, return-value]
        with pytest.raises(RequestError, match=r"sent nothing for 0\.05 s"):
            ask(server, timeout_s=0.05)
        is_over.set()


def test_a_load_that_is_broken_off_does_not_wait_for_answers() -> None:
    is_over = threading.Event()
    has_begun = threading.Event()

    def script(asked: Asked, body: dict[str, Any]) -> None:
        if len(server.bodies) > 1:
            has_begun.set()
            is_over.wait(30)
        answer(asked, body)

    with chat_server(script) as server:
        client = connected(server)
        client.ask(client.prepare(PROMPTS.messages(0), 1))
        errors: list[Exception] = []

        def wait_for_answer() -> None:
            try:
                client.ask(client.prepare(PROMPTS.messages(1), 1))
            except RequestError as error:
                errors.append(error)

        thread = threading.Thread(target=wait_for_answer)
        thread.start()
        assert has_begun.wait(10)
        client.stop()
        thread.join(10)
        assert not thread.is_alive() and len(errors) == 1
        with pytest.raises(RequestError, match="the load was stopped"):
            client.ask(client.prepare(PROMPTS.messages(2), 1))
        is_over.set()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://some.host/a/b/v1", "https://some.host/a/b"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, said: str) -> None:
    assert str(Address.parse(url)) == said


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://u:p@host", "http://h/?a", "http://h:x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="--url") as caught:
        Address.parse(url)
    assert "u:p" not in str(caught.value), "a password is not repeated"


def test_events_may_be_cut_anywhere() -> None:
    stream = b": hello\r\nevent: x\nid: 3\ndata: one\r\ndata:two\r\n\r\n\ndata: three\n\ndata: cut off"
    for size in (1, 2, 3, 7, 1000):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert list(read_events(pieces)) == [b"one\ntwo", b"three"]


def test_events_have_a_bound() -> None:
    with pytest.raises(MalformedEventError, match="longer"):
        list(read_events([b"x" * (1 << 20)] * (MAX_EVENT_BYTES // (1 << 20) + 1)))
