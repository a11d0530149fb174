"""A server that speaks OpenAI's API as the client of a load: chat completions, streamed over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any

from qwen3vl_export.load.chunks import malformed, message_of, read_reply
from qwen3vl_export.load.client import Reply
from qwen3vl_export.load.connections import Address, Connections, pieces
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.wire import chat_messages
from runtime.errors import OverloadError, RequestError, UsageError
from runtime.shown import shorten

_TOO_MANY_REQUESTS = 429
_BAD_REQUESTS = (400, 422)
_OPTIONAL: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""Fields of a request that not every server takes."""
_SAMPLE = 128
_MAX_CHARACTERS = 200
_MAX_ERROR_BYTES = 1 << 16


class HttpServer:
    """A server, asked from as many threads as there are clients.

    Fields that it refuses by name are left out from then on (`left_out`): ignore_eos, without which answers may end
    early, and stream_options, without which the chunks of an answer are counted as its tokens.

    Args:
        address: Where it is.
        model: Name of the model there; None for the only one that it has.
        api_key: Sent as a bearer token.
        timeout_s: How long the next bytes of an answer may take.

    Raises:
        RequestError: It does not answer.
        UsageError: It has several models, or does not tell them.
    """

    def __init__(
        self, address: Address, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self.address = address
        self._connections = Connections(address, headers, timeout_s)
        self._optional = dict(_OPTIONAL)
        self._lock = threading.Lock()
        self.left_out: list[str] = []
        self.model = model if model is not None else self._only_model()

    def prepare(self, messages: list[dict[str, Any]], new_tokens: int) -> bytes:
        """Return a request without the optional fields; images become PNG files in data URLs."""
        fields = {"messages": chat_messages(messages), "max_tokens": new_tokens, "temperature": 0, "stream": True}
        return json.dumps({"model": self.model, **fields}).encode()

    def ask(self, request: bytes) -> Reply:
        """Send it, and again without a field that the server refuses by its name."""
        while True:
            with self._lock:
                optional = dict(self._optional)
            body = request[:-1] + b", " + json.dumps(optional).encode()[1:] if optional else request
            start = time.perf_counter()
            with self._connections.response("POST", "/v1/chat/completions", body) as response:
                if response.status == 200:
                    return _reply(response, start)
                text, param = _error_of(response)
            refused = [name for name in optional if name == param or name in text]
            if response.status not in _BAD_REQUESTS or not refused:
                raise _failure(response, text)
            self._leave_out(refused[0])

    def tokens_per_word(self, seed: int = 0) -> float | None:
        """Return how many tokens a word of `Prompts` has, by what the server counts for a short and a longer one.

        Args:
            seed: That of the prompts.

        Returns:
            None if the server does not count tokens.
        """
        short, long = (Prompts(num_words, seed=seed).messages(0) for num_words in (1, 1 + _SAMPLE))
        first, second = (self.ask(self.prepare(messages, 1)).prompt_tokens for messages in (short, long))
        return None if first is None or second is None else max(second - first, 1) / _SAMPLE

    def statistics(self) -> dict[str, Any]:
        """Return no counters: servers do not agree about them."""
        return {}

    def memory_bytes(self) -> int | None:
        """Return None: the server is another process, perhaps on another machine."""
        return None

    def stop(self) -> None:
        """End the connections, which ends what is asked over them."""
        self._connections.stop()

    def _leave_out(self, name: str) -> None:
        with self._lock:
            if name in self._optional:
                del self._optional[name]
                self.left_out.append(name)

    def _only_model(self) -> str:
        with self._connections.response("GET", "/v1/models") as response:
            if response.status != 200:
                raise _failure(response, _error_of(response)[0])
            text = response.read()
        try:
            names = [str(each["id"]) for each in json.loads(text)["data"]]
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError("/v1/models is no list of models", remedy="check --url") from error
        if len(names) != 1:
            listed = shorten(", ".join(names), _MAX_CHARACTERS)
            raise UsageError(f"the server has {len(names)} models: {listed}", remedy="choose one with --model")
        return names[0]


def _reply(response: HTTPResponse, start: float) -> Reply:
    if response.headers.get_content_type() != "text/event-stream":
        raise malformed("the answer is no stream of events")
    reply = read_reply(pieces(response), start)
    response.read()  # the end of the body, after which the connection can be used again
    return reply


def _error_of(response: HTTPResponse) -> tuple[str, str | None]:
    """Return the message of a response that is an error, and the parameter it names."""
    text = response.read(_MAX_ERROR_BYTES).decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        param = error.get("param")
    except (ValueError, TypeError, KeyError, AttributeError):
        return shorten(text, _MAX_CHARACTERS), None
    return message_of(error), param if isinstance(param, str) else None


def _failure(response: HTTPResponse, text: str) -> Exception:
    """Return the error of a response that is no answer."""
    said = f"HTTP {response.status}: {text}"
    if response.status == _TOO_MANY_REQUESTS:
        return OverloadError(said, remedy="lower --rate or --concurrency", retry_after_s=_retry_after_s(response))
    return RequestError(said, remedy="look into the server's log")


def _retry_after_s(response: HTTPResponse) -> float:
    """Return the seconds that a refusal asks to wait; 1 where it does not say, or gives a date."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isascii() and value.isdigit() else 1.0
