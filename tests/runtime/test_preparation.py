"""Prompts against transformers' Qwen3VLProcessor, where image tokens are not images, and the files all that needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import judge
from helpers.damage import edit_json
from helpers.random_checkpoints import tiny_values
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, build_tokenizer_files, build_tokenizer_json
from runtime.chat import ChatTemplate
from runtime.errors import CapacityError, EngineError, ImageError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.image_bounds import MAX_IMAGE_PIXELS
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image
from runtime.input_kinds.image import IMAGE_TOKEN
from runtime.input_kinds.kind import InputSettings
from runtime.model_config import ModelConfig
from runtime.positions import VisualSpan
from runtime.preparation import Preparation, Prompt
from runtime.tokenizer import Tokenizer
from runtime.video.config import VideoProcessorConfig

TOKENIZER = Tokenizer(build_tokenizer_json())
CONFIG = ModelConfig.from_hf(tiny_values())
# An image of one visual token stays one.
IMAGES = ImageProcessorConfig(patch_size=16, min_pixels=1)
INPUTS = InputSettings(IMAGES, VideoProcessorConfig.from_dict({}, IMAGES), MAX_IMAGE_PIXELS)


def preparation(template: str = INSTRUCT_TEMPLATE) -> Preparation:
    return Preparation(CONFIG, TOKENIZER, ChatTemplate(template), INPUTS, GenerationOptions())


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def picture(num_tokens: int) -> dict[str, Any]:
    """An image of so many visual tokens in a row."""
    return image(np.zeros((32, 32 * num_tokens, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an engine folder holds for prompts."""
    build_tokenizer_files(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    return tmp_path


@pytest.mark.judge
def test_ids_equal_the_processor_with_images_of_several_sizes(folder: Path) -> None:
    from PIL import Image

    processor = judge.processor(folder)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))
        for height, width in ((64, 64), (96, 160), (200, 70))
    ]
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [image(pictures[0]), text("and "), image(pictures[1]), text("é日本")]},
        {"role": "assistant", "content": [text("Yes.")]},
        {"role": "user", "content": [image(pictures[2]), image(pictures[0])]},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = {name: value.numpy() for name, value in inputs.items()}
    sizes = (expected["image_grid_thw"].prod(axis=-1) // 4).tolist()
    assert len(set(sizes)) == 3
    opened = Preparation.from_folder(folder, CONFIG)
    prepared = opened.prepare(messages)
    prompt = prepared.prompt
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    for found, i in zip(prepared.images, (0, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(found.pixel_values, process_image(pictures[i], opened.inputs.image).pixel_values)
    assert [span.num_tokens for span in prompt.spans] == sizes
    assert prepared.num_visual_tokens == sum(sizes)
    covered = [index for span in prompt.spans for index in range(span.start, span.end)]
    assert covered == np.flatnonzero(expected["input_ids"][0] == TOKENIZER.token_id(IMAGE_TOKEN)).tolist()
    # The text with its tokens expanded is the text that the processor tokenised.
    pieces = prompt.text.split(IMAGE_TOKEN)
    expanded = "".join(f"{piece}{IMAGE_TOKEN * n}" for piece, n in zip(pieces, [*sizes, 0], strict=True))
    assert expanded == processor.tokenizer.decode(expected["input_ids"][0], skip_special_tokens=False)


@pytest.mark.portable
def test_a_typed_image_token_has_its_id_and_no_span() -> None:
    messages = [
        {"role": "user", "content": [text(f"a {IMAGE_TOKEN} b"), picture(3), text("<|image_"), text("pad|>")]},
        {"role": "assistant", "content": f"I see {IMAGE_TOKEN}"},
        {"role": "user", "content": [picture(2), text("<|vision_start|><|video_pad|><|vision_end|>")]},
    ]
    prompt = preparation().prepare(messages).prompt
    image_id = TOKENIZER.token_id(IMAGE_TOKEN)
    before_first = TOKENIZER.encode(f"<|im_start|>user\na {IMAGE_TOKEN} b<|vision_start|>")
    between = TOKENIZER.encode(
        f"<|vision_end|>{IMAGE_TOKEN}<|im_end|>\n<|im_start|>assistant\nI see {IMAGE_TOKEN}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>"
    )
    after_second = TOKENIZER.encode(
        "<|vision_end|><|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.input_ids == before_first + [image_id] * 3 + between + [image_id] * 2 + after_second
    assert (before_first.count(image_id), between.count(image_id)) == (1, 2)
    second = len(before_first) + 3 + len(between)
    assert prompt.spans == (VisualSpan(len(before_first), (1, 1, 3)), VisualSpan(second, (1, 1, 2)))


@pytest.mark.portable
def test_text_only() -> None:
    prepared = preparation().prepare("hi")
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prepared.prompt == Prompt(TOKENIZER.encode(rendered), (), rendered)
    assert (prepared.images, prepared.num_visual_tokens) == ((), 0)
    plain = [{"role": "user", "content": "hi"}]
    assert preparation().template.render(plain, add_generation_prompt=False).text.endswith("hi<|im_end|>\n")


@pytest.mark.portable
def test_an_image_where_the_template_writes_none_is_refused_before_it_is_opened() -> None:
    messages = [{"role": "system", "content": [image("no such file")]}, {"role": "user", "content": "hi"}]
    with pytest.raises(UsageError, match=r"hold 1 images but the chat template wrote 0.*\n.*user turns"):
        preparation().prepare(messages)
    # A typed token does not stand in for it.
    messages[1]["content"] = IMAGE_TOKEN
    with pytest.raises(UsageError, match="hold 1 images but the chat template wrote 0"):
        preparation().prepare(messages)


@pytest.mark.portable
def test_what_stands_first_in_the_prompt_is_checked_first() -> None:
    """A text before an image, and images before one that is not there, which is opened only while there is hope."""
    missing, long = image("no such file"), text("a b " * 50_000)

    def prepare(*parts: dict[str, Any]) -> Any:
        return preparation().prepare([{"role": "user", "content": list(parts)}], max_tokens=40)

    hopeless = r"the first 2 image\(s\) or temporal patches alone are 160 visual tokens: max_context is 40"
    with pytest.raises(CapacityError, match=hopeless):
        prepare(picture(80), picture(80), missing)
    with pytest.raises(CapacityError, match=r"the text has \d+ characters"):
        prepare(long, missing)
    with pytest.raises(ImageError, match="no such file"):
        prepare(picture(80), missing, long)
    assert prepare(picture(80), picture(80)).num_visual_tokens == 160


@pytest.mark.portable
def test_a_template_that_writes_a_token_too_many_is_refused() -> None:
    with pytest.raises(UsageError, match="hold 0 images but the chat template wrote 1"):
        preparation(f"{IMAGE_TOKEN}{{{{ messages[0].content[0].text }}}}").prepare("hi")


@pytest.mark.portable
def test_a_tokenizer_without_the_image_token_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(IMAGE_TOKEN.encode(), b"<|other_pad|>"))
    with pytest.raises(EngineError, match="no token '<|image_pad|>'".replace("|", r"\|")):
        Preparation.from_folder(folder, CONFIG)


@pytest.mark.portable
def test_files_of_another_model_are_refused(folder: Path) -> None:
    four = replace(CONFIG, vision=replace(CONFIG.vision, in_channels=4))
    with pytest.raises(EngineError, match="the model takes images of 4 channels, expected 3"):
        Preparation.from_folder(folder, four)
    edit_json(folder / "preprocessor_config.json", lambda values: values.update(merge_size=4))
    with pytest.raises(EngineError, match=r"preprocessor_config\.json: merge_size is 4, .*\.spatial_merge_size = 2"):
        Preparation.from_folder(folder, CONFIG)


@pytest.mark.portable
def test_files_and_their_folder_open_alike(folder: Path) -> None:
    opened = Preparation.from_folder(folder, CONFIG)
    found = Preparation.from_files({path.name: path.read_bytes() for path in folder.iterdir()}, CONFIG)
    assert (found.inputs, found.defaults) == (opened.inputs, opened.defaults)
    assert found.defaults.eos_token_ids == (1,)
    assert found.prepare("hi").prompt == opened.prepare("hi").prompt
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer\.json: missing"):
        Preparation.from_folder(folder, CONFIG)
