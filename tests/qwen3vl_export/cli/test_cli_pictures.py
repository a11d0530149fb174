"""Pictures beside an answer: boxes and points drawn, and images and videos as the model sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import call
from qwen3vl_export.cli.drawing import draw_shapes, sheet_of, with_caption
from qwen3vl_export.cli.pictures import write_inputs, write_shapes
from qwen3vl_export.cli.run import app
from runtime.errors import CapacityError, UsageError
from runtime.grounding import Box, Point
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image, segment
from runtime.input_kinds.kind import InputSettings
from runtime.resize import resize
from runtime.video.config import VideoProcessorConfig
from runtime.video.processor import ProcessedVideo

CONFIG = ImageProcessorConfig(16, 2, 2, 4096, 1 << 20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SETTINGS = InputSettings(CONFIG, VideoProcessorConfig(CONFIG), 10**6)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the smallest rectangle that holds all pixels that differ."""
    differs = (np.asarray(before) != np.asarray(after)).any(axis=2)
    if not differs.any():
        return None
    rows, columns = (np.flatnonzero(differs.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def test_lines_lie_on_the_box_and_what_is_inside_is_left() -> None:
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    drawn = draw_shapes(image, [Box("", 100, 120, 300, 360)], [])
    left, top, right, bottom = changed(image, drawn) or pytest.fail("nothing was drawn")
    assert max(abs(left - 100), abs(top - 120), abs(right - 300), abs(bottom - 360)) <= 4
    assert drawn.getpixel((200, 240)) == (90, 90, 90)
    assert changed(image, Image.new("RGB", image.size, (90, 90, 90))) is None  # the source is not drawn on


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (255, 221, 51), (128, 128, 128)])
def test_lines_differ_from_every_background(color: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (640, 480), color)
    drawn = np.asarray(draw_shapes(image, [Box("", 100, 120, 300, 360)], [Point("", 500, 240)])).astype(int)
    for patch in (drawn[230:250, 90:110], drawn[225:255, 485:515]):
        assert np.abs(patch - color).sum(axis=2).max() > 200


@pytest.mark.parametrize("size", [(640, 480), (60, 40), (33, 900), (1, 1), (3000, 50)])
@pytest.mark.parametrize(
    "label", ["cat", "a label far longer than any picture is wide " * 9, "日本\n\x00", "W" * 50_000]
)
def test_labels_and_shapes_of_every_place_are_drawn_inside(size: tuple[int, int], label: str) -> None:
    width, height = size
    boxes = [Box(label, 0, 0, width, height), Box(label, width, height, width, height), Box(label, 0, 0, 0, 0)]
    points = [Point(label, 0, 0), Point(label, width, height)]
    image = Image.new("RGB", size, (90, 90, 90))
    drawn = draw_shapes(image, boxes, points)
    assert drawn.size == size and changed(image, drawn) is not None


def test_a_label_at_the_edge_is_whole() -> None:
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    for x, y in ((0, 0), (639, 0), (0, 479), (639, 479), (320, 240)):
        with_label, without = (draw_shapes(image, [Box(label, x, y, x, y)], []) for label in ("wooden chair", ""))
        left, top, right, bottom = changed(with_label, without) or pytest.fail("no label")
        # Of one size wherever it stands, but for where the dot of the box was there before.
        assert right - left > 100 and 12 < bottom - top < 60


def test_letters_grow_with_the_picture() -> None:
    heights = []
    for side in (400, 1600):
        image = Image.new("RGB", (side, side), (90, 90, 90))
        pair = [draw_shapes(image, [Box(label, side / 2, side / 2, side, side)], []) for label in ("cat", "")]
        _, top, _, bottom = changed(*pair) or pytest.fail("no label")
        heights.append(bottom - top)
    assert 2.5 < heights[1] / heights[0] < 5


def test_shapes_of_one_label_have_one_colour() -> None:
    image = Image.new("RGB", (600, 200), (90, 90, 90))
    boxes = [Box("a", 20, 60, 150, 180), Box("b", 220, 60, 350, 180), Box("a", 420, 60, 550, 180)]
    drawn = draw_shapes(image, boxes, [])
    colors = [drawn.getpixel((int(box.x1), 150)) for box in boxes]
    assert colors[0] == colors[2] != colors[1]


def test_boxes_are_drawn_on_the_upright_original(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source, path = tmp_path / "phone.png", tmp_path / "out.png"
    Image.new("RGB", (800, 400), (90, 90, 90)).save(source, exif=exif)
    words = write_shapes('[{"bbox_2d": [500, 0, 1000, 500]}, {"point_2d": [1, 2]}]', str(source), path, 10**6)
    assert words == f"1 box and 1 point drawn: '{path}'"
    drawn = np.asarray(Image.open(path)).astype(int)
    assert drawn.shape == (800, 400, 3)
    assert (np.abs(drawn[200, 195:206] - 90).sum(axis=1) > 0).any()  # the left line, x = 200
    assert (drawn[200, 280:320] == 90).all()


def test_the_input_is_shown_as_it_was_resized(tmp_path: Path) -> None:
    source = noise(300, 431)
    image = process_image(source, CONFIG)
    frames = [noise(64, 96, seed) for seed in range(3)]
    video = ProcessedVideo((segment(frames[:2], CONFIG), segment(frames[2:], CONFIG)), (0.25, 1.0), 3)
    assert write_inputs([image, video, image], SETTINGS, tmp_path / "seen").startswith("6 pictures of the input")
    found = {path.name: np.asarray(Image.open(path)) for path in sorted((tmp_path / "seen").iterdir())}
    assert list(found) == [
        *("image-01.png", "image-02.png"),
        *(f"video-01-patch-{patch:04}-frame-{frame}.png" for patch in (1, 2) for frame in (1, 2)),
    ]
    height, width = (16 * side for side in image.grid_thw[1:])
    assert (found["image-01.png"][:height, :width] == resize(source, height, width)).all()
    # A caption follows below.
    assert found["image-01.png"].shape[0] > height and (found["image-01.png"][height:] > 200).any()
    shown = [each[:64, :96] for name, each in found.items() if name.startswith("video")]
    for one, other in zip(shown, [*frames, frames[2]], strict=True):
        assert (one == other).all()


def test_one_picture_of_all_the_input(tmp_path: Path) -> None:
    images = [process_image(noise(64, 96, seed), CONFIG) for seed in range(3)]
    path = tmp_path / "seen.png"
    assert write_inputs(images, SETTINGS, path) == f"the input as the model sees it: '{path}'"
    sheet = np.asarray(Image.open(path))
    assert (sheet[:64, :96] == noise(64, 96, 0)).all()
    large = [process_image(noise(1024, 1024), CONFIG)] * 60
    with pytest.raises(CapacityError, match="more than 60000000 pixels") as caught:
        write_inputs(large, SETTINGS, path)
    assert "name a folder" in str(caught.value.remedy)


def test_sheets_have_rows_and_captions_their_whole_text() -> None:
    pictures = [Image.new("RGB", (size, size), (9, 9, 200)) for size in (60, 60, 60, 150)]
    sheet = sheet_of(pictures, width=140)
    assert sheet.size == (150, 60 + 8 + 60 + 8 + 150)
    blue = (np.asarray(sheet) == (9, 9, 200)).all(axis=2)
    assert blue.sum() == 3 * 60 * 60 + 150 * 150
    assert with_caption(pictures[0], "a long caption under a small picture").width > 150


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draw", "{folder}/out.png"], "--draw draws on an image, and there is none"),
        (["--image", "{folder}/a.png", "--draw", "{folder}/out.txt"], "expected a name that ends in .png"),
        (["--image", "{folder}/a.png", "--draw", "{folder}/no/out.png"], "not a file in a folder that exists"),
        (["--image", "{folder}/a.png", "--draw", "{folder}/a.png"], "that is an image of the prompt"),
        (["--image", "{folder}/a.png", "--show-input", "{folder}/./a.png"], "that is an image of the prompt"),
    ],
)
def test_pictures_are_checked_before_the_engine_is_opened(tmp_path: Path, options: list[str], words: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = [option.format(folder=tmp_path) for option in options]
    code, out, err = call(app, "run", str(tmp_path / "no-engine"), "Find.", *given)
    assert (code, out) == (2, "") and words in err


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be written"):
        write_inputs([process_image(noise(64, 64), CONFIG)], SETTINGS, tmp_path / "file" / "folder")


def test_run_shows_and_draws(demo_engine: Path, tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "qwen3vl_export/demo/images/held_out_0.png"
    seen, drawn = tmp_path / "seen", tmp_path / "drawn.png"
    plain = ["run", str(demo_engine), "Read the digits.", "--image", str(source)]
    code, out, err = call(app, *plain, "--show-input", str(seen), "--draw", str(drawn))
    assert (code, out.strip()) == (0, "1654"), err
    assert "1 pictures of the input" not in err and "1 picture of the input" in err
    assert "0 boxes and 0 points drawn" in err
    assert (np.asarray(Image.open(drawn)) == np.asarray(Image.open(source).convert("RGB"))).all()
    assert [path.name for path in seen.iterdir()] == ["image-01.png"]
    quiet = call(app, *plain, "--draw", str(drawn), "--quiet")
    assert (quiet[0], quiet[1].strip(), quiet[2]) == (0, "1654", "")
