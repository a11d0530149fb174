"""Settings of a checkpoint's video processor, in the forms that releases have written."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.errors import CapacityError, CheckpointError, ImageError, UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.input_limits import InputLimits
from runtime.video.config import VideoProcessorConfig

pytestmark = pytest.mark.portable

IMAGE = ImageProcessorConfig(patch_size=16, image_mean=(0.4, 0.5, 0.6), image_std=(0.5,) * 3, resample=2)
# As published with Qwen3-VL.
QWEN3_VL: dict[str, Any] = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}
CLASS = {"min_pixels": 131_072, "max_pixels": 786_432, "fps": 2.0, "min_frames": 4, "max_frames": 768}


def test_what_a_file_leaves_out_is_as_in_the_class() -> None:
    config = VideoProcessorConfig.from_dict({"fps": 3, "cap_pixels_per_frame": None}, IMAGE)
    assert (config.image.image_mean, config.image.resample) == ((0.5,) * 3, 3)
    assert {name: getattr(config, name) for name in CLASS} == {**CLASS, "fps": 3.0}
    assert (config.do_sample_frames, config.num_frames, config.cap_pixels_per_frame) == (True, None, False)


def test_without_a_file_what_images_have_is_theirs() -> None:
    config = VideoProcessorConfig.from_dict({}, IMAGE)
    assert (config.image.image_mean, config.image.resample) == (IMAGE.image_mean, 2)
    assert {name: getattr(config, name) for name in CLASS} == CLASS


def test_the_published_file_is_read() -> None:
    config = VideoProcessorConfig.from_dict(QWEN3_VL, IMAGE)
    assert (config.min_pixels, config.max_pixels, config.factor) == (4096, 25165824, 32)
    # No effect on transformers' class.
    assert VideoProcessorConfig.from_dict({**QWEN3_VL, "min_pixels": 5000, "max_pixels": None}, IMAGE) == config
    assert VideoProcessorConfig.from_dict({"video_processor": QWEN3_VL}, IMAGE) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video_processor_type": "Qwen2VLVideoProcessor"}, "video_processor_type is 'Qwen2VLVideoProcessor'"),
        ({"size": {"shortest_edge": 4096}}, "size: expected shortest_edge and longest_edge"),
        ({"size": {"height": 4, "width": 4}}, "size: expected shortest_edge and longest_edge"),
        ({"size": 64}, "size: expected .* found 64"),
        ({"size": {"shortest_edge": 9, "longest_edge": 4}}, "min_pixels 9 is above max_pixels 4"),
        ({"size": {"shortest_edge": 0, "longest_edge": 4}}, "min_pixels must be at least 1"),
        ({"min_frames": 800}, "min_frames 800 is above max_frames 768"),
        ({"fps": 0}, "fps must be in"),
        ({"fps": float("nan")}, "fps must be in"),
        ({"num_frames": 2.5}, "num_frames must be an integer"),
        ({"do_sample_frames": 1}, "do_sample_frames must be True or False"),
        ({"do_pad": True}, "do_pad: expected false"),
        ({"patch_size": None}, "patch_size: null"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"resample": 0}, "resample: expected 3"),
        ({"frames_per_second": 2}, "unknown keys 'frames_per_second'; known are "),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"^video processor settings: .*{words}") as caught:
        VideoProcessorConfig.from_dict({**QWEN3_VL, **changes}, IMAGE)
    assert caught.value.remedy


def test_a_request_limits_each_frame() -> None:
    config = VideoProcessorConfig.from_dict(QWEN3_VL, IMAGE)
    limited = config.with_limits(InputLimits(max_pixels=64 * 64, max_frames=2, fps=1.0))
    assert limited.target_size(2, 640, 640) == (64, 64)
    assert len(limited.sample_indices(1000, 10.0)) == 2
    larger = config.with_limits(InputLimits(min_pixels=320 * 320))
    assert larger.target_size(2, 64, 64) == (320, 320)
    assert config.changed({"num_frames": 3}).changed({"fps": 1.0}).num_frames is None
    with pytest.raises(UsageError, match="min_frames 9 is above max_frames 2"):
        config.changed({"min_frames": 9, "max_frames": 2})


def test_no_header_and_no_option_leads_to_endless_work() -> None:
    config = VideoProcessorConfig.from_dict(QWEN3_VL, IMAGE)
    assert len(config.sample_indices(1 << 50, 1e-6)) == 768
    assert len(config.sample_indices(1 << 50, 1e-300)) == 768
    for changes in ({"do_sample_frames": False}, {"num_frames": 1 << 40}, {"max_frames": 1 << 40}):
        with pytest.raises(CapacityError, match="frames of a video would be taken, expected at most 65536"):
            config.changed(changes).sample_indices(1 << 50, 1e-6)


def test_thin_frames_are_refused() -> None:
    config = VideoProcessorConfig.from_dict(QWEN3_VL, IMAGE)
    with pytest.raises(ImageError, match=r"sides of a ratio of at most 200, found 201\.0"):
        config.target_size(4, 201 * 64, 64)
