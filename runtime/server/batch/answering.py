"""One request of a batch to its result, as the server answers it over HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError, OverloadError, Qwen3VLError
from runtime.server.batch.lines import Line
from runtime.server.chat import complete_chat
from runtime.server.completions import complete_text
from runtime.server.engines import Engines, Served
from runtime.server.errors import SERVER, ApiError, api_error
from runtime.server.protocol.chat import ChatRequest
from runtime.server.protocol.completions import CompletionRequest
from runtime.server.validation import checked_chat, checked_completion
from runtime.shown import shown

_LOGGER = logging.getLogger(__name__)
# What the server's errors say of a server.
_OTHER_WORDS = (
    ("see /openapi.json", "compare it with OpenAI's API reference"),
    ("no file of the server is read", "a file is read with --allow-local-files alone"),
    ("start the server with", "run the batch with"),
    ("this server", "this batch"),
)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        result: The line of OpenAI's output file, or of its error file.
        is_failure: Whether it belongs into the error file, where there is one.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens of the answers.
    """

    result: dict[str, Any]
    is_failure: bool
    prompt_tokens: int = 0
    new_tokens: int = 0


Answer = Callable[[Line], Awaitable[Outcome]]


def answer_with(engines: Engines) -> Answer:
    """Return what answers requests with these engines.

    It raises EngineError if an engine has failed for good, since all further requests would fail too; whatever is wrong
    with one request becomes its result.
    """

    async def answer(line: Line) -> Outcome:
        if line.values is None:
            error = {"code": "invalid_line", "message": f"line {line.number}: {line.problem}"}
            return Outcome(_result(line, None, error), is_failure=True)
        try:
            return _success(line, await _body(engines, line.values))
        except ApiError as error:
            return _failure(line, error)
        except Qwen3VLError as error:
            if isinstance(error, EngineError):
                _check_open(engines)
            return _failure(line, api_error(error))
        except Exception:
            _LOGGER.exception("internal error in line %d", line.number)
            message = "internal error. Remedy: report it with what was logged"
            return _failure(line, ApiError(500, message, kind=SERVER))

    return answer


async def _body(engines: Engines, values: dict[str, Any]) -> dict[str, Any]:
    """Return the body of the response to a request.

    Raises:
        ApiError, Qwen3VLError: What is wrong with the request, or ended its answer.
    """
    url, body = values.get("url"), values.get("body")
    if url not in (CHAT, TEXT):
        message = f"url is {shown(url)}. Remedy: pass {CHAT} or {TEXT}"
        raise ApiError(404, message, param="url", code="invalid_url")
    if values.get("method") != "POST":
        message = f"method is {shown(values.get('method'))}. Remedy: pass POST"
        raise ApiError(405, message, param="method", code="invalid_method")
    if not isinstance(body, dict):
        raise ApiError(400, f"body is {shown(body)}. Remedy: pass an object", param="body", code="invalid_body")
    asked = checked_chat(body) if url == CHAT else checked_completion(body)
    if asked.stream:
        message = "a batch writes whole answers. Remedy: leave stream out"
        raise ApiError(400, message, param="stream", code="invalid_stream")
    served = engines.asked_for(asked.model)
    while True:
        try:
            return await _response(served, asked)
        except OverloadError as error:  # there are places enough, but prompts that wait may have too many tokens
            await asyncio.sleep(min(error.retry_after_s, 1.0))


async def _response(served: Served, asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
    if isinstance(asked, ChatRequest):
        return await complete_chat(served, asked)
    return await complete_text(served, asked)


def _check_open(engines: Engines) -> None:
    for served in engines.values():
        served.model.check_open()


def _success(line: Line, body: dict[str, Any]) -> Outcome:
    usage = body["usage"]
    return Outcome(
        _result(line, _response_of(200, body), None),
        is_failure=False,
        prompt_tokens=usage["prompt_tokens"],
        new_tokens=usage["completion_tokens"],
    )


def _failure(line: Line, error: ApiError) -> Outcome:
    for server, batch in _OTHER_WORDS:
        error.message = error.message.replace(server, batch)
    return Outcome(_result(line, _response_of(error.status, error.body()), None), is_failure=True)


def _response_of(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}


def _result(line: Line, response: dict[str, Any] | None, error: dict[str, str] | None) -> dict[str, Any]:
    # The id first: by it, a line that was cut is known as one of ours.
    return {"id": line.line_id, "custom_id": line.custom_id, "response": response, "error": error}
