"""A graph that normalises grey levels gives the runtime's own values, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.passes.normalise_pixels import NormalisePixelsPass
from runtime.image_config import NUM_CHANNELS, ImageProcessorConfig
from runtime.patches import PixelScale, grey_levels, normalised, patchify

CONFIGS = {
    "as published": ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
    "of CLIP": ImageProcessorConfig(patch_size=16),
    "without rescaling": ImageProcessorConfig(patch_size=16, do_rescale=False),
    "another factor": ImageProcessorConfig(patch_size=16, rescale_factor=1 / 127.5),
    "rescaled alone": ImageProcessorConfig(patch_size=16, do_normalize=False),
    "as they are": ImageProcessorConfig(patch_size=16, do_normalize=False, do_rescale=False),
    "mean 0": ImageProcessorConfig(patch_size=16, image_mean=(0.0, 0.5, 0.0), image_std=(1.0, 1.0, 0.3)),
}
GRAPH = """
<ir_version: 11, opset_import: ["" : 24]>
pixels (float["I", "P", 1536] pixel_values) => (float["I", "P", 1536] out) { out = Identity (pixel_values) }
"""


def every_level() -> np.ndarray:
    """A frame of 32 x 32 pixels whose first patch holds all 256 levels in each channel, others random ones."""
    random = np.random.default_rng(0)
    frame_HWC = random.integers(0, 256, (32, 32, NUM_CHANNELS), np.uint8)
    for channel in range(NUM_CHANNELS):
        frame_HWC[:16, :16, channel] = random.permutation(256).astype(np.uint8).reshape(16, 16)
    return frame_HWC


def run_pass(text: str = GRAPH) -> tuple[ir.Model, bool]:
    found = NormalisePixelsPass()(ir.from_onnx_text(text))
    return found.model, found.modified


def run(model: ir.Model, levels_IPE: np.ndarray, scale_3E: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"pixel_values": levels_IPE, "pixel_scale": scale_3E})
    return np.asarray(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_levels_of_all_channels_are_equal_to_the_bit(name: str) -> None:
    config, frames = CONFIGS[name], [every_level(), every_level()[::-1].copy()]
    expected, levels = patchify(frames, config), patchify(frames, replace(config, keeps_levels=True))
    assert (expected.dtype, levels.dtype, levels.shape) == (np.float32, np.uint8, expected.shape)
    assert {int(each) for each in levels[0, :256]} == set(range(256))
    scale = PixelScale.of(config)
    found = run(run_pass()[0], np.stack([levels, levels[::-1]]), scale.rows(levels.shape[1]))
    assert np.array_equal(found.view(np.uint32), np.stack([expected, expected[::-1]]).view(np.uint32))
    assert np.array_equal(normalised(levels, scale).view(np.uint32), expected.view(np.uint32))


def test_another_order_of_the_steps_is_not_equal_to_the_bit() -> None:
    config = CONFIGS["of CLIP"]
    levels = patchify([every_level()], replace(config, keeps_levels=True))
    rows = PixelScale.of(config).rows(levels.shape[1])
    folded = np.stack([rows[0], np.ones_like(rows[1]), 1 / rows[1]])  # multiplied by the reciprocal
    found = run(run_pass()[0], levels[None], folded)[0]
    expected = patchify([every_level()], config)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.array_equal(found, expected)


def test_channels_that_are_exchanged_are_seen() -> None:
    config = CONFIGS["of CLIP"]
    levels = patchify([every_level()], replace(config, keeps_levels=True))
    rows = PixelScale.of(config).rows(levels.shape[1])
    found = run(run_pass()[0], levels[None], rows[:, ::-1].copy())[0]
    assert not np.allclose(found, patchify([every_level()], config), atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_levels_are_found_again_in_values(name: str) -> None:
    config = CONFIGS[name]
    values, scale = patchify([every_level()], config), PixelScale.of(config)
    levels = grey_levels(values, scale)
    assert levels is not None and np.array_equal(levels, patchify([every_level()], replace(config, keeps_levels=True)))
    values[1, 5] += np.float32(0.001)
    assert grey_levels(values, scale) is None, "a value between two levels"


def test_the_pass_says_what_it_changed() -> None:
    model, modified = run_pass()
    assert modified
    assert [(value.name, value.dtype) for value in model.graph.inputs] == [
        ("pixel_values", ir.DataType.UINT8),
        ("pixel_scale", ir.DataType.FLOAT),
    ]
    assert [node.op_type for node in model.graph] == ["Cast", "Split", "Sub", "Div", "Mul", "Identity"]
    assert not NormalisePixelsPass()(model).modified, "it is done"
    other, modified = run_pass(GRAPH.replace("pixel_values", "input_ids"))
    assert not modified and [node.op_type for node in other.graph] == ["Identity"]
