"""Break the engine or the runtime, never the reference, and require verification to fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.generation
import runtime.image_processor
import runtime.model
from qwen3vl_export.parity.verify import Report, verify
from runtime.model import Qwen3VLModel
from runtime.sessions.ort_cpu import OrtCpuSession

STEPS = 4


@pytest.fixture(scope="module")
def unbroken(tiny_engine: Path, tiny_checkpoint: Path) -> Report:
    return verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=STEPS)


def patch_vision(patch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    original = OrtCpuSession.vision
    patch.setattr(OrtCpuSession, "vision", lambda self, *inputs: change(original(self, *inputs)))


def deepstack_off(patch: pytest.MonkeyPatch) -> None:
    patch_vision(patch, lambda embeds: np.concatenate([embeds[:1], np.zeros_like(embeds[1:])]))


def deepstack_swapped(patch: pytest.MonkeyPatch) -> None:
    patch_vision(patch, lambda embeds: np.concatenate([embeds[:1], embeds[:0:-1]]))


def align_corners_off(patch: pytest.MonkeyPatch) -> None:
    def half_pixel(h: int, w: int, side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
        from runtime.vision_inputs import patch_coordinates

        taps, weights = [], []
        for coordinate, size in zip(patch_coordinates(h, w, merge), (h, w), strict=True):
            source = np.clip((coordinate + 0.5) * side / size - 0.5, 0, side - 1)
            low = np.floor(source).astype(np.int64)
            taps.append(np.stack([low, np.minimum(low + 1, side - 1)], 1))
            weights.append(np.stack([1 - (source - low), source - low], 1).astype(np.float32))
        indices = taps[0][:, :, None] * side + taps[1][:, None, :]
        return indices.reshape(-1, 4), (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)

    patch.setattr(runtime.model, "position_interpolation", half_pixel)


def patch_decode(patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    original = OrtCpuSession.decode
    names = ("input_ids", "position_ids", "visual_rows", "visual_embeds", "past_lengths", "logits_positions")

    def decode(self: OrtCpuSession, *args: Any) -> Any:
        inputs = dict(zip(names, args[:-1], strict=True))
        change(inputs)
        return original(self, *inputs.values(), args[-1])

    patch.setattr(OrtCpuSession, "decode", decode)


def decode_delta_wrong(patch: pytest.MonkeyPatch) -> None:
    original = runtime.generation.decode_steps
    patch.setattr(
        runtime.generation,
        "decode_steps",
        lambda session, cache, logits, cached, delta, *rest: original(session, cache, logits, cached, 0, *rest),
    )


def cache_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def change(inputs: dict[str, Any]) -> None:
        inputs["past_lengths"] = inputs["past_lengths"] - (inputs["past_lengths"] > 0)

    patch_decode(patch, change)


def mrope_axes_swapped(patch: pytest.MonkeyPatch) -> None:
    def change(inputs: dict[str, Any]) -> None:
        inputs["position_ids"] = inputs["position_ids"][[0, 2, 1]]

    patch_decode(patch, change)


def images_swapped(patch: pytest.MonkeyPatch) -> None:
    original = Qwen3VLModel.encode_images
    patch.setattr(Qwen3VLModel, "encode_images", lambda self, images: original(self, images[::-1]))


def resize_wrong(patch: pytest.MonkeyPatch) -> None:
    def nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
        rows = np.arange(height) * image.shape[0] // height
        columns = np.arange(width) * image.shape[1] // width
        return image[rows][:, columns]

    patch.setattr(runtime.image_processor, "resize_bicubic", nearest)


# What breaks, and the comparison that must notice.
BREAKS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (deepstack_off, "visual_embeds level 1"),
    (deepstack_swapped, "visual_embeds level 1"),
    (align_corners_off, "visual_embeds level 0"),
    (decode_delta_wrong, "greedy logits"),
    (cache_off_by_one, "greedy logits"),
    (mrope_axes_swapped, "layer 0 keys"),
    (images_swapped, "visual_embeds level 0"),
    (resize_wrong, "pixels, grey levels"),
]


@pytest.mark.parametrize(("sabotage", "noticed_by"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_verify_notices(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    noticed_by: str,
    unbroken: Report,
    tiny_engine: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert unbroken.passed, unbroken.render()
    sabotage(monkeypatch)
    report = verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=STEPS)
    assert not report.passed
    assert noticed_by in {check.name for check in report.checks if not check.passed}
