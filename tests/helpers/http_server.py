"""A server in a thread, and what a test sends it: plain requests, streams, and raw bytes."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from helpers import PICTURES
from runtime.model import Qwen3VLModel
from runtime.server.engines import Engines, Served
from runtime.server.run import HttpServer, listen
from runtime.server.settings import ServerSettings

HELD_OUT = PICTURES / "held_out_0.png"
_PATIENCE_S = 60


@dataclass(frozen=True)
class Answered:
    """A response."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """The error that it is, which has a status, a message with a remedy and all of OpenAI's keys."""
        assert self.status >= 400, self.content
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """What the events of a stream hold; the last says that it is done."""
        assert self.status == 200 and self.headers["content-type"].startswith("text/event-stream"), self.content
        events = self.content.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(each.removeprefix("data: ")) for each in events[:-2]]


class Client:
    """Asks a server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE_S)
        try:
            data = raw if body is None else json.dumps(body).encode()
            kinds = {} if data is None else {"content-type": "application/json"}
            connection.request(method or ("GET" if data is None else "POST"), path, data, {**kinds, **(headers or {})})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answered(response.status, names, response.read())
        finally:
            connection.close()

    def chat(self, content: Any = "Which digits are there?", **fields: Any) -> Answered:
        """Ask for the next turn of a chat of one."""
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE_S)

    def begin(self, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
        """Send a request and leave its response unread."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection = self.connect()
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return connection


@contextmanager
def running(models: Qwen3VLModel | Mapping[str, Qwen3VLModel], **settings: Any) -> Iterator[Client]:
    """Run a server of models, one of them as `demo`, which it closes at the end."""
    named = {"demo": models} if isinstance(models, Qwen3VLModel) else models
    chosen = ServerSettings(**{"port": 0, **settings})
    engines = Engines([Served(name, model, chosen) for name, model in named.items()])
    server = HttpServer(engines, chosen, listen(chosen))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=[ready.set])
    thread.start()
    try:
        assert ready.wait(_PATIENCE_S)
        yield Client(server.port)
    finally:
        server.stop()
        thread.join(_PATIENCE_S)
        assert not thread.is_alive(), "the server does not end"


def data_url(path: Any = HELD_OUT, kind: str = "image/png") -> str:
    """Return a file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def shown(question: str = "Which digits are there?", *urls: str) -> list[dict[str, Any]]:
    """Return the content of a message: images, then a question."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls or [data_url()]]
    return [*images, {"type": "text", "text": question}]


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail if that takes too long."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.005)
