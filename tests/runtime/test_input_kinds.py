"""A kind of input is one file in runtime/input_kinds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import PICTURES, ROOT
from runtime.input_kinds.registry import input_kinds, kind_of

# A kind that no model was trained for: a page of one colour, held by the token of videos, which the tokenizer knows.
PAGE = """
import numpy as np
from runtime.image_processor import process_image
from runtime.input_kinds.kind import InputKind, Insertion


class Page(InputKind):
    name, token, part_types = "page", "<|video_pad|>", ("page",)
    placeholder, path_keys = {"type": "video", "video": "<page>"}, ()

    def source(self, part, place):
        return int(part["grey"])

    def process(self, source, settings, on_images=None):
        return process_image(np.full((64, 96, 3), source, np.uint8), settings.image)

    def expansion(self, processed):
        return (Insertion("", processed, ""),)


KIND = Page()
"""
# One whose token no tokenizer has.
SHEET = PAGE.replace("page", "sheet").replace("<|video_pad|>", "<|sheet_pad|>")
USE = """
import sys
from runtime.model import Qwen3VLModel
model = Qwen3VLModel.from_engine(sys.argv[1])
image = {"type": "image", "image": sys.argv[2]}
parts = [image, {"type": "page", "grey": 9}, image, {"type": "page", "grey": 200}, {"type": "text", "text": "Read."}]
prepared = model.prepare([{"role": "user", "content": parts}])
print([image.grid_thw for image in prepared.images])
print([int((image.pixel_values.std(axis=0) > 1e-6).any()) for image in prepared.images])
print([prepared.prompt.input_ids[span.start] == model.config.video_token_id for span in prepared.prompt.spans])
try:
    model.prepare([{"role": "user", "content": [image, {"type": "sheet", "grey": 9}]}])
except Exception as error:
    print([type(error).__name__, str(error)])
print(len(model.generate([{"role": "user", "content": parts}], max_new_tokens=2).token_ids))
"""


@pytest.mark.portable
def test_images_and_videos_are_the_kinds() -> None:
    image, video = input_kinds()
    assert (image.name, video.name) == ("image", "video")
    assert [kind_of(name) for name in ("image", "image_url", "input_image")] == 3 * [image]
    assert [kind_of(name) for name in ("video", "video_url", "input_video")] == 3 * [video]
    assert kind_of("audio") is None


def copied_with(folder: Path, **kinds: str) -> None:
    """Copy the runtime with other kinds than videos, whose token they take."""
    shutil.copytree(ROOT / "runtime", folder / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "runtime" / "input_kinds" / "video.py").unlink(missing_ok=True)
    for name, source in kinds.items():
        (folder / "runtime" / "input_kinds" / f"{name}.py").write_text(source)


def test_a_new_kind_is_one_new_file(demo_engine: Path, tmp_path: Path) -> None:
    """In a copy of the runtime: mixed with images, in any order, each place gets its own.

    A kind whose token the tokenizer lacks is refused where it is used, and nowhere else.
    """
    copied_with(tmp_path, page=PAGE, sheet=SHEET)
    command = [sys.executable, "-c", USE, str(demo_engine), str(PICTURES / "held_out_0.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grids, varied, is_page, refused, num_tokens = map(eval, done.stdout.splitlines())
    assert grids[0] == grids[2] != grids[1] == grids[3]
    assert varied == [1, 0, 1, 0] and is_page == [False, True, False, True]
    assert refused == [
        "UsageError", "this model has no token for sheets\n  remedy: leave them out of the messages"
    ]  # fmt: skip
    assert np.all(np.array(grids)[:, 0] == 1) and num_tokens in (1, 2)


@pytest.mark.parametrize("shared", ["token", "part type"])
def test_two_kinds_share_nothing(shared: str, tmp_path: Path) -> None:
    twin = (
        PAGE.replace("<|video_pad|>", "<|image_pad|>") if shared == "token" else PAGE.replace('("page",)', '("image",)')
    )
    copied_with(tmp_path, page=twin)
    command = [sys.executable, "-c", "from runtime.input_kinds.registry import input_kinds; input_kinds()"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError: two kinds of input share one of [" in done.stderr
