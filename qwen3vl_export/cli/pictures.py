"""Write pictures: an answer's boxes on its image, and images and videos as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_export.cli.drawing import PICTURE_SUFFIXES, draw_shapes, sheet_of, with_caption
from runtime.errors import CapacityError, UsageError
from runtime.grounding import find_boxes, find_points
from runtime.image_processor import ProcessedImage
from runtime.images import load_image
from runtime.patches import assemble_frames
from runtime.shown import shown

if TYPE_CHECKING:
    from PIL import Image

    from runtime.image_config import ImageProcessorConfig
    from runtime.images import RgbImage
    from runtime.input_kinds.kind import InputSettings
    from runtime.video.processor import ProcessedVideo

_MOST_SHEET_PIXELS = 60_000_000


def write_shapes(text: str, source: str, path: Path, max_image_pixels: int) -> str:
    """Draw the boxes and points of an answer on an image and return what was drawn, in words.

    Raises:
        UsageError: The picture cannot be written.
    """
    from PIL import Image

    image = Image.fromarray(load_image(source, max_image_pixels=max_image_pixels))
    boxes, points = find_boxes(text, image.size), find_points(text, image.size)
    _save(draw_shapes(image, boxes, points), path)
    num_boxes = f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'}"
    return f"{num_boxes} and {len(points)} point{'' if len(points) == 1 else 's'} drawn: {shown(path)}"


def write_inputs(inputs: Sequence[ProcessedImage | ProcessedVideo], settings: InputSettings, path: Path) -> str:
    """Write images and frames as the vision tower gets them, each with a caption, and return what was written.

    Args:
        inputs: Those of a prompt, in order: `Prepared.inputs`.
        settings: Those that patches were normalised with.
        path: A picture with all of them, if its name ends as one's does; else a folder for a picture of each.

    Raises:
        CapacityError: One picture of all would be very large.
        UsageError: It cannot be written.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        count = 0
        for name, picture in _pictures(inputs, settings):
            _save(picture, path / f"{name}.png")
            count += 1
        return f"{count} picture{'' if count == 1 else 's'} of the input: {shown(path)}"
    kept, num_pixels = [], 0
    for _, picture in _pictures(inputs, settings):
        num_pixels += picture.width * picture.height
        if num_pixels > _MOST_SHEET_PIXELS:
            raise CapacityError(
                f"--show-input {shown(path)}: the pictures have more than {_MOST_SHEET_PIXELS} pixels together",
                remedy=f"name a folder, such as {shown(path.with_suffix(''))}, or lower --max-visual-tokens",
            )
        kept.append(picture)
    _save(sheet_of(kept), path)
    return f"the input as the model sees it: {shown(path)}"


def _pictures(inputs: Sequence[Any], settings: InputSettings) -> Iterator[tuple[str, Image.Image]]:
    """Yield a name and a captioned picture of every image and frame."""
    from PIL import Image

    num_images = num_videos = 0
    for each in inputs:
        if isinstance(each, ProcessedImage):
            num_images += 1
            frame_HWC = _frames(each, settings.image)[0]
            caption = f"image {num_images}: {_sizes(each, frame_HWC.shape)}, {each.num_visual_tokens} tokens"
            yield f"image-{num_images:02}", with_caption(Image.fromarray(frame_HWC), caption)
            continue
        num_videos += 1
        for number, (segment, seconds) in enumerate(zip(each.segments, each.timestamps, strict=True), 1):
            frames = _frames(segment, settings.video.image)
            for part, frame_HWC in enumerate(frames, 1):
                caption = (
                    f"video {num_videos}, patch {number} of {len(each.segments)} at {seconds:.1f} s, frame {part}: "
                    f"{_sizes(segment, frame_HWC.shape)}, {segment.num_visual_tokens} tokens a patch"
                )
                name = f"video-{num_videos:02}-patch-{number:04}-frame-{part}"
                yield name, with_caption(Image.fromarray(frame_HWC), caption)


def _frames(segment: ProcessedImage, config: ImageProcessorConfig) -> list[RgbImage]:
    return assemble_frames(segment.pixel_values, segment.grid_thw, config)


def _sizes(segment: ProcessedImage, shape: tuple[int, ...]) -> str:
    height, width = shape[:2]
    if (width, height) == segment.source_size:
        return f"{width} x {height}"
    return f"{width} x {height} of {segment.source_size[0]} x {segment.source_size[1]}"


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:  # a JPEG or WebP file has a largest side
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{shown(path)}: cannot be written: {error}", remedy="check the folder, or write a PNG file")
