"""Images: parts of Hugging Face, OpenAI, langchain and Anthropic, and the pixels that the vision tower takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.base64_text import decode_base64
from runtime.errors import UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import OnImages, ProcessedImage, process_image
from runtime.input_kinds.kind import InputKind, InputSettings, Insertion
from runtime.message_keys import REFUSED_PART_KEYS, check_keys, exact
from runtime.option_checks import integer
from runtime.shown import shown

IMAGE_TOKEN = "<|image_pad|>"
# The names under which transformers' `apply_chat_template` takes an image, and "data", bytes or base64.
_SOURCE_KEYS = ("image", "url", "path", "base64", "data")
# Those of qwen-vl-utils' `fetch_image`; they beat the limits of the request and of the engine.
_LIMIT_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# OpenAI's "low" is "a 512px x 512px version of the image" (its guide to images and vision).
_LOW_DETAIL_PIXELS = 512 * 512
_UNDER_IMAGE = "pass arrays, bytes and PIL images under 'image'"
_BASE64 = "pass base64.b64encode(data).decode(), or the bytes under 'data'"


@dataclass(frozen=True)
class ImageSource:
    """An image with limits of its own.

    Attributes:
        image: What `runtime.images.load_image` takes.
        min_pixels, max_pixels: In place of the settings' limits.
        size: Height and width to bring it to, but for rounding, instead of a size within limits.
    """

    image: Any
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: tuple[int, int] | None = None

    def config(self, settings: InputSettings) -> ImageProcessorConfig:
        """Return how this image is resized and cut."""
        config = settings.image
        config = config.with_limits(*config.both_limits(self.min_pixels, self.max_pixels))
        if settings.max_tokens is not None:
            most = settings.max_tokens * config.factor**2
            config = config.with_limits(min(config.min_pixels, most), min(config.max_pixels, most))
        return config if self.size is None else replace(config, fixed_size=config.smart_size(*self.size))


class Image(InputKind):
    """One image: a path, bytes, a data URL, a PIL image or an array."""

    name = "image"
    token = IMAGE_TOKEN
    part_types = ("image", "image_url", "input_image")
    placeholder = {"type": "image", "image": "<image>"}  # noqa: RUF012 (a template only asks whether the key is there)
    path_keys = ("image", "path", "url")

    def source(self, part: Mapping[Any, Any], place: str) -> Any:
        """Return the image as given, but `path` as `Path`, `base64` as bytes, and one with limits as `ImageSource`."""
        is_openai = exact(part["type"]) != "image"
        keys = ("image_url",) if is_openai else (*_SOURCE_KEYS, "image_url", "source")
        check_keys(part, ("type", *keys, *_LIMIT_KEYS, "detail"), REFUSED_PART_KEYS, place)
        limits = _limits(part, place)
        if is_openai or ("image_url" in part and not any(key in part for key in (*_SOURCE_KEYS, "source"))):
            image, detail = _openai_image(part, place)
        else:
            image, detail = _image_source(part, place), part.get("detail")
        if _is_low(detail, f"{place}.detail") and "max_pixels" not in limits:
            limits["max_pixels"] = _LOW_DETAIL_PIXELS
        return ImageSource(image, **limits) if limits else image

    def content(self, source: Any) -> object:
        """Return the image as it was given."""
        return source.image if isinstance(source, ImageSource) else source

    def process(self, source: Any, settings: InputSettings, on_images: OnImages | None = None) -> ProcessedImage:
        """Decode, resize and cut an image; see `runtime.image_processor.process_image`."""
        if not isinstance(source, ImageSource):
            source = ImageSource(source)
        if isinstance(source.image, ProcessedImage):
            found: ProcessedImage = source.image
            return found
        return process_image(
            source.image,
            source.config(settings),
            max_image_pixels=settings.max_image_pixels,
            check=settings.check,
        )

    def expansion(self, processed: ProcessedImage) -> tuple[Insertion, ...]:
        """Return the image alone: the template has written the markers around it."""
        return (Insertion("", processed, ""),)


KIND = Image()


def _limits(part: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """Return the part's own limits as arguments of `ImageSource`."""
    check = integer(1)
    given = {key: check(f"{place}.{key}", part[key]) for key in _LIMIT_KEYS if part.get(key) is not None}
    sides = [given.pop(key, None) for key in ("resized_height", "resized_width")]
    if sides == [None, None]:
        low, high = given.get("min_pixels"), given.get("max_pixels")
        if low is not None and high is not None and low > high:
            raise UsageError(f"{place}: min_pixels {low} is above max_pixels {high}", remedy="exchange them")
        return given
    if None in sides or given:
        raise UsageError(
            f"{place}: resized_height and resized_width go together, without min_pixels and max_pixels",
            remedy="pass both of them, or max_pixels alone",
        )
    return {"size": tuple(sides)}


def _image_source(part: Mapping[str, Any], place: str) -> Any:
    if "source" in part:
        inner = part["source"]
        if not isinstance(inner, Mapping):
            raise UsageError(
                f"{place}.source must be a dict, got {type(inner).__name__}",
                remedy='pass {"type": "base64", "data": …}, or the image itself under "image"',
            )
        # Anthropic's form: {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}.
        part, place = {**part, **inner}, f"{place}.source"
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


def _openai_image(part: Mapping[str, Any], place: str) -> tuple[str, Any]:
    """Return URL and detail of `{"url", "detail"}`, or of a bare string, as the Responses API has it."""
    value: Any = part.get("image_url")
    detail, place = part.get("detail"), f"{place}.image_url"
    if isinstance(value, Mapping):
        check_keys(value, ("url", "detail"), REFUSED_PART_KEYS, place)
        value, detail, place = value.get("url"), value.get("detail", detail), f"{place}.url"
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}", remedy="pass a data URL")
    return str.__str__(value), detail


def _is_low(detail: Any, place: str) -> bool:
    """Return whether OpenAI's "low" is asked for; "high" is what is done anyway: the image's own resolution."""
    if detail is not None and exact(detail) not in ("auto", "high", "low"):
        raise UsageError(
            f"{place}={shown(detail)} is not known", remedy="pass low, high or auto, or a resolution with max_pixels"
        )
    return detail is not None and exact(detail) == "low"


def _decode_base64(source: Any, place: str) -> bytes:
    if not isinstance(source, (str, bytes, bytearray)):
        raise UsageError(f"{place} is not base64: expected text, got {type(source).__name__}", remedy=_BASE64)
    try:
        return decode_base64(source)
    except ValueError as error:
        raise UsageError(f"{place} is not base64: {error}", remedy=_BASE64) from error
