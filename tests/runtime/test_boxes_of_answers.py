"""Boxes and points of an answer, in pixels of the picture that was shown."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.answer import Generation
from runtime.errors import UsageError
from runtime.grounding import Box, Point
from runtime.model import Qwen3VLModel

SAID = '[{"bbox_2d": [100, 250, 500, 1000], "label": "cup"}, {"point_2d": [500, 500], "label": "lid"}]'


def photograph(width: int, height: int, orientation: int) -> bytes:
    """A JPEG file that is stored turned."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def answer(demo_engine: Path) -> Generation:
    model = Qwen3VLModel.from_engine(demo_engine)
    parts = [
        {"type": "image", "image": photograph(400, 200, 6), "max_pixels": 4096},  # upright: 200 wide, 400 high
        {"type": "video", "video": np.zeros((3, 120, 90, 3), np.uint8), "sample_fps": 1},
        {"type": "image", "image": np.zeros((100, 1000, 3), np.uint8)},
        {"type": "text", "text": "Where?"},
    ]
    return replace(model.generate([{"role": "user", "content": parts}], max_new_tokens=1), text=SAID)


def test_sizes_are_those_before_resizing(answer: Generation) -> None:
    assert answer.image_sizes == ((200, 400), (90, 120), (1000, 100))


def test_boxes_are_in_pixels_of_the_image_that_is_asked_for(answer: Generation) -> None:
    assert answer.boxes == answer.boxes_on(2) == (Box("cup", 100, 25, 500, 100),)
    assert answer.boxes_on(0) == (Box("cup", 20, 100, 100, 400),)
    assert answer.boxes_on(1) == (Box("cup", 9, 30, 45, 120),)
    assert answer.points == (Point("lid", 500, 50),)
    assert answer.points_on(-3) == (Point("lid", 100, 200),)


def test_an_image_that_is_not_there_is_refused(answer: Generation) -> None:
    for number in (3, -4, "0"):
        with pytest.raises(UsageError, match=r"image = .*one of the 3 images"):
            answer.boxes_on(number)  # type: ignore[arg-type]


def test_without_images_there_are_no_boxes(demo_engine: Path) -> None:
    plain = replace(Qwen3VLModel.from_engine(demo_engine).generate("Hi", max_new_tokens=1), text=SAID)
    assert plain.boxes == plain.points == plain.image_sizes == ()
