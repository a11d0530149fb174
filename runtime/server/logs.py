"""What a request says, for the log: only where the server was started with `--log-text`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request

from runtime.server.engines import Served
from runtime.shown import one_line

LOGGER = logging.getLogger("runtime.server.text")
_LONGEST = 2000


def note_chat(request: Request, served: Served, body: Any) -> None:
    """Log the texts of a chat, without images and videos."""
    if served.settings.logs_text:
        texts = [f"{each.get('role')}: {_text(each.get('content'))}" for each in body.messages]
        _log(request, " | ".join(texts))


def note_text(request: Request, served: Served, text: Any) -> None:
    """Log a text."""
    if served.settings.logs_text:
        _log(request, str(text))


def _log(request: Request, text: str) -> None:
    LOGGER.info("%s %s", request.scope["state"]["request_id"], one_line(text, _LONGEST))


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return str(content)
    parts = [each if isinstance(each, dict) else {} for each in content]
    return " ".join(str(each["text"]) if "text" in each else f"<{each.get('type')}>" for each in parts)
