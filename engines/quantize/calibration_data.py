"""Read calibration prompts from a folder.

`*.jsonl`: a conversation a line, as a list of messages in the Hugging Face chat format or as {"messages": […]}; image
paths are relative to the file. Answers in it run teacher-forced.

`prompts.txt`: a question a line. Images in the folder (by the name's ending) are asked one question each, in turn, both
in order and the shorter list repeated; without images the questions stand alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UsageError
from runtime.files import is_folder, read_small_file
from runtime.input_kinds.registry import kind_of
from runtime.urls import scheme_of

_MAX_FILE_BYTES = 64 << 20  # answers of teachers may stand in it
_PROMPTS_NAME = "prompts.txt"
_IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_LAYOUT = "put *.jsonl files with messages into it, or prompts.txt and images"


@dataclass(frozen=True)
class CalibrationPrompt:
    """A conversation, and where it stands, for error messages."""

    place: str
    messages: list[dict[str, Any]]


def read_prompts(folder: Path) -> list[CalibrationPrompt]:
    """Read all prompts of a folder, in the order of the file names.

    Raises:
        UsageError: There is none, or a line is not what it should be; the message names file and line.
    """
    if not is_folder(folder, error=UsageError):
        raise UsageError(f"{folder}: no such folder of calibration prompts", remedy=_LAYOUT)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"{folder}: its files cannot be listed: {error.strerror}", remedy="let this user read the folder"
        ) from error
    prompts: list[CalibrationPrompt] = []
    for path in paths:
        if path.suffix == ".jsonl":
            prompts += _read_conversations(path)
    images = [path for path in paths if path.suffix.lower() in _IMAGE_ENDINGS]
    questions = folder / _PROMPTS_NAME
    if questions in paths:
        prompts += _ask(images, questions)
    elif images and not prompts:
        raise UsageError(
            f"{folder}: images without {_PROMPTS_NAME}", remedy=f"write one question on each line into {questions}"
        )
    if not prompts:
        raise UsageError(f"{folder}: the calibration set is empty", remedy=_LAYOUT)
    return prompts


def _read_conversations(path: Path) -> Iterator[CalibrationPrompt]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{place}: not readable as JSON ({error})", remedy="write one conversation on each line"
            ) from error
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UsageError(
                f"{place}: expected a list of messages, or an object that holds one under 'messages'", remedy=_LAYOUT
            )
        yield CalibrationPrompt(place, [_resolve(message, path.parent) for message in messages])


def _resolve(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Let relative paths of images begin at the file's folder."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        kind = kind_of(str(part.get("type"))) if isinstance(part, dict) else None
        for key in kind.path_keys if kind is not None else ():
            source = part.get(key)
            if isinstance(source, str) and scheme_of(source) is None:
                part = {**part, key: str(folder / source)}
        parts.append(part)
    return {**message, "content": parts}


def _ask(images: list[Path], questions: Path) -> Iterator[CalibrationPrompt]:
    lines = list(_lines(questions))
    if not lines:
        raise UsageError(f"{questions}: empty", remedy="write one question on each line")
    for i in range(max(len(images), len(lines))):
        number, text = lines[i % len(lines)]
        content = [{"type": "image", "image": str(images[i % len(images)])}] if images else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        yield CalibrationPrompt(f"{questions}:{number}", [message])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    try:
        contents = read_small_file(path, max_bytes=_MAX_FILE_BYTES, error=UsageError, remedy="save it as UTF-8")
        text = contents.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not readable as UTF-8 text ({error})", remedy="save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()
