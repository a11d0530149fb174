"""Images and videos of clients: data URLs and base64; never a file of the server, whatever the form."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from helpers.http_server import HELD_OUT, Client, data_url
from runtime.errors import Qwen3VLError
from runtime.messages import normalise_messages
from runtime.server.errors import ApiError
from runtime.server.fetch import Fetcher
from runtime.server.inputs import client_messages
from runtime.server.settings import ServerSettings

_SETTINGS = ServerSettings()
_BASE64 = base64.b64encode(HELD_OUT.read_bytes()).decode()


def refused(part: dict[str, Any]) -> str:
    """Why a part of a message is refused."""
    with pytest.raises((Qwen3VLError, ApiError)) as caught:
        client_messages([{"role": "user", "content": [part]}], _SETTINGS, Fetcher(_SETTINGS))
    return str(caught.value)


def sources(path: str) -> list[dict[str, Any]]:
    """Parts that name a path, in all forms that the runtime takes from Python."""
    return [
        *({"type": "image", key: path} for key in ("image", "url", "path", "data")),
        {"type": "image_url", "image_url": {"url": path}},
        {"type": "image_url", "image_url": path},
        {"type": "input_image", "image_url": path},
        {"type": "image", "source": {"type": "url", "url": path}},
        {"type": "image", "image": path, "max_pixels": 100_000},
        *({"type": "video", key: path} for key in ("video", "url", "path", "data")),
        {"type": "video_url", "video_url": {"url": path}},
        {"type": "input_video", "input_video": path},
        {"type": "video", "video": [path, path]},
        {"type": "video", "video": [path], "fps": 1},
    ]


@pytest.mark.parametrize(
    "path", ["PATH", "file://PATH", "file:PATH", "FILE:PATH", "./../../..PATH", "/etc/passwd", "\0", "~", "C:\\a.png"]
)
def test_no_file_of_the_server_is_read(path: str) -> None:
    for part in sources(path.replace("PATH", str(HELD_OUT))):
        if "data" not in part:  # which is base64, and no path to anybody
            refused(part)


def test_what_passes_holds_no_path() -> None:
    parts = [*sources(data_url())[:5], *sources(_BASE64)[:1], {"type": "image", "base64": _BASE64}]
    parts = [part for part in parts if not (part.get("path") or part.get("data"))]
    found = client_messages([{"role": "user", "content": parts}], _SETTINGS, Fetcher(_SETTINGS))
    assert len(found.attachments) == len(parts)
    for each in found.attachments:
        assert isinstance(each.source, bytes) or each.source.startswith("data:")


def test_base64_is_taken_though_a_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime takes the name of a file for the file; the server must not even look."""
    monkeypatch.chdir(tmp_path)
    name = "A" * 200
    (tmp_path / name).write_bytes(HELD_OUT.read_bytes())
    assert normalise_messages([{"role": "user", "content": [{"type": "image", "image": name}]}])
    found = client_messages(
        [{"role": "user", "content": [{"type": "image", "image": name}]}], _SETTINGS, Fetcher(_SETTINGS)
    )
    assert found.attachments[0].source == base64.b64decode(name)


def test_urls_are_refused_unless_allowed(client: Client) -> None:
    for url in ("http://example.com/a.png", "https://example.com/a.png", "HTTP://example.com/a.png"):
        for part in sources(url):
            if "path" not in part and "data" not in part:
                assert "--allow-url-host" in refused(part) or "fetches no images" in refused(part)
    part = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    assert client.chat([part]).error["code"] == "url_not_allowed"


@pytest.mark.parametrize("key", ["num_frames", "max_frames", "min_frames"])
def test_frames_are_limited_in_a_part(key: str) -> None:
    assert "768" in refused({"type": "video", "video": "data:video/mp4;base64,AAAA", key: 769})
    assert "768" in refused({"type": "video", "video": [data_url()] * 769})
