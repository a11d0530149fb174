"""Tensors that are not what the checkpoint's processor returns are refused, and say why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.processed import inputs_of, open_processor, picture, video_inputs_of
from qwen3_vl.integrations.optimum import QwenVLForImageTextToText
from qwen3vl_export.integrations.optimum.prompts import read_batch
from qwen3vl_export.sources import shipped_folder
from runtime.errors import UsageError
from runtime.image_processor import process_image

BATCH = (("Read the digits.", 1), ("How many digits are there?", 0), ("Where is the 7?", 2))


@pytest.fixture(scope="module")
def processor() -> Any:
    return open_processor(shipped_folder("demo"))


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[QwenVLForImageTextToText]:
    with QwenVLForImageTextToText.from_pretrained(demo_engine, threads=1, max_context=512) as opened:
        yield opened


Change = Callable[[dict[str, Any]], Any]


def without(*names: str) -> Change:
    return lambda inputs: [inputs.pop(name) for name in names]


def changed(name: str, change: Callable[[torch.Tensor], Any]) -> Change:
    return lambda inputs: inputs.update({name: change(inputs[name])})


def hole(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[2, 5] = 0
    return mask


def token(row: int, place: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.clone()
        ids[row, place] = value
        return ids

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("input_ids"), "input_ids is missing"),
        (without("image_grid_thw"), "pixel_values is given without image_grid_thw"),
        (without("pixel_values"), "image_grid_thw is given without pixel_values"),
        (
            without("pixel_values", "image_grid_thw"),
            "row 0 of input_ids holds image tokens, and pixel_values and image_grid_thw are missing",
        ),
        (
            changed("pixel_values", lambda values: values[:, :1176]),
            r"pixel_values has the shape \[\d+, 1176\], the engine takes \[patches, 1536\]: 2 frames of 16 x 16 pixels",
        ),
        (changed("pixel_values", lambda values: values[None]), r"pixel_values has the shape \[1, \d+, 1536\]"),
        (changed("pixel_values", lambda values: values[:-4]), r"pixel_values holds \d+ patches, image_grid_thw is of"),
        (changed("pixel_values", lambda values: values * 2.5), r"pixel_values goes from -2.5 to 2.5, .* from -1 to 1"),
        (changed("pixel_values", lambda values: values * torch.nan), "pixel_values goes from nan to nan"),
        (changed("pixel_values", lambda values: "x"), "pixel_values has to be a tensor of numbers, got <U1"),
        (changed("image_grid_thw", lambda grid: grid * 2**34), "image_grid_thw has an image of several temporal"),
        (
            changed("image_grid_thw", lambda grid: grid * torch.tensor([1, 2**31, 2**31])),
            r"patches, image_grid_thw is of \d{20}",
        ),
        (changed("image_grid_thw", lambda grid: grid[:, 1:]), r"image_grid_thw has to be \[images, 3\]"),
        (changed("image_grid_thw", lambda grid: grid[0]), "image_grid_thw has to be a tensor of whole numbers with 2"),
        (changed("image_grid_thw", lambda grid: grid.float()), "image_grid_thw has to be a tensor of whole numbers"),
        (changed("image_grid_thw", lambda grid: grid * torch.tensor([1, 1, 0])), "multiples of 2; got"),
        (changed("image_grid_thw", lambda grid: grid + torch.tensor([0, 1, 0])), "multiples of 2; got"),
        (changed("image_grid_thw", lambda grid: grid + torch.tensor([1, 0, 0])), "an image of several temporal"),
        (
            lambda inputs: inputs.update(
                pixel_values=inputs["pixel_values"][:40], image_grid_thw=inputs["image_grid_thw"][:2]
            ),
            "row 2 of input_ids holds more image tokens than the 2 images account for",
        ),
        (
            lambda inputs: inputs.update(
                pixel_values=torch.cat([inputs["pixel_values"], inputs["pixel_values"][:16]]),
                image_grid_thw=torch.cat([inputs["image_grid_thw"], torch.tensor([[1, 4, 4]])]),
            ),
            "the grids are of 4 images, and input_ids hold the tokens of 3 only",
        ),
        (
            changed("image_grid_thw", lambda grid: grid[[1, 0, 2]]),
            r"row 0 of input_ids holds 4 image tokens in a place where the grid \[1, .*\] takes",
        ),
        (
            changed("input_ids", lambda ids: ids[:, 3:]),
            r"attention_mask has the shape \[3, 28\], input_ids \[3, 25\]",
        ),
        (changed("input_ids", lambda ids: ids[:, :0]), r"input_ids has the shape \[3, 0\]: there is no token"),
        (changed("input_ids", lambda ids: ids.float()), "input_ids has to be a tensor of whole numbers with 2 axes"),
        (changed("input_ids", lambda ids: ids[0]), "input_ids has to be a tensor of whole numbers with 2 axes"),
        (changed("input_ids", lambda ids: "Read"), "input_ids has to be a tensor of whole numbers"),
        (changed("input_ids", token(2, -1, 151643)), "input_ids holds the token 151643, the engine has the ids 0 to"),
        (changed("input_ids", token(2, -1, -1)), "input_ids holds the token -1, the engine has the ids 0 to"),
        (changed("attention_mask", hole), "row 2 of attention_mask has a hole"),
        (changed("attention_mask", lambda mask: mask * 0), "row 0 of attention_mask has no token"),
        (changed("attention_mask", lambda mask: mask * 2), "attention_mask holds other numbers than 0 and 1"),
        (changed("attention_mask", lambda mask: mask[None]), "attention_mask has to be a tensor of whole numbers"),
        (
            lambda inputs: inputs.update(mm_token_type_ids=inputs["input_ids"] * 0),
            "mm_token_type_ids marks other tokens than the image",
        ),
        (
            lambda inputs: inputs.update(second_per_grid_ts=[1.0]),
            "second_per_grid_ts is Qwen2.5-VL's; .*: these are inputs of another processor",
        ),
        (lambda inputs: inputs.update(inputs=inputs["input_ids"]), "inputs and input_ids are both given"),
    ],
)
def test_what_is_refused(model: QwenVLForImageTextToText, processor: Any, change: Change, message: str) -> None:
    inputs = dict(inputs_of(processor, *BATCH))
    change(inputs)
    with pytest.raises(UsageError, match=message) as caught:
        model.generate(**inputs, max_new_tokens=1)
    assert caught.value.remedy


def test_videos_are_looked_at_alike(model: QwenVLForImageTextToText, processor: Any) -> None:
    inputs = dict(video_inputs_of(processor, "Read the digits."))
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1
    with pytest.raises(UsageError, match="pixel_values_videos is given without video_grid_thw"):
        model.generate(**{**inputs, "video_grid_thw": None})
    lacking = {**inputs, "pixel_values_videos": None, "video_grid_thw": None}
    with pytest.raises(UsageError, match="video tokens, and pixel_values_videos and video_grid_thw are missing"):
        model.generate(**lacking)
    grid = inputs["video_grid_thw"] - torch.tensor([1, 0, 0])
    fewer = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][: int(grid.prod())], "video_grid_thw": grid}
    with pytest.raises(UsageError, match="holds more video tokens than the 2 temporal patches of videos account for"):
        model.generate(**fewer)


def test_an_engine_that_normalises_gets_the_levels_exactly(model: QwenVLForImageTextToText, processor: Any) -> None:
    preparation = model.engine.preparation
    takes_levels = preparation.for_engine({"pixels": "uint8"}).inputs
    assert takes_levels.image.keeps_levels and not preparation.inputs.image.keeps_levels
    inputs = dict(inputs_of(processor, ("Read the digits.", 1), seed=3))
    (segment,) = read_batch(inputs, model.engine.config, takes_levels).prompts[0].images
    expected = process_image(picture(3, 64), takes_levels.image)
    assert segment.patches.dtype == np.uint8 and np.array_equal(segment.patches, expected.patches)
    assert np.array_equal(segment.pixel_values, inputs["pixel_values"].numpy())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with pytest.raises(UsageError, match="pixel_values is of no grey levels from 0 to 255, which this engine takes"):
        read_batch(inputs, model.engine.config, takes_levels)


def test_images_are_told_apart_by_their_values(model: QwenVLForImageTextToText, processor: Any) -> None:
    """Digests are what caches know an image by."""
    inputs = dict(inputs_of(processor, ("a", 1), ("a", 1)))
    settings = model.engine.preparation.inputs
    first, second = (prompt.images[0] for prompt in read_batch(inputs, model.engine.config, settings).prompts)
    again = read_batch(inputs, model.engine.config, settings).prompts[0].images[0]
    assert first.digest == again.digest != second.digest and len(first.digest) == 32


def other_vocabulary(processor: Any) -> None:
    processor.tokenizer.add_tokens(["<other>"])


def other_patches(processor: Any) -> None:
    processor.image_processor.patch_size = 14


def other_scale(processor: Any) -> None:
    processor.video_processor.image_mean = [0.48, 0.46, 0.41]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_vocabulary,
            r"the tokenizer is not the engine's: 1 tokens differ, such as '<other>', which is token \d+",
        ),
        (other_patches, "image_processor.patch_size is 14, the engine takes 16"),
        (
            other_scale,
            r"video_processor normalises by the mean \[0.48, 0.46, 0.41\] and the deviation \[0.5, 0.5, 0.5\]",
        ),
    ],
)
def test_a_processor_of_another_checkpoint(
    model: QwenVLForImageTextToText,
    processor: Any,
    demo_engine: Path,
    change: Callable[[Any], None],
    message: str,
) -> None:
    model.check_processor(processor)
    model.check_processor(processor.tokenizer)
    other = copy.deepcopy(processor)
    change(other)
    with pytest.raises(UsageError, match=message):
        model.check_processor(other)
    with pytest.raises(UsageError, match=message):
        QwenVLForImageTextToText.from_pretrained(demo_engine, threads=1, processor=other)


def test_a_tokenizer_of_another_checkpoint(model: QwenVLForImageTextToText, processor: Any) -> None:
    inputs = inputs_of(processor, ("One", 0))
    other = copy.deepcopy(processor)
    other_vocabulary(other)
    with pytest.raises(UsageError, match="the tokenizer is not the engine's"):
        model.generate(**inputs, stop_strings=["7"], tokenizer=other.tokenizer)
    with pytest.raises(UsageError, match="a processor or a tokenizer is expected, got int"):
        model.check_processor(5)
