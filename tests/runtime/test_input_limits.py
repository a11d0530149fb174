"""Limits on images and videos: of the engine, of a request and of a part, and a budget for all together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import CapacityError, UsageError
from runtime.input_limits import InputLimits, common_limit
from runtime.model import Qwen3VLModel

FACTOR = 32  # pixels along a side of a visual token of the demo


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(num_frames)])


def image(array: np.ndarray, **limits: Any) -> dict[str, Any]:
    return {"type": "image", "image": array, **limits}


def video(array: np.ndarray, **limits: Any) -> dict[str, Any]:
    return {"type": "video", "video": array, "sample_fps": 2, **limits}


def tokens(model: Qwen3VLModel, *parts: dict[str, Any], **limits: Any) -> list[int]:
    prepared = model.prepare([{"role": "user", "content": list(parts)}], **limits)
    assert prepared.num_visual_tokens == sum(each.num_visual_tokens for each in prepared.inputs)
    return [each.num_visual_tokens for each in prepared.inputs]


@pytest.mark.portable
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_the_common_limit_is_the_largest_that_fits(counts: list[int], budget: int) -> None:
    limit = common_limit(counts, budget)
    assert sum(min(count, limit) for count in counts) <= budget or limit == 0
    if limit < max(counts):
        assert sum(min(count, limit + 1) for count in counts) > budget


@pytest.mark.portable
def test_a_part_beats_the_request_and_the_request_the_engine(demo_engine: Path, model: Qwen3VLModel) -> None:
    large = picture(256, 320)
    engine = Qwen3VLModel.from_engine(demo_engine, max_pixels=20 * FACTOR**2)
    assert tokens(model, image(large)) == [80]
    assert 0 < tokens(engine, image(large))[0] <= 20
    assert tokens(engine, image(large), max_pixels=80 * FACTOR**2) == [80]
    own = image(large, max_pixels=6 * FACTOR**2)
    assert tokens(engine, own, image(large), max_pixels=80 * FACTOR**2) == [4, 80]
    small = picture(32, 32)
    assert tokens(model, image(small, min_pixels=9 * FACTOR**2), image(small), min_pixels=4 * FACTOR**2) == [9, 4]


@pytest.mark.portable
def test_a_part_can_say_its_size(model: Qwen3VLModel) -> None:
    part = image(picture(100, 100), resized_height=64, resized_width=160)
    (found,) = model.prepare([{"role": "user", "content": [part]}]).images
    assert found.grid_thw == (1, 4, 10)
    frames = video(clip(4, 64, 64), resized_height=33, resized_width=95)
    (found,) = model.prepare([{"role": "user", "content": [frames]}]).inputs
    assert found.grid_thw == (2, 2, 6)


@pytest.mark.portable
def test_low_detail_is_a_small_image(model: Qwen3VLModel) -> None:
    url = "data:image/png;base64," + png_base64(picture(600, 600))
    sizes = []
    for detail in ("low", "high"):
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        sizes.append(tokens(model, part, max_pixels=10**6)[0])
    assert sizes == [256, 361]  # 512 x 512, and 600 x 600 rounded to whole tokens


def png_base64(array: np.ndarray) -> str:
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.portable
def test_frames_of_a_request_and_of_a_part(model: Qwen3VLModel) -> None:
    frames = clip(40, 32, 32)

    def part(**more: Any) -> dict[str, Any]:
        return {"type": "video", "video": frames, "raw_fps": 10, **more}

    def num_frames(*parts: dict[str, Any], **limits: Any) -> list[int]:
        return [each.num_frames for each in model.prepare([{"role": "user", "content": list(parts)}], **limits).inputs]

    assert num_frames(part()) == [8]  # 4 s at the checkpoint's 2 a second
    assert num_frames(part(), fps=1) == [4]
    assert num_frames(part(), part(fps=5), part(num_frames=3), fps=1) == [4, 20, 3]
    assert num_frames(part(), max_frames=6) == [6]
    assert num_frames(part(), min_frames=12) == [12]
    assert num_frames(part(max_frames=2)) == [2]
    assert num_frames(part(nframes=5)) == [4]  # rounded to pairs, as qwen-vl-utils does
    assert num_frames(part(video_start=1, video_end=2)) == [4]
    assert num_frames(part(), num_frames=80) == [80]  # each twice, as transformers has it


@pytest.mark.portable
def test_a_budget_shrinks_the_largest_alone(model: Qwen3VLModel) -> None:
    large, small, frames = picture(256, 320), picture(64, 64), clip(6, 96, 96)
    parts = [image(small), image(large), video(frames), image(large, max_pixels=30 * FACTOR**2)]
    assert tokens(model, *parts) == [4, 80, 27, 24]
    for budget in (135, 134, 100, 60, 30, 12):
        found = tokens(model, *parts, max_visual_tokens=budget)
        assert sum(found) <= budget and found[0] == min(4, found[0])
    assert tokens(model, *parts, max_visual_tokens=135) == [4, 80, 27, 24]
    assert tokens(model, *parts, max_visual_tokens=110)[::2] == [4, 27]
    with pytest.raises(CapacityError, match=r"max_visual_tokens is 5|5 are left|at least"):
        tokens(model, *parts, max_visual_tokens=5)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"fps": 0}, "fps must be in"),
        ({"fps": float("nan")}, "fps must be in"),
        ({"fps": -1}, "fps must be in"),
        ({"fps": 1, "num_frames": 2}, "fps and num_frames both say"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is above max_pixels 8"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames 9 is above max_frames 8"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1"),
        ({"max_frames": "8"}, "max_frames must be an integer"),
    ],
)
def test_bad_limits_are_refused(limits: dict[str, Any], expected: str, model: Qwen3VLModel) -> None:
    with pytest.raises(UsageError, match=expected):
        model.generate("Hi", **limits)
    with pytest.raises(UsageError, match=expected):
        model.prepare("Hi", **limits)


@pytest.mark.portable
def test_unknown_limits_are_refused_with_those_there_are(model: Qwen3VLModel) -> None:
    with pytest.raises(UsageError, match=r"prepare takes no temperature\n.*max_visual_tokens"):
        model.prepare("Hi", temperature=1)  # type: ignore[call-arg]


@pytest.mark.portable
def test_a_turn_lays_its_limits_over_those_of_the_conversation(model: Qwen3VLModel) -> None:
    chat = model.chat(max_visual_tokens=10, max_new_tokens=1)
    assert chat.ask("Read.", images=[picture(256, 320)]).stats.visual_tokens <= 10
    chat.reset()
    assert 10 < chat.ask("Read.", images=[picture(256, 320)], max_visual_tokens=40).stats.visual_tokens <= 40


def test_keywords_and_fields_are_the_same() -> None:
    from dataclasses import fields

    from runtime.input_limits import InputKeywords

    assert set(InputKeywords.__annotations__) == {field.name for field in fields(InputLimits)}


@pytest.mark.portable
def test_what_was_shown_before_counts_and_what_is_new_is_shrunk_into_the_rest(model: Qwen3VLModel) -> None:
    chat = model.chat(max_visual_tokens=64, max_new_tokens=1)
    assert chat.ask("Read.", images=[picture(160, 160)]).stats.visual_tokens == 25
    assert 25 < chat.ask("And this?", images=[picture(256, 320)]).stats.visual_tokens <= 64
    with pytest.raises(CapacityError, match="max_visual_tokens is 26"):
        chat.ask("And this?", images=[picture(256, 320), picture(256, 320, 1)], max_visual_tokens=26)


@pytest.mark.portable
def test_a_video_that_cannot_fit_is_refused_at_its_first_frame(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, max_context=80)
    num_read = 0

    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            nonlocal num_read
            num_read += 1
            return super().__getitem__(index)

    frames = Counted(clip(20, 96, 96))
    part = video(frames)  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match=r"90 visual tokens.*max_context is 80\n.*max_visual_tokens=40.*max_frames"):
        model.generate([{"role": "user", "content": [part]}])
    assert num_read <= 2
    assert model.statistics()["vision_calls"] == 0


@pytest.mark.portable
def test_one_object_in_several_parts_is_read_in_one_thread_at_a_time(
    model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pillow's lazy images, animations, file objects and iterators know no threads."""
    import io

    from PIL import Image

    monkeypatch.setattr("runtime.preparation.default_threads", lambda: 4)
    frames = [Image.fromarray(each) for each in clip(6, 64, 64)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].resize((640, 640)).save(tmp_path / "a.png")
    for _ in range(8):
        lazy = Image.open(tmp_path / "a.png")
        found = tokens(model, image(lazy), image(lazy, max_pixels=4096), image(lazy))
        assert found[0] == found[2] > found[1] == 4
        for whole in (Image.open(tmp_path / "a.gif"), io.BytesIO((tmp_path / "a.gif").read_bytes())):
            part = {"type": "video", "video": whole}
            assert len(set(tokens(model, part, part, part))) == 1
        stream = iter(clip(6, 64, 64))
        part = {"type": "video", "video": stream, "sample_fps": 2}
        assert len(set(tokens(model, part, part, max_visual_tokens=500))) == 1
