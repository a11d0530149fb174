"""Prompts against transformers' Qwen3VLProcessor, and where image tokens are not images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers import judge
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, build_tokenizer_files, build_tokenizer_json
from runtime.chat import IMAGE_TOKEN, ChatTemplate
from runtime.errors import EngineError, UsageError
from runtime.prompt import PromptBuilder
from runtime.tokenizer import Tokenizer

TOKENIZER = Tokenizer(build_tokenizer_json())
BUILDER = PromptBuilder(TOKENIZER, ChatTemplate(INSTRUCT_TEMPLATE))


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def image(name: Any) -> dict[str, Any]:
    return {"type": "image", "image": name}


@pytest.mark.judge
def test_ids_equal_the_processor_with_images_of_several_sizes(tmp_path: Any) -> None:
    from PIL import Image

    processor = judge.processor(build_tokenizer_files(tmp_path))
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
    remaining = iter(sizes)
    seen = []

    def num_visual_tokens(picture: Any) -> int:
        seen.append(picture)
        return next(remaining)

    prompt = BUILDER.build(messages, num_visual_tokens)
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    assert [id(picture) for picture in prompt.images] == [id(pictures[i]) for i in (0, 1, 2, 0)]
    assert [id(picture) for picture in seen] == [id(picture) for picture in prompt.images]
    assert [length for _, length in prompt.spans] == sizes
    covered = [index for start, length in prompt.spans for index in range(start, start + length)]
    assert covered == np.flatnonzero(expected["input_ids"][0] == BUILDER.image_token_id).tolist()
    # The text with its tokens expanded is the text that the processor tokenised.
    pieces = prompt.text.split(IMAGE_TOKEN)
    expanded = "".join(f"{piece}{IMAGE_TOKEN * n}" for piece, n in zip(pieces, [*sizes, 0], strict=True))
    assert expanded == processor.tokenizer.decode(expected["input_ids"][0], skip_special_tokens=False)


@pytest.mark.portable
def test_a_typed_image_token_has_its_id_and_no_span() -> None:
    messages = [
        {"role": "user", "content": [text(f"a {IMAGE_TOKEN} b"), image("cat"), text("<|image_"), text("pad|>")]},
        {"role": "assistant", "content": f"I see {IMAGE_TOKEN}"},
        {"role": "user", "content": [image("dog"), text("<|vision_start|><|video_pad|><|vision_end|>")]},
    ]
    prompt = BUILDER.build(messages, {"cat": 3, "dog": 2}.__getitem__)
    image_id = TOKENIZER.token_id(IMAGE_TOKEN)
    before_cat = TOKENIZER.encode(f"<|im_start|>user\na {IMAGE_TOKEN} b<|vision_start|>")
    between = TOKENIZER.encode(
        f"<|vision_end|>{IMAGE_TOKEN}<|im_end|>\n<|im_start|>assistant\nI see {IMAGE_TOKEN}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>"
    )
    after_dog = TOKENIZER.encode(
        "<|vision_end|><|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.input_ids == before_cat + [image_id] * 3 + between + [image_id] * 2 + after_dog
    assert (before_cat.count(image_id), between.count(image_id)) == (1, 2)
    assert prompt.spans == ((len(before_cat), 3), (len(before_cat) + 3 + len(between), 2))


@pytest.mark.portable
def test_text_only() -> None:
    prompt = BUILDER.build("hi", lambda _: 1 // 0)
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids == TOKENIZER.encode(prompt.text)
    assert (prompt.images, prompt.spans) == ((), ())
    assert BUILDER.build("hi", lambda _: 1 // 0, add_generation_prompt=False).text.endswith("hi<|im_end|>\n")


@pytest.mark.portable
def test_an_image_where_the_template_writes_none_is_refused_before_it_is_opened() -> None:
    messages = [{"role": "system", "content": [image("cat")]}, {"role": "user", "content": "hi"}]
    with pytest.raises(UsageError, match=r"hold 1 images but the chat template wrote 0.*\n.*user turns"):
        BUILDER.build(messages, lambda _: 1 // 0)
    # A typed token does not stand in for it.
    messages[1]["content"] = IMAGE_TOKEN
    with pytest.raises(UsageError, match="hold 1 images but the chat template wrote 0"):
        BUILDER.build(messages, lambda _: 1 // 0)


@pytest.mark.portable
def test_a_template_that_writes_a_token_too_many_is_refused() -> None:
    builder = PromptBuilder(TOKENIZER, ChatTemplate(f"{IMAGE_TOKEN}{{{{ messages[0].content[0].text }}}}"))
    with pytest.raises(UsageError, match="hold 0 images but the chat template wrote 1"):
        builder.build("hi", lambda _: 1)


@pytest.mark.portable
def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    content = build_tokenizer_json().replace(IMAGE_TOKEN.encode(), b"<|other_pad|>")
    with pytest.raises(EngineError, match="no token '<|image_pad|>'".replace("|", r"\|")):
        PromptBuilder(Tokenizer(content), ChatTemplate(INSTRUCT_TEMPLATE))
