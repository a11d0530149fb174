"""`TritonPythonModel`: what Triton's Python backend loads, asks and ends.

It follows the interface of the backend's README (github.com/triton-inference-server/python_backend) in its decoupled
mode: `execute` returns at once, and responses are sent whenever the engine has something.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError, Qwen3VLError
from runtime.installation import EXTRAS, how_to_install
from runtime.integrations.triton.config import ENGINE_FOLDER, read_parameters
from runtime.manifest import Manifest
from runtime.session import is_on_gpu
from runtime.settings import show_one_gpu

if TYPE_CHECKING:
    from runtime.integrations.triton.inputs import TritonRequest
    from runtime.integrations.triton.responses import Responses
    from runtime.server.engines import Served
    from runtime.server.errors import ApiError

_LOGGER = logging.getLogger(__name__)
_ASK_S = 0.5  # how often the server is asked whether a request was cancelled; each asking is a message to its process
_SENDERS = 8


class TritonPythonModel:
    """A model of the Python backend; one instance is one process with one engine.

    Requests are answered on an event loop in a thread of its own, as `qwen3vl serve` answers chats.
    """

    _backend: Any
    _log: _Log
    _served: Served
    _loop: asyncio.AbstractEventLoop
    _thread: threading.Thread
    _senders: ThreadPoolExecutor
    _answers: set[asyncio.Task[None]]
    _works: set[asyncio.Task[None]]
    _is_stopping: bool

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine, and begin to take requests.

        Args:
            args: What the backend gives, see its README: `model_config`, `model_repository`, `model_version` and so on.

        Raises:
            TritonModelException: The engine cannot be opened. The server logs the message and loads no model.
        """
        self._backend = importlib.import_module("triton_python_backend_utils")
        self._log = _Log(self._backend.Logger)
        logging.getLogger("runtime").addHandler(self._log)
        try:
            self._served = _opened(args)
        except BaseException as error:
            logging.getLogger("runtime").removeHandler(self._log)
            message = _opening_failure(error)
            if message is None:
                raise
            raise self._backend.TritonModelException(f"{args['model_name']}: {message}") from error
        from runtime.server.turns import THREADS

        self._answers, self._works, self._is_stopping = set(), set(), False
        self._senders = ThreadPoolExecutor(_SENDERS, "qwen3vl-send")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(THREADS, "qwen3vl-read"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="qwen3vl-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests, and return: their answers follow, in whichever order they come."""
        from runtime.integrations.triton.inputs import TritonRequest
        from runtime.integrations.triton.responses import Responses

        for request in requests:
            responses = Responses(self._backend, request.get_response_sender(), self._senders)
            asyncio.run_coroutine_threadsafe(self._answer(TritonRequest.copied(request), responses), self._loop)

    def finalize(self) -> None:
        """Answer what was accepted, within the drain timeout, and close the engine."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._senders.shutdown()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._served.model.close(drain=False)
        logging.getLogger("runtime").removeHandler(self._log)

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
            if work.cancelled() or (error := work.exception()) is not None:
                await responses.fail(self._failure(None if work.cancelled() else error))
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
        async with aclosing(_outputs(self._served, request)) as found:
            async for outputs, is_final in found:
                await responses.send(outputs, is_final=is_final)
        assert responses.is_complete, "the last response is a final one"

    def _failure(self, error: BaseException | None) -> ApiError:
        """Return the error of a request whose work ended so; None stands for a work that was cancelled."""
        from runtime.integrations.triton.responses import CANCELLED
        from runtime.server.errors import SERVER, ApiError, api_error, stopped

        if error is None:
            return stopped() if self._is_stopping else ApiError(CANCELLED, "the client has cancelled the request")
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineError):
            _LOGGER.error("%s: %s. Remedy: load the model again", self._served.name, error.message)
        if isinstance(error, Qwen3VLError):
            return api_error(error)
        _LOGGER.error("internal error", exc_info=error)
        return ApiError(500, "internal error. Remedy: report it with what the server logged", kind=SERVER)

    async def _drain(self) -> None:
        """Wait for all answers; those that take longer than the drain timeout end with an error."""
        if self._answers:
            await asyncio.wait(self._answers, timeout=self._served.settings.drain_timeout_s)
        self._is_stopping = True
        for work in self._works:
            work.cancel()
        if self._answers:
            await asyncio.wait(self._answers)


async def _outputs(served: Served, request: TritonRequest) -> AsyncGenerator[tuple[dict[str, list[str]], bool], None]:
    """Yield the tensors of each response, and whether it is the last one."""
    from runtime.integrations.triton.inputs import chat_body
    from runtime.integrations.triton.responses import chunk_outputs, whole_outputs
    from runtime.server.chat import chat_chunks, complete_chat
    from runtime.server.engines import Engines
    from runtime.server.validation import checked_chat

    body = checked_chat(await asyncio.to_thread(chat_body, request))
    named = Engines([served]).asked_for(body.model)
    if not body.stream:
        yield whole_outputs(await complete_chat(named, body)), True
        return
    num_left = body.n or 1
    async with aclosing(chat_chunks(named, body)) as chunks:
        async for chunk in chunks:
            num_left -= sum(choice["finish_reason"] is not None for choice in chunk["choices"])
            is_final = not chunk["choices"] if body.wants_usage else num_left == 0
            yield chunk_outputs(chunk), is_final


async def _cancel_if_unwanted(responses: Responses, work: asyncio.Task[None]) -> None:
    while not await responses.is_cancelled():
        await asyncio.sleep(_ASK_S)
    work.cancel()


def _opened(args: Mapping[str, str]) -> Served:
    """Open the engine of a model's version, on the instance's device.

    Raises:
        Qwen3VLError: It cannot be opened.
    """
    if args["model_instance_kind"] == "GPU":
        show_one_gpu(int(args["model_instance_device_id"]))
    from runtime.model import Qwen3VLModel
    from runtime.server.engines import Served

    folder = Path(args["model_repository"]) / args["model_version"] / ENGINE_FOLDER
    options, settings = read_parameters(json.loads(args["model_config"]))
    model = Qwen3VLModel.from_engine(folder, **options)
    if is_on_gpu(Manifest.read(folder)):
        model.warm_up()
    return Served(args["model_name"], model, settings)


def _opening_failure(error: BaseException) -> str | None:
    """Return what an engine could not be opened for, and what to do; None for a bug, whose traceback is wanted."""
    if isinstance(error, Qwen3VLError):
        return f"{error.message}. Remedy: {error.remedy}"
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return (
            f"the Python package {package} is not installed for the backend. Remedy: {how_to_install(EXTRAS[package])}"
        )
    return None


class _Log(logging.Handler):
    """Passes what the runtime logs on to the server's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        write = self._logger.log_warn if record.levelno < logging.ERROR else self._logger.log_error
        (self._logger.log_info if record.levelno < logging.WARNING else write)(self.format(record))
