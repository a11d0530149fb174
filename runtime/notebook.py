"""What a notebook shows: HTML and SVG without script, in which whatever is quoted stays a text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from runtime.errors import Qwen3VLError
from runtime.shown import escape_controls, one_line

if TYPE_CHECKING:
    from runtime.grounding import Box, Point
    from runtime.images import RgbImage
    from runtime.picture_source import PictureSource

_LARGEST_SIDE = 640
"""Of a picture, in pixels: a notebook keeps it in its file."""
_JPEG_QUALITY = 85
_LONGEST_LABEL, _LONGEST_REASON = 80, 200
_COLOURS = ("#e0004d", "#0072b2", "#007a55", "#8a5a00", "#7b3fbf", "#444444")


def escaped(text: str, limit: int | None = None) -> str:
    """Return text for HTML, with control characters escaped; on one line of at most `limit` characters, if given."""
    return html.escape(escape_controls(text, keeps_layout=True) if limit is None else one_line(text, limit))


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a table."""
    cells = (
        f'<tr><th style="text-align: left">{escaped(name)}</th><td style="text-align: left">{escaped(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def text(words: str) -> str:
    """Return a text as a paragraph, with its line breaks."""
    return f'<p style="white-space: pre-wrap; text-align: left">{escaped(words)}</p>'


def small(words: str) -> str:
    """Return a remark."""
    return f"<p><small>{escaped(words)}</small></p>"


def folded(summary: str, *parts: str) -> str:
    """Return HTML that is seen once its summary is chosen."""
    return f"<details><summary>{escaped(summary)}</summary>{''.join(parts)}</details>"


def picture(source: PictureSource | None, size: tuple[int, int], boxes: Sequence[Box], points: Sequence[Point]) -> str:
    """Return an image with shapes on it, or a frame of its size and why it is not shown.

    Args:
        source: Where it is; None if that is not known.
        size: Width and height in pixels, before it was resized.
        boxes: In its pixels.
        points: In its pixels.

    Returns:
        Nothing if the image is not there, and no shapes are.
    """
    pixels, reason = None, "it is not kept with the answer"
    try:
        pixels = None if source is None else source.load()
        if pixels is not None and pixels.shape[1::-1] != size:
            pixels, reason = None, "it has changed since"
    except Qwen3VLError as error:
        reason = one_line(error.message, _LONGEST_REASON)
    if pixels is None and not (boxes or points):
        return ""
    drawn = _drawing(pixels, size, boxes, points)
    return drawn if pixels is not None else f"{drawn}{small(f'The image is not shown: {reason}')}"


def _drawing(pixels: RgbImage | None, size: tuple[int, int], boxes: Sequence[Box], points: Sequence[Point]) -> str:
    """Return shapes on their image as SVG, in pixels of the image."""
    width, height = size
    scale = max(width, height) / min(_LARGEST_SIDE, max(width, height))
    parts = []
    if pixels is None:
        parts.append(f'<rect width="{width}" height="{height}" fill="#dddddd"/>')
    else:
        parts.append(f'<image href="{_data_url(pixels)}" width="{width}" height="{height}"/>')
    shapes: list[Box | Point] = [*boxes, *points]
    labels = list(dict.fromkeys(each.label for each in shapes))
    for box in boxes:
        colour = _COLOURS[labels.index(box.label) % len(_COLOURS)]
        parts.append(
            f'<rect x="{box.x1:.1f}" y="{box.y1:.1f}" width="{box.x2 - box.x1:.1f}" height="{box.y2 - box.y1:.1f}" '
            f'fill="none" stroke="{colour}" stroke-width="{2 * scale:.1f}"/>'
        )
        parts.append(_label(box.label, box.x1, box.y1, scale, colour))
    for point in points:
        colour = _COLOURS[labels.index(point.label) % len(_COLOURS)]
        parts.append(
            f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="{4 * scale:.1f}" fill="{colour}" stroke="#ffffff" '
            f'stroke-width="{scale:.1f}"/>'
        )
        parts.append(_label(point.label, point.x + 6 * scale, point.y, scale, colour))
    return (
        f'<svg role="img" aria-label="the image, with {len(boxes)} boxes and {len(points)} points" '
        f'viewBox="0 0 {width} {height}" width="{width / scale:.0f}" height="{height / scale:.0f}" '
        f'style="max-width: 100%; height: auto">{"".join(parts)}</svg>'
    )


def _label(label: str, x: float, y: float, scale: float, colour: str) -> str:
    # White around the letters, so that they are read on any ground; within the image where the box is at its edge.
    return (
        f'<text x="{x:.1f}" y="{max(y - 3 * scale, 12 * scale):.1f}" font-family="sans-serif" '
        f'font-size="{12 * scale:.1f}" fill="{colour}" stroke="#ffffff" stroke-width="{3 * scale:.1f}" '
        f'paint-order="stroke">{escaped(label, _LONGEST_LABEL)}</text>'
    )


def _data_url(pixels: RgbImage) -> str:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
