"""From messages to token ids, with the place of every image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.chat import IMAGE_TOKEN, ChatTemplate
from runtime.errors import EngineError, UsageError
from runtime.messages import normalise_messages
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Hold one prompt.

    Attributes:
        input_ids: Token ids; an image's token stands once for every visual token of the image.
        images: The images as given, in the order of their spans.
        spans: `(start, length)` of every image in `input_ids`. An image token outside these was typed by a user and is
            text: only spans refer to visual embeddings.
        text: The rendered chat, one image token for each image.
    """

    input_ids: list[int]
    images: tuple[Any, ...]
    spans: tuple[tuple[int, int], ...]
    text: str


class PromptBuilder:
    """Turn messages into prompts with a checkpoint's tokenizer and chat template.

    Raises:
        EngineError: The tokenizer does not encode the image token as one id.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.image_token_id = tokenizer.token_id(IMAGE_TOKEN)
        if tokenizer.encode(IMAGE_TOKEN) != [self.image_token_id]:
            raise EngineError(f"the tokenizer splits {IMAGE_TOKEN}", remedy="mark it as an added special token")

    def build(
        self,
        messages: Any,
        num_visual_tokens: Callable[[Any], int],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Prompt:
        """Render, tokenise and give every image its room.

        The ids equal those of transformers' `Qwen3VLProcessor` on the same messages, which refuses typed image tokens.

        Args:
            messages: As `normalise_messages` takes them.
            num_visual_tokens: Number of visual tokens of an image (grid area / merge²); called once for each image, in
                order, after everything else has been checked.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: JSON schemas of functions, for templates that know tools.
            chat_template_kwargs: Further variables of the template.
            max_tokens: Give up a long text that has more; a prompt may still come out longer.

        Raises:
            UsageError: The messages are not valid, or the template does not write one image token for each image.
            CapacityError: A text is too long.
        """
        plain, images = normalise_messages(messages)
        chat = self._template.render(
            plain,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        if len(chat.image_offsets) != len(images):
            raise UsageError(
                f"the messages hold {len(images)} images but the chat template wrote {len(chat.image_offsets)} "
                f"{IMAGE_TOKEN}",
                remedy="put images into user turns: templates leave them out of system and assistant turns",
            )
        # The tokenizer splits at added tokens before all else, so the text between two images can be encoded alone.
        input_ids: list[int] = []
        spans: list[tuple[int, int]] = []
        end = 0

        def encode(text: str) -> list[int]:
            room = None if max_tokens is None else max(0, max_tokens - len(input_ids))
            return self._tokenizer.encode(text, max_tokens=room)

        for offset, image in zip(chat.image_offsets, images, strict=True):
            input_ids += encode(chat.text[end:offset])
            length = num_visual_tokens(image)
            assert length > 0, f"num_visual_tokens returned {length}"
            spans.append((len(input_ids), length))
            input_ids += [self.image_token_id] * length
            end = offset + len(IMAGE_TOKEN)
        input_ids += encode(chat.text[end:])
        return Prompt(input_ids, images, tuple(spans), chat.text)
