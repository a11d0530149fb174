"""Images and videos of a request: bytes in the body, or fetched from hosts that are allowed; never the server's files.

In Python, a string may be a path. From a client it must not be one: all strings become bytes here, but data URLs, which
the runtime reads by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.base64_text import decode_base64
from runtime.errors import UsageError
from runtime.input_kinds.image import ImageSource
from runtime.messages import Attachment, Messages, normalise_messages
from runtime.server.settings import ServerSettings
from runtime.shown import shown
from runtime.urls import scheme_of
from runtime.video.source import VideoSource

Fetch = Callable[[str], bytes]
_FRAME_SETTINGS = ("num_frames", "min_frames", "max_frames")
_SHORTEST_BASE64 = 64  # no image has fewer; a path may look like base64
_REMEDY = "send the file itself, as data:image/png;base64,… or data:video/mp4;base64,…"


def client_messages(messages: Any, settings: ServerSettings, fetch: Fetch) -> Messages:
    """Return a client's messages, checked, with the contents of their images and videos in place of URLs.

    Args:
        messages: As in the body.
        settings: The server's limits.
        fetch: Returns what is behind an http(s) URL.

    Raises:
        UsageError: They are not valid, name a file of the server, or ask for too many frames.
        ApiError: A URL may not or cannot be fetched.
    """
    found = normalise_messages(messages)
    attachments = tuple(
        Attachment(each.kind, _of_client(each.source, each.kind.name, settings, fetch)) for each in found.attachments
    )
    return Messages(found.turns, attachments)


def check_frames(name: str, value: int | None, settings: ServerSettings) -> None:
    """Check a number of frames that a client asks for.

    Raises:
        UsageError: It is above the server's limit.
    """
    if value is not None and value > settings.max_frames:
        raise UsageError(f"{name} = {value} frames, this server takes {settings.max_frames}", remedy="ask for fewer")


def _of_client(source: Any, kind: str, settings: ServerSettings, fetch: Fetch) -> Any:
    if isinstance(source, ImageSource):
        return replace(source, image=_contents(source.image, kind, settings, fetch))
    if isinstance(source, VideoSource):
        for name in _FRAME_SETTINGS:
            check_frames(name, source.options.settings.get(name), settings)
        video = source.video
        if isinstance(video, list):
            check_frames("a list of", len(video), settings)
            return replace(source, video=[_contents(frame, "frame", settings, fetch) for frame in video])
        return replace(source, video=_contents(video, kind, settings, fetch))
    return _contents(source, kind, settings, fetch)


def _contents(source: Any, kind: str, settings: ServerSettings, fetch: Fetch) -> Any:
    if isinstance(source, bytes):
        return source
    if settings.local_folder is not None and (path := _local_path(source, settings.local_folder)) is not None:
        return path
    if not isinstance(source, str):
        raise UsageError(f"{kind}: expected a data URL, found {type(source).__name__}", remedy=_REMEDY)
    scheme = scheme_of(source)
    if scheme == "data":
        return source
    if scheme in ("http", "https"):
        return fetch(source)
    with suppress(ValueError):
        if len(source) >= _SHORTEST_BASE64:
            return decode_base64(source)
    if settings.local_folder is not None:
        raise UsageError(
            f"{kind} {shown(source, 80)}: no such file in {settings.local_folder}, and no data URL or base64 text",
            remedy="check the path, which begins there unless it is absolute",
        )
    raise UsageError(
        f"{kind} {shown(source, 80)}: expected a data URL, found neither one nor base64 text; no file of the server is "
        "read",
        remedy=_REMEDY,
    )


def _local_path(source: Any, folder: Path) -> Path | None:
    """Return the file that a source names, if there is one; what is read of it, the runtime checks."""
    if not isinstance(source, (str, Path)) or scheme_of(str(source)) in ("data", "http", "https"):
        return None
    path = folder / source
    return path if os.path.exists(path) else None
