"""Send the responses to a request, one after the other, without the event loop waiting for the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from runtime.integrations.triton.config import CHAT_RESPONSE, FINISH_REASON, TEXT_OUTPUT, USAGE
from runtime.server.errors import ApiError

CANCELLED = 499
"""Status of a request that its client has cancelled, as nginx has it."""
# TritonError has few codes; DeadlineError is what the server's own batcher calls UNAVAILABLE, too.
_CODES = {404: "NOT_FOUND", 429: "UNAVAILABLE", CANCELLED: "CANCELLED"}
_CODES |= {501: "UNSUPPORTED", 503: "UNAVAILABLE", 504: "UNAVAILABLE"}
# What the errors of the HTTP server say of it.
_OTHER_WORDS = (
    ("see /openapi.json", "compare it with OpenAI's API reference"),
    ("start the server with", "package the engine with"),
    ("this server", "this model"),
)


class Responses:
    """The responses to one request.

    Args:
        backend: The module `triton_python_backend_utils`.
        sender: The request's `InferenceResponseSender`. Its calls wait for the server's process, so they are made in
            `threads`. A response waits for all calls before it: responses have an order, and after the final one the
            server is asked nothing more, since the request is gone then.
        threads: Where they are made.
    """

    def __init__(self, backend: Any, sender: Any, threads: Executor) -> None:
        self._backend = backend
        self._sender = sender
        self._threads = threads
        self._calls: list[asyncio.Future[Any]] = []  # that are not over, whoever waits for them
        self.is_complete = False

    async def send(self, outputs: Mapping[str, Sequence[str]], *, is_final: bool) -> None:
        """Send tensors of texts; with the last ones the request is complete."""
        tensors = [
            self._backend.Tensor(name, np.array([each.encode("utf-8", "replace") for each in texts], np.object_))
            for name, texts in outputs.items()
        ]
        await self._send(self._backend.InferenceResponse(output_tensors=tensors), is_final)

    async def fail(self, error: ApiError) -> None:
        """Complete the request with an error, unless it is complete."""
        message = error.message
        for server, here in _OTHER_WORDS:
            message = message.replace(server, here)
        code = _CODES.get(error.status, "INVALID_ARG" if error.status < 500 else "INTERNAL")
        kind = self._backend.TritonError
        await self._send(self._backend.InferenceResponse(error=kind(message, getattr(kind, code))), True)

    async def is_cancelled(self) -> bool:
        """Ask the server whether its client wants no answer any more."""
        return not self.is_complete and bool(await self._call(self._sender.is_cancelled))

    async def _send(self, response: Any, is_final: bool) -> None:
        if self._calls:
            await asyncio.wait(self._calls)
        if self.is_complete:
            return
        self.is_complete = is_final
        flags = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_final else 0
        await self._call(partial(self._sender.send, response, flags=flags))

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Call the sender in a thread; the call goes on when the task that waits for it is cancelled."""
        call = asyncio.get_running_loop().run_in_executor(self._threads, function)
        self._calls.append(call)
        call.add_done_callback(self._calls.remove)
        return await asyncio.shield(call)


def whole_outputs(response: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tensors of a whole chat completion."""
    texts = [choice["message"]["content"] or "" for choice in response["choices"]]
    return _outputs(response, texts)


def chunk_outputs(chunk: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tensors of a chunk of a stream; one that only has figures has an empty text."""
    texts = [choice["delta"].get("content", "") for choice in chunk["choices"]]
    return _outputs(chunk, texts or [""])


def _outputs(response: Mapping[str, Any], texts: list[str]) -> dict[str, list[str]]:
    outputs = {TEXT_OUTPUT: texts, CHAT_RESPONSE: [json.dumps(response, ensure_ascii=False)]}
    reasons = [choice["finish_reason"] for choice in response["choices"] if choice["finish_reason"]]
    if reasons:
        outputs[FINISH_REASON] = reasons
    if response.get("usage"):
        outputs[USAGE] = [json.dumps(response["usage"])]
    return outputs
