"""Answer requests on an event loop in a thread of its own, as `qwen3vl serve` answers chats."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from runtime.errors import EngineError, Qwen3VLError
from runtime.integrations.triton.inputs import TritonRequest, chat_body
from runtime.integrations.triton.responses import CANCELLED, Responses, chunk_outputs, whole_outputs
from runtime.server.chat import chat_chunks, complete_chat
from runtime.server.engines import Engines, Served
from runtime.server.errors import SERVER, ApiError, api_error, stopped
from runtime.server.turns import THREADS
from runtime.server.validation import checked_chat

_LOGGER = logging.getLogger(__name__)
_ASK_S = 0.5  # how often the server is asked whether a request was cancelled; each asking is a message to its process
_SENDERS = 8


class Answering:
    """What answers the requests to one engine.

    Args:
        backend: The module `triton_python_backend_utils`.
        served: The engine.
    """

    def __init__(self, backend: Any, served: Served) -> None:
        self._backend = backend
        self._served = served
        self._engines = Engines([served])
        self._answers: set[asyncio.Task[Any]] = set()
        self._works: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._senders = ThreadPoolExecutor(_SENDERS, "qwen3vl-send")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(THREADS, "qwen3vl-read"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="qwen3vl-triton", daemon=True)
        self._thread.start()

    def begin(self, request: Any) -> None:
        """Take an `InferenceRequest`, and return: its responses follow."""
        responses = Responses(self._backend, request.get_response_sender(), self._senders)
        asyncio.run_coroutine_threadsafe(self._answer(TritonRequest.copied(request), responses), self._loop)

    def close(self) -> None:
        """Answer what was accepted, within the drain timeout, and close the engine."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._senders.shutdown()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._served.model.close(drain=False)

    async def _answer(self, request: TritonRequest, responses: Responses) -> None:
        """Answer one request; whatever happens, its last response is the final one."""
        answer = asyncio.current_task()
        assert answer is not None
        work = asyncio.create_task(self._respond(request, responses))
        watch = asyncio.create_task(_cancel_if_unwanted(responses, work))
        self._answers.add(answer)
        self._works.add(work)
        try:
            await asyncio.wait([work])
            watch.cancel()
            error = None if work.cancelled() else work.exception()
            if work.cancelled() or error is not None:
                await responses.fail(self._failure(error))
        except Exception:  # of the backend, when its client or the server has gone
            _LOGGER.exception("a response could not be sent")
        finally:
            self._answers.discard(answer)
            self._works.discard(work)

    async def _respond(self, request: TritonRequest, responses: Responses) -> None:
        """Send all responses to a request.

        Raises:
            ApiError, Qwen3VLError: What is wrong with it, or ended its answer.
        """
        async with aclosing(self._outputs(request)) as found:
            async for outputs, is_final in found:
                await responses.send(outputs, is_final=is_final)
        assert responses.is_complete, "the last response is a final one"

    async def _outputs(self, request: TritonRequest) -> AsyncGenerator[tuple[dict[str, list[str]], bool], None]:
        """Yield the tensors of each response, and whether it is the last one."""
        body = checked_chat(await asyncio.to_thread(chat_body, request))
        served = self._engines.asked_for(body.model)
        if not body.stream:
            yield whole_outputs(await complete_chat(served, body)), True
            return
        num_left = body.n or 1
        async with aclosing(chat_chunks(served, body)) as chunks:
            async for chunk in chunks:
                num_left -= sum(choice["finish_reason"] is not None for choice in chunk["choices"])
                is_final = not chunk["choices"] if body.wants_usage else num_left == 0
                yield chunk_outputs(chunk), is_final

    def _failure(self, error: BaseException | None) -> ApiError:
        """Return the error of a request whose work ended so; None stands for a work that was cancelled."""
        if error is None:
            return stopped() if self._is_stopping else ApiError(CANCELLED, "the client has cancelled the request")
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineError):
            self._log_if_failed()
        if isinstance(error, Qwen3VLError):
            return api_error(error)
        _LOGGER.error("internal error", exc_info=error)
        return ApiError(500, "internal error. Remedy: report it with what the server logged", kind=SERVER)

    def _log_if_failed(self) -> None:
        """Say in the server's log if the engine takes no more requests, since Triton goes on sending them."""
        try:
            self._served.model.check_open()
        except Qwen3VLError as error:
            _LOGGER.error("%s: %s. Remedy: unload the model and load it again", self._served.name, error.message)

    async def _drain(self) -> None:
        """Wait for all answers; those that take longer than the drain timeout end with an error."""
        if self._answers:
            await asyncio.wait(self._answers, timeout=self._served.settings.drain_timeout_s)
        self._is_stopping = True
        for work in self._works:
            work.cancel()
        if self._answers:
            await asyncio.wait(self._answers)


async def _cancel_if_unwanted(responses: Responses, work: asyncio.Task[None]) -> None:
    while not await responses.is_cancelled():
        await asyncio.sleep(_ASK_S)
    work.cancel()
