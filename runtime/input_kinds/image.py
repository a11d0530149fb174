"""Images: parts of Hugging Face, OpenAI, langchain and Anthropic, and the pixels that the vision tower takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.base64_text import decode_base64
from runtime.errors import UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import ProcessedImage, process_image
from runtime.input_kinds.kind import InputKind
from runtime.message_keys import REFUSED_PART_KEYS, check_keys, exact
from runtime.shown import shown

IMAGE_TOKEN = "<|image_pad|>"
# The names under which transformers' `apply_chat_template` takes an image, and "data", bytes or base64.
_SOURCE_KEYS = ("image", "url", "path", "base64", "data")
_UNDER_IMAGE = "pass arrays, bytes and PIL images under 'image'"
_BASE64 = "pass base64.b64encode(data).decode(), or the bytes under 'data'"


class Image(InputKind):
    """One image: a path, bytes, a data URL, a PIL image or an array."""

    name = "image"
    token = IMAGE_TOKEN
    part_types = ("image", "image_url", "input_image")
    placeholder = {"type": "image", "image": "<image>"}  # noqa: RUF012 (a template only asks whether the key is there)
    path_keys = ("image", "path", "url")

    def source(self, part: Mapping[Any, Any], place: str) -> Any:
        """Return the image as given, but `path` as `Path` and `base64` as bytes."""
        keys = ("image_url",) if exact(part["type"]) != "image" else (*_SOURCE_KEYS, "source")
        check_keys(part, ("type", *keys, "detail"), REFUSED_PART_KEYS, place)
        return _openai_image(part, place) if keys == ("image_url",) else _image_source(part, place)

    def process(self, source: Any, config: ImageProcessorConfig, *, max_image_pixels: int) -> ProcessedImage:
        """Decode, resize and cut an image; see `runtime.image_processor.process_image`."""
        return process_image(source, config, max_image_pixels=max_image_pixels)


KIND = Image()


def _image_source(part: Mapping[str, Any], place: str) -> Any:
    _check_detail(part, place)
    if "source" in part:
        if not isinstance(part["source"], Mapping):
            raise UsageError(
                f"{place}.source must be a dict, got {type(part['source']).__name__}",
                remedy='pass {"type": "base64", "data": …}, or the image itself under "image"',
            )
        # Anthropic's form: {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}.
        part, place = {**part, **part["source"]}, f"{place}.source"
    keys = [key for key in _SOURCE_KEYS if part.get(key) is not None]
    if len(keys) != 1:
        found = f"{len(keys)}: {', '.join(keys)}" if keys else "none"
        raise UsageError(
            f"{place} must hold its image under one key, found {found}",
            remedy=f"the keys are {', '.join(_SOURCE_KEYS)}",
        )
    key, source = keys[0], part[keys[0]]
    if key == "path":
        if not isinstance(source, (str, os.PathLike)):
            raise UsageError(f"{place}.path must be a path, got {type(source).__name__}", remedy=_UNDER_IMAGE)
        return Path(os.fsdecode(source))
    if key == "url" and not isinstance(source, str):
        raise UsageError(f"{place}.url must be a string, got {type(source).__name__}", remedy=_UNDER_IMAGE)
    # Under "data" bytes are those of the file, as transformers takes them, and text is base64.
    if key == "base64" or (key == "data" and isinstance(source, str)):
        return _decode_base64(source, f"{place}.{key}")
    return source


def _openai_image(part: Mapping[str, Any], place: str) -> str:
    """Return the URL of `{"url", "detail"}`, or of a bare string, as the Responses API has it."""
    value, place = part.get("image_url"), f"{place}.image_url"
    if isinstance(value, Mapping):
        check_keys(value, ("url", "detail"), REFUSED_PART_KEYS, place)
        _check_detail(value, place)
        value, place = value.get("url"), f"{place}.url"
    else:
        _check_detail(part, place)
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}", remedy="pass a data URL")
    return str.__str__(value)


def _check_detail(values: Mapping[str, Any], place: str) -> None:
    detail = values.get("detail")
    # "high" asks for what is done anyway: the image in its own resolution.
    if detail is not None and exact(detail) not in ("auto", "high"):
        raise UsageError(
            f"{place}.detail={shown(detail)} is not supported", remedy="set the resolution with max_pixels"
        )


def _decode_base64(source: Any, place: str) -> bytes:
    if not isinstance(source, (str, bytes, bytearray)):
        raise UsageError(f"{place} is not base64: expected text, got {type(source).__name__}", remedy=_BASE64)
    try:
        return decode_base64(source)
    except ValueError as error:
        raise UsageError(f"{place} is not base64: {error}", remedy=_BASE64) from error
