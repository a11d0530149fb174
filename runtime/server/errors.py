"""Errors as OpenAI's API shows them: a status, and a body `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.errors import (
    CapacityError,
    DeadlineError,
    EngineError,
    ImageError,
    OverloadError,
    Qwen3VLError,
    TargetError,
    UsageError,
)

INVALID, SERVER = "invalid_request_error", "server_error"
_LARGEST_PAUSE_S = 3600

# By class; the first that fits counts.
_OF_CLASSES: tuple[tuple[type[Qwen3VLError], int, str, str | None], ...] = (
    (OverloadError, 429, "rate_limit_error", "overloaded"),
    (DeadlineError, 504, SERVER, "deadline_exceeded"),
    (CapacityError, 400, INVALID, "context_length_exceeded"),
    (ImageError, 400, INVALID, "invalid_image"),
    (UsageError, 400, INVALID, None),
    (TargetError, 501, SERVER, "not_available"),
    (EngineError, 503, SERVER, "engine_failed"),
)

# The runtime's messages speak of its Python interface.
_OTHER_WORDS = (
    ("pass do_sample=False", "pass temperature=0"),
    ("max_new_tokens", "max_completion_tokens"),
    ("model.tokenizer.encode(text) gives", "/tokenize gives"),
    ("pass a larger timeout_s, or ask", "ask"),
)


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: Of HTTP.
        message: What went wrong, and what to do.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: The field of the body that is wrong.
        retry_after_s: Seconds after which asking again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        """Return the headers that belong to it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, min(_LARGEST_PAUSE_S, math.ceil(self.retry_after_s))))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413, 431):
            headers["connection"] = "close"  # what is left of the body is not read
        return headers


def stopped() -> ApiError:
    """Return the error of a request that was in progress when the server had to end."""
    message = "the server was stopped before the answer was complete. Remedy: ask again"
    return ApiError(503, message, kind=SERVER, code="stopped", retry_after_s=5)


def api_error(error: Qwen3VLError, param: str | None = None) -> ApiError:
    """Return an error of the runtime as one of the API."""
    status, name, code = next((entry[1:] for entry in _OF_CLASSES if isinstance(error, entry[0])), (500, SERVER, None))
    text = error.message if error.remedy is None else f"{error.message}. Remedy: {error.remedy}"
    for python, openai in _OTHER_WORDS:
        text = text.replace(python, openai)
    return ApiError(
        status,
        text,
        kind=name,
        code=code,
        param=param,
        retry_after_s=getattr(error, "retry_after_s", 5.0 if status == 503 else None),
    )
