"""A server that speaks as much of the API as the page asks for, and answers as a test tells it to."""

from __future__ import annotations

import json
import mimetypes
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers import ROOT

PAGE = ROOT / "runtime" / "server" / "page"
POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:"
"""Nothing from elsewhere, and no scripts and styles inside the HTML."""


class Exchange:
    """One request for an answer.

    Args:
        handler: Of the connection.
        body: What was sent.

    Attributes:
        body: As given.
        key: The API key that was sent; None without.
    """

    def __init__(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self._handler = handler
        self.body = body
        self.key = handler.headers.get("authorization")

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        """Send a whole response."""
        contents = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._begin(status, {"content-type": "application/json", **headers})
        self.send(contents)

    def begin_stream(self) -> None:
        """Begin a response of events."""
        self._begin(200, {"content-type": "text/event-stream"})

    def send(self, contents: bytes) -> None:
        """Send bytes as they are."""
        self._handler.wfile.write(contents)
        self._handler.wfile.flush()

    def say(self, *texts: str, key: str = "content") -> None:
        """Send an event for each text."""
        for text in texts:
            self.send(chunk({"choices": [{"index": 0, "delta": {key: text}, "finish_reason": None}]}))

    def end(self, reason: str = "stop", **more: Any) -> None:
        """End the stream: say why, send figures, and that nothing follows."""
        self.send(chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}))
        self.send(chunk({"choices": [], **more}) + b"data: [DONE]\n\n")

    def is_hung_up(self, timeout_s: float) -> bool:
        """Wait until the client hangs up."""
        connection = self._handler.connection
        readable, _, _ = select.select([connection], [], [], timeout_s)
        return bool(readable) and connection.recv(1) == b""

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._handler.send_response(status)
        for name, value in {**headers, "connection": "close"}.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()


class StandIn:
    """What a test sets and looks at.

    Attributes:
        url: Where the page is.
        models: What `/v1/models` lists.
        key: The API key that is wanted; None wants none.
        answer: Answers a request.
        exchanges: The requests that were answered, in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reset()

    def reset(self) -> None:
        """Begin anew, for the next test."""
        self.models: list[dict[str, Any]] = [{"id": "small", "target": "ort-cpu-fp32", "max_model_len": 4096}]
        self.key: str | None = None
        self.answer: Callable[[Exchange], None] = hello
        self.exchanges: list[Exchange] = []


def hello(exchange: Exchange) -> None:
    """Answer a few words, with figures."""
    exchange.begin_stream()
    exchange.say("Hello,", " you.")
    exchange.end(usage={"prompt_tokens": 9, "completion_tokens": 3})


def chunk(value: Any) -> bytes:
    """Return an event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def error_body(message: str) -> dict[str, Any]:
    """Return an error as the API shows it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve the page and a scripted API on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            exchange = Exchange(self, None)
            if self.path == "/v1/models":
                if not self._is_refused(exchange):
                    exchange.reply({"object": "list", "data": state.models})
                return
            path = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
            if "/" in path.name or not path.is_file():
                exchange.reply(error_body("there is no such file"), 404)
                return
            kind = mimetypes.types_map[path.suffix]
            exchange.reply(path.read_bytes(), **{"content-type": kind, "content-security-policy": POLICY})

        def do_POST(self) -> None:
            exchange = Exchange(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))
            state.exchanges.append(exchange)
            if not self._is_refused(exchange):
                state.answer(exchange)

        def _is_refused(self, exchange: Exchange) -> bool:
            is_refused = state.key is not None and exchange.key != f"Bearer {state.key}"
            if is_refused:
                exchange.reply(error_body("this server wants an API key"), 401)
            return is_refused

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = StandIn(f"http://127.0.0.1:{server.server_address[1]}/")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
