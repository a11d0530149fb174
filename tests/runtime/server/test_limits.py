"""Limits on bodies, headers, connections and time, against clients that are slow, rude or gone."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from helpers.http_server import Client, data_url, running, shown, until
from helpers.serving import serving
from helpers.sliding_reference import windowed
from runtime.input_kinds.image import Image
from runtime.machine import default_threads
from runtime.model import Qwen3VLModel
from runtime.sliding_window import SlidingWindow

_LONG = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3000, "ignore_eos": True}


def received(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    found = b""
    try:
        while block := connection.recv(1 << 16):
            found += block
    except ConnectionResetError:
        pass
    return found


def error_in(response: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_body_that_is_too_long(opened: Qwen3VLModel) -> None:
    with running(serving(opened), max_body_bytes=10_000) as client:
        answered = client.chat("x" * 20_000)
        assert answered.status == 413 and answered.error["code"] == "body_too_large"
        assert "10000 bytes" in answered.error["message"] and "--max-body" in answered.error["message"]
        # Without a length, in chunks, and more than any buffer holds: the client still reads why.
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with client.connect() as connection:
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(400):
                connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 413"
        with client.connect() as connection:  # a length that would be 1 GB, of which nothing comes
            connection.sendall(head + b"content-length: 1000000000\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 413"
        assert client.chat("Hi").status == 200


def test_all_bodies_together(opened: Qwen3VLModel) -> None:
    model = serving(opened)
    with running(model, max_bodies_bytes=20_000) as client:
        long = {**_LONG, "user": "x" * 15_000}
        with client.begin(long):
            until(lambda: model.statistics()["running"] == 1)
            refused = client.ask("/v1/chat/completions", {**_LONG, "max_tokens": 1, "user": "x" * 15_000})
            assert refused.status == 429 and "retry-after" in refused.headers
            assert client.chat("Hi").status == 200
        until(lambda: model.statistics()["running"] == 0)
        assert client.ask("/v1/chat/completions", {**_LONG, "max_tokens": 1, "user": "x" * 15_000}).status == 200


def test_a_body_that_does_not_come(opened: Qwen3VLModel) -> None:
    with running(serving(opened), body_timeout_s=0.2) as client, client.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        status, error = error_in(received(connection))
        assert status == 408 and "not complete after 0.2 s" in error["message"]


def test_a_body_that_does_not_come_takes_nobodys_place(opened: Qwen3VLModel) -> None:
    with running(serving(opened), max_requests=1) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with client.connect() as connection:
            connection.sendall(head + b"content-length: 100\r\n\r\n{")
            until(lambda: b"connections 2.0" in client.ask("/metrics").content)
            assert client.chat("Hi").status == 200


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: local"])
def test_a_connection_without_a_request_is_closed(opened: Qwen3VLModel, sent: bytes) -> None:
    with running(serving(opened), idle_timeout_s=0.2) as client:
        with client.connect() as connection:
            connection.sendall(sent)
            response = received(connection)
        assert response == b"" or error_in(response)[0] == 408
        with client.connect() as connection:  # one that was used is closed, too, but not while it is
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert received(connection).startswith(b"HTTP/1.1 200")
        assert client.ask("/v1/chat/completions", {**_LONG, "max_tokens": 500}).status == 200


def test_more_connections_than_may_be(opened: Qwen3VLModel) -> None:
    with running(serving(opened), max_connections=8) as client:
        idle = [client.connect() for _ in range(40)]
        try:
            assert client.chat("Hi").status == 200, "the longest idle ones made room"
            until(lambda: sum(_is_closed(each) for each in idle) >= 32)
        finally:
            for each in idle:
                each.close()


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50,
    ],
    ids=["header", "path", "text", "no host", "two hosts", "length", "tls"],
)
def test_what_is_no_http(client: Client, head: bytes) -> None:
    with client.connect() as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        status, error = error_in(received(connection))
    assert status == 400 and "Remedy: " in error["message"]
    assert client.ask("/health").status == 200


def test_a_client_that_goes_frees_its_place(opened: Qwen3VLModel) -> None:
    model = serving(opened)
    with running(model) as client:
        for body in (_LONG, {**_LONG, "stream": True}, {**_LONG, "stream": True, "n": 3, "temperature": 1}):
            before = model.statistics()["requests"]["cancelled"]
            connection = client.begin(body)
            until(lambda: model.statistics()["running"] >= 1)
            if body.get("stream"):
                assert connection.recv(1)
            connection.close()
            until(lambda: model.statistics()["running"] == 0)
            assert model.statistics()["requests"]["cancelled"] > before
        with client.connect() as connection:  # one that goes while it sends
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: 100\r\n\r\n{")
        until(lambda: _gone(client) == 4)


def test_a_reader_that_takes_nothing_is_dropped(opened: Qwen3VLModel) -> None:
    model = serving(opened)
    with running(model, write_timeout_s=0.3) as client:
        # Bytes of the stream that neither the kernel's buffers nor the server's hold.
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", client.port))
        data = json.dumps({**_LONG, "stream": True, "n": 16, "temperature": 0}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: 'status="499"' in client.ask("/metrics").content.decode())
        assert model.statistics()["running"] == 0
        connection.close()


def test_an_answer_that_takes_too_long(opened: Qwen3VLModel) -> None:
    with running(serving(opened), request_timeout_s=0.05) as client:
        answered = client.ask("/v1/chat/completions", _LONG)
        assert answered.status == 504 and answered.error["code"] == "deadline_exceeded"
        assert "timeout_s" not in answered.error["message"]


def test_a_limit_on_answers(opened: Qwen3VLModel) -> None:
    with running(serving(opened), max_answer_tokens=5) as client:
        assert client.chat("Hi", max_tokens=6).status == 400
        assert client.chat("Hi", ignore_eos=True).json["usage"]["completion_tokens"] == 5


def test_an_answer_without_a_limit_is_no_longer_than_a_window(opened: Qwen3VLModel) -> None:
    with running(windowed(opened, SlidingWindow(64))) as client:
        assert client.chat("Hi", ignore_eos=True).json["usage"]["completion_tokens"] == 64
        assert client.chat("Hi", ignore_eos=True, max_tokens=100).json["usage"]["completion_tokens"] == 100


def test_what_a_proxy_says_of_addresses_changes_no_connection(opened: Qwen3VLModel) -> None:
    with running(serving(opened), idle_timeout_s=0.3) as client:
        headers = {"x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9"}
        body = {**_LONG, "max_tokens": 1500}
        answered = client.ask("/v1/chat/completions", body, headers=headers)
        assert answered.status == 200, "an answer that takes longer than a connection may be idle"


def test_figures_do_not_grow_with_what_is_asked(client: Client) -> None:
    def series() -> int:
        return client.ask("/metrics").content.count(b"http_responses_total{")

    client.ask("/first")
    before = series()
    for number in range(30):
        client.ask(f"/x{number}")
        client.ask(f"/y{number}", method="OPTIONS", headers={"access-control-request-method": "POST"})
        client.ask(f"/z{number}", headers={"host": "evil.example"})
    assert series() <= before + 3


def test_probes_and_the_form_for_proxies(client: Client) -> None:
    for path in ("/health", "/ready", "/"):
        answered = client.ask(path, method="HEAD")
        assert (answered.status, answered.content) == (200, b"")
    with client.connect() as connection:
        connection.sendall(b"GET http://localhost/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 200")
    assert client.ask("/health", method="A" * 1000).status == 405


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions", "choices"])
def test_pictures_hold_up_no_texts_and_end_with_their_client(
    opened: Qwen3VLModel, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_go_on, ended = threading.Event(), threading.Event(), threading.Semaphore(0)
    process = Image.process

    def slow(kind: Image, source: Any, *arguments: Any) -> Any:
        reading.set()
        assert may_go_on.wait(60)
        ended.release()
        return process(kind, source, *arguments)

    monkeypatch.setattr(Image, "process", slow)
    model = serving(opened)
    with running(model) as client:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": shown("x", *[data_url()] * 3)}]}
        if path == "choices":
            path, body = "/v1/chat/completions", {**body, "n": 2, "temperature": 1}
        connections = [client.begin(body, path) for _ in range(40)]
        assert reading.wait(60)
        assert client.chat("Hi").status == 200 and client.ask("/tokenize", {"prompt": "Hi"}).status == 200
        for each in connections:
            each.close()
        until(lambda: client.ask("/metrics").content.count(b'status="499"') == 1 and _gone(client) == 40)
        may_go_on.set()
        until(lambda: model.statistics()["waiting"] == 0)
        assert client.chat("Hi").status == 200
    most = 2 * default_threads() ** 2  # turns, and pictures of a turn that are read at once
    assert sum(ended.acquire(blocking=False) for _ in range(200)) <= most, "what was being read, and no more"


def _gone(client: Client) -> float:
    lines = client.ask("/metrics").content.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if 'status="499"' in line)
