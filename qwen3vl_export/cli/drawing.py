"""Draw with Pillow: boxes and points of an answer on an image, and captions under what the model sees.

Sizes of lines and letters follow the picture's. Lines have a dark edge and labels a plate of their own colour, so that
they are seen on any background. A label that finds no room over its box stands inside; none reaches over the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from runtime.grounding import Box, Point

    Color = tuple[int, int, int]
    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of files that pictures are written to."""

_COLORS: tuple[Color, ...] = (
    *((255, 221, 51), (64, 224, 255), (255, 105, 180), (130, 255, 90)),
    *((255, 150, 40), (190, 150, 255), (255, 95, 85), (240, 240, 240)),
)
_DARK: Color = (16, 16, 16)
_LIGHT: Color = (240, 240, 240)
_LONGEST_LABEL = 200
_SMALLEST_FONT, _LARGEST_FONT = 10, 200


class _Pen(NamedTuple):
    draw: ImageDraw.ImageDraw
    font: Font
    width: int
    size: tuple[int, int]


def draw_shapes(image: Image.Image, boxes: Sequence[Box], points: Sequence[Point]) -> Image.Image:
    """Return an RGB copy of an image with boxes, points and their labels. Shapes of one label have one colour.

    Args:
        image: The upright image.
        boxes: In its pixels.
        points: In its pixels.
    """
    from PIL import ImageDraw

    picture = image.convert("RGB").copy()
    side = min(picture.size)
    pen = _Pen(ImageDraw.Draw(picture), font_of(max(side, 320) / 26), max(2, round(side / 200)), picture.size)
    colors: dict[str, Color] = {}
    shapes: list[Box | Point] = [*boxes, *points]
    for shape in shapes:
        colors.setdefault(shape.label, _COLORS[len(colors) % len(_COLORS)])
    for box in boxes:
        _draw_box(pen, (box.x1, box.y1, box.x2, box.y2), colors[box.label])
    for point in points:
        _draw_point(pen, point, colors[point.label])
    # Labels last: no line goes through one.
    for box in boxes:
        _draw_label(pen, box.label, box.x1, box.y1, colors[box.label], below=pen.width)
    radius = _radius(pen)
    for point in points:
        _draw_label(pen, point.label, point.x + radius, point.y - radius, colors[point.label], below=2 * radius)
    return picture


def with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return a copy of a picture with a line of text under it, as wide as the wider of both."""
    from PIL import Image, ImageDraw

    font = font_of(14)
    left, top, right, bottom = ImageDraw.Draw(picture).textbbox((0, 0), caption, font=font)
    margin = 6
    width = max(picture.width, round(right - left) + 2 * margin)
    framed = Image.new("RGB", (width, picture.height + round(bottom - top) + 2 * margin), _DARK)
    framed.paste(picture, (0, 0))
    ImageDraw.Draw(framed).text((margin - left, picture.height + margin - top), caption, fill=_LIGHT, font=font)
    return framed


def sheet_of(pictures: Sequence[Image.Image], width: int = 1600) -> Image.Image:
    """Return one image with pictures side by side, in rows no wider than `width` or the widest of them."""
    from PIL import Image

    places, size = _places([picture.size for picture in pictures], width)
    sheet = Image.new("RGB", size, _DARK)
    for picture, place in zip(pictures, places, strict=True):
        sheet.paste(picture, place)
    return sheet


def font_of(size: float) -> Font:
    """Return Pillow's own font in a size of pixels, or its only size where Pillow was built without FreeType."""
    from PIL import ImageFont

    return ImageFont.load_default(min(max(size, _SMALLEST_FONT), _LARGEST_FONT))


def _places(sizes: Sequence[tuple[int, int]], width: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return the upper left corner of each picture, and the size of all."""
    gap, left, top, row_height, full_width = 8, 0, 0, 0, 0
    places = []
    for wide, high in sizes:
        if left and left + wide > width:
            left, top, row_height = 0, top + row_height + gap, 0
        places.append((left, top))
        full_width, row_height = max(full_width, left + wide), max(row_height, high)
        left += wide + gap
    return places, (full_width, top + row_height)


def _draw_box(pen: _Pen, corners: tuple[float, float, float, float], color: Color) -> None:
    x1, y1, x2, y2 = corners
    edge = max(1, pen.width // 2)
    # Kept inside the picture: a box as large as it still shows all its lines.
    x1, y1 = (min(max(edge, value), side - 1) for value, side in zip((x1, y1), pen.size, strict=True))
    x2, y2 = (
        max(min(value, side - 1 - edge), start) for value, side, start in zip((x2, y2), pen.size, (x1, y1), strict=True)
    )
    pen.draw.rectangle((x1 - edge, y1 - edge, x2 + edge, y2 + edge), outline=_DARK, width=pen.width + 2 * edge)
    pen.draw.rectangle((x1, y1, x2, y2), outline=color, width=pen.width)


def _radius(pen: _Pen) -> int:
    return 3 * pen.width


def _draw_point(pen: _Pen, point: Point, color: Color) -> None:
    radius = _radius(pen)
    for size, fill in ((radius + pen.width, _DARK), (radius, color), (radius / 3, _DARK)):
        pen.draw.ellipse((point.x - size, point.y - size, point.x + size, point.y + size), fill=fill)


def _draw_label(pen: _Pen, label: str, x: float, y: float, color: Color, *, below: int) -> None:
    """Write a label on a plate whose lower left corner is at x, y, or that begins `below` it where no room is left."""
    label = " ".join("".join(character if character.isprintable() else " " for character in label).split())
    if not label:
        return
    margin = max(2, pen.width)
    label = _shortened(pen, label, pen.size[0] - 2 * margin)
    left, top, right, bottom = pen.draw.textbbox((0, 0), label, font=pen.font)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(x, pen.size[0] - width))
    y = y - height if y >= height else y + below
    y = max(0, min(y, pen.size[1] - height))
    pen.draw.rectangle((x, y, x + width, y + height), fill=color)
    pen.draw.text((x + margin - left, y + margin - top), label, fill=_DARK, font=pen.font)


def _shortened(pen: _Pen, label: str, width: int) -> str:
    """Cut a label to a width, with three dots at its end."""
    cut = label[:_LONGEST_LABEL]
    while cut and pen.draw.textlength(cut if cut == label else cut + "...", font=pen.font) > width:
        cut = cut[:-1]
    return cut if cut == label else cut + "..."
