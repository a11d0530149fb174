"""Write pictures: an answer's boxes on its image, and images and videos as the model sees them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.drawing import draw_shapes, sheet_of, with_caption
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
    from runtime.model import Qwen3VLModel
    from runtime.video.processor import ProcessedVideo

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MOST_SHEET_PIXELS = 60_000_000


@dataclass(frozen=True)
class Pictures:
    """Pictures to write beside an answer.

    Attributes:
        draw: Write the first image with the boxes and points of the answer on it to this file.
        show_input: Write images and frames as the model sees them: all in this file, or each in this folder.
    """

    draw: Annotated[Path | None, typer.Option(metavar="FILE.png")] = None
    show_input: Annotated[Path | None, typer.Option(metavar="FILE.png|FOLDER")] = None

    def check(self, images: Sequence[str]) -> None:
        """Raise before any work if they cannot be written.

        Raises:
            UsageError: A name is not one of a picture, or there is no image to draw on.
        """
        if self.draw is not None:
            if not images:
                raise UsageError("--draw draws on an image, and there is none", remedy="add --image PATH")
            check_picture("--draw", self.draw, images)
        if self.show_input is not None and self.show_input.suffix.lower() in _SUFFIXES:
            check_picture("--show-input", self.show_input, images)

    def before(self, model: Qwen3VLModel, messages: Any, limits: dict[str, Any], *, is_quiet: bool) -> Any:
        """Show the input, and return the messages to answer: what was read is not read again."""
        if self.show_input is None:
            return messages
        prepared = model.prepare(messages, **limits)
        _note(write_inputs(prepared.inputs, model.preparation.inputs, self.show_input), is_quiet=is_quiet)
        return prepared.messages

    def after(self, model: Qwen3VLModel, answer: str, images: Sequence[str], *, is_quiet: bool) -> None:
        """Draw what the answer found on the first image."""
        if self.draw is not None:
            _note(write_shapes(answer, images[0], self.draw, model.max_image_pixels), is_quiet=is_quiet)


def check_picture(option: str, path: Path, sources: Sequence[str] = ()) -> None:
    """Raise before any work if a picture cannot be written.

    Args:
        option: In messages.
        path: Where it is to be written.
        sources: Files that it must not replace.

    Raises:
        UsageError: The name has no ending of a picture, its folder does not exist, or it is one of `sources`.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"{option} {shown(path)}: expected a name that ends in {', '.join(_SUFFIXES)}", remedy="write out.png"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {shown(path)}: not a file in a folder that exists", remedy="make the folder first")
    if any(os.path.exists(source) and path.exists() and path.samefile(source) for source in sources):
        raise UsageError(f"{option} {shown(path)}: that is an image of the prompt", remedy="give another name")


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
    if path.suffix.lower() not in _SUFFIXES:
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


def _note(text: str, *, is_quiet: bool) -> None:
    if not is_quiet:
        print(text, file=sys.stderr)
