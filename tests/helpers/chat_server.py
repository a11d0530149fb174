"""A stand-in for a server that speaks OpenAI's API: it answers chat completions with what a script says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Asked", dict[str, Any]], None]
"""What answers a request: given the connection, and the body of the request."""


class Asked(BaseHTTPRequestHandler):
    """One connection; the methods write an answer."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        models = [{"id": name} for name in self.server.models]
        self.send_json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.addresses.add(self.client_address)
        self.server.script(self, body)

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        self.send_json(status, {"error": {"message": message, "type": "error", "param": param}}, **headers)

    def begin(self, kind: str = "text/event-stream; charset=utf-8") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def send_event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        self.send(f"data: {text}\n\n".encode())

    def send_delta(self, **delta: Any) -> None:
        self.send_event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]})

    def end(self) -> None:
        self.send_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Close the connection in the middle of what is sent."""
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class ChatServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        script: What answers.
        models: Names that /v1/models lists.
        bodies: All requests so far.
        headers: Their headers, those of /v1/models too.
        addresses: From where they came: one for each connection.
    """

    daemon_threads = True

    def __init__(self, script: Script, models: tuple[str, ...], port: int) -> None:
        super().__init__(("127.0.0.1", port), Asked)
        self.script, self.models = script, models
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.addresses: set[Any] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *args: Any) -> None:
        """Say nothing of clients that hang up."""


@contextmanager
def chat_server(script: Script, models: tuple[str, ...] = ("stand-in",), port: int = 0) -> Iterator[ChatServer]:
    """Run a server for the time of the context."""
    with ChatServer(script, models, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(asked: Asked, body: dict[str, Any]) -> None:
    """Answer as servers do: a role, so many texts as tokens are wanted, the usage if it is wanted, the end."""
    asked.begin()
    asked.send_delta(role="assistant", content="")
    for _ in range(body["max_tokens"]):
        asked.send_delta(content="word ")
    if body.get("stream_options", {}).get("include_usage"):
        words = sum(len(part.get("text", "").split()) for part in body["messages"][-1]["content"])
        usage = {"prompt_tokens": 10 + 2 * words, "completion_tokens": body["max_tokens"]}
        asked.send_event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}}})
    asked.end()
