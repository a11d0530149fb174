"""From messages to what an engine takes: token ids, pixels and positions.

What that needs of a checkpoint belongs together and is opened together: tokenizer, chat template, the image processor's
settings and the defaults of generation.

Shapes: D DeepStack levels, V visual rows.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.arguments import reading
from runtime.chat import ChatTemplate, template_source
from runtime.contract import DecoderInputs, FloatArray, VisionInputs
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.files import MAX_TOKENIZER_BYTES, parse_json_object, read_small_file
from runtime.generation_config import GenerationOptions
from runtime.image_bounds import MAX_IMAGE_PIXELS
from runtime.image_config import NUM_CHANNELS, ImageProcessorConfig
from runtime.image_processor import ProcessedImage
from runtime.input_kinds.image import IMAGE_TOKEN
from runtime.input_kinds.registry import input_kinds
from runtime.messages import Attachment, Messages, normalise_messages
from runtime.model_config import ModelConfig
from runtime.positions import PromptPositions, VisualSpan, mrope_positions
from runtime.tokenizer import Tokenizer
from runtime.vision_inputs import vision_inputs

TOKENIZER, TEMPLATE, TOKENIZER_SETTINGS = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
_BUILD_AGAIN = "build the engine again"
# Images with this multiple of the context's tokens are not followed by more; until then, the error can say which
# max_pixels would make all of them fit.
_HOPELESS = 4


@dataclass(frozen=True)
class Prompt:
    """Hold one prompt.

    Attributes:
        input_ids: Token ids; an image's token stands once for every visual token of the image.
        spans: Place of every image in `input_ids`. An image token outside these was typed by a user and is text: only
            spans refer to visual embeddings.
        text: The rendered chat, one image token for each image.
    """

    input_ids: list[int]
    spans: tuple[VisualSpan, ...]
    text: str


@dataclass(frozen=True)
class Prepared:
    """A prompt ready for the engine: token ids, pixels and positions.

    Attributes:
        prompt: The prompt.
        images: Its images, in the order of their places in the prompt.
        positions: Its position inputs.
        messages: What it was made of, with processed images in the place of their sources; they may be given again.
        num_images_read: Images that were read for it; the others had been processed before.
    """

    prompt: Prompt
    images: tuple[ProcessedImage, ...]
    positions: PromptPositions
    messages: Messages
    num_images_read: int

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all images."""
        return sum(span.num_tokens for span in self.prompt.spans)

    def decoder_inputs(self, visual_embeds: FloatArray, *, all_logits: bool = False) -> DecoderInputs:
        """Return what the decoder takes; see `DecoderInputs.prompt`.

        Args:
            visual_embeds: Those of all images, in order, [1+D, V, hidden]; `no_visual_embeds` without any.
            all_logits: Every token gets logits, not the last one alone.
        """
        return DecoderInputs.prompt(self.prompt.input_ids, self.positions, visual_embeds, all_logits=all_logits)


@dataclass(frozen=True)
class Preparation:
    """What a checkpoint says about the way from messages to an engine's inputs.

    Attributes:
        config: Shape of the model.
        tokenizer: The tokenizer.
        template: The chat template.
        image_config: Settings of its image processor.
        defaults: Default options of an answer.
        max_image_pixels: Images that have more pixels are refused before they are decoded.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    image_config: ImageProcessorConfig
    defaults: GenerationOptions
    max_image_pixels: int = MAX_IMAGE_PIXELS

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> Preparation:
        """Open the files of an engine folder.

        Raises:
            EngineError: A file is missing or cannot be read, or does not belong to the model.
            CheckpointError: The image processor or the options are not those of a Qwen3-VL.
        """
        files = {name: read_small_file(folder / name, remedy=_BUILD_AGAIN) for name in (PREPROCESSOR, GENERATION)}
        files[TOKENIZER] = read_small_file(folder / TOKENIZER, max_bytes=MAX_TOKENIZER_BYTES, remedy=_BUILD_AGAIN)
        files[TEMPLATE] = template_source(folder).encode("utf-8", "surrogatepass")
        if os.path.lexists(folder / TOKENIZER_SETTINGS):
            files[TOKENIZER_SETTINGS] = read_small_file(folder / TOKENIZER_SETTINGS)
        return cls.from_files(files, config, folder)

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        config: ModelConfig,
        folder: Path = Path(),
        *,
        opening: Callable[[Path], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> Preparation:
        """Open files by their contents.

        Args:
            files: Contents by name.
            config: Shape of the model.
            folder: Where they are from, for messages.
            opening: Stands around the opening of each file, and may add to its errors.

        Raises:
            EngineError, CheckpointError: As `from_folder`.
        """

        def settings_in(name: str) -> dict[str, Any]:
            return parse_json_object(files[name], str(folder / name), remedy=_BUILD_AGAIN)

        with opening(folder / TOKENIZER):
            tokenizer = Tokenizer(files[TOKENIZER], name=str(folder / TOKENIZER))
            if tokenizer.encode(IMAGE_TOKEN) != [tokenizer.token_id(IMAGE_TOKEN)]:
                raise EngineError(f"the tokenizer splits {IMAGE_TOKEN}", remedy="mark it as an added special token")
        with opening(folder / TEMPLATE):
            settings = settings_in(TOKENIZER_SETTINGS) if TOKENIZER_SETTINGS in files else {}
            template = ChatTemplate.from_config(files[TEMPLATE].decode("utf-8", "surrogatepass"), settings)
        with opening(folder / PREPROCESSOR):
            image_config = ImageProcessorConfig.from_dict(settings_in(PREPROCESSOR))
            _check_patches(image_config, config, folder / PREPROCESSOR)
        with opening(folder / GENERATION):
            defaults = GenerationOptions.from_generation_config(settings_in(GENERATION))
        return cls(config, tokenizer, template, image_config, defaults)

    def with_image_limits(
        self, min_pixels: int | None, max_pixels: int | None, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> Preparation:
        """Return a copy with other limits; None keeps the checkpoint's, or what a lower `max_pixels` leaves of it.

        Raises:
            UsageError: The lower limit is above the upper.
        """
        if min_pixels is None and max_pixels is not None:
            min_pixels = max(1, min(self.image_config.min_pixels, max_pixels))  # of a bad max_pixels, that is named
        image_config = self.image_config.with_limits(min_pixels, max_pixels)
        return replace(self, image_config=image_config, max_image_pixels=max_image_pixels)

    def prepare(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Prepared:
        """Render, tokenise, process the images and number the positions.

        The ids equal those of transformers' `Qwen3VLProcessor` on the same messages, which refuses typed image tokens.

        Args:
            messages: As `normalise_messages` takes them.
            tools: JSON schemas of functions, for templates that know tools.
            chat_template_kwargs: Further variables of the template.
            max_tokens: Give up long texts and many images that have more; a prompt may still come out longer.

        Raises:
            UsageError: The messages are not valid, hold what the tokenizer has no token for, or the template does not
                write one image token for each image.
            ImageError: An image cannot be read.
            CapacityError: A text is too long, or an image too large or one too many.
        """
        turns, attachments = normalise_messages(messages)
        for kind in dict.fromkeys(each.kind for each in attachments):
            if len(self.tokenizer.encode(kind.token)) != 1:
                raise UsageError(f"this model has no token for {kind.name}s", remedy="leave them out of the messages")
        chat = self.template.render(turns, tools=tools, chat_template_kwargs=chat_template_kwargs)
        input_ids: list[int] = []
        images: list[ProcessedImage] = []
        spans: list[VisualSpan] = []
        processed: dict[int, Attachment] = {}
        end = 0
        # The tokenizer splits at added tokens before all else, so the text between two images can be encoded alone.
        for offset, attachment in _placed(attachments, chat.places):
            token = attachment.kind.token
            input_ids += self._encode(chat.text[end:offset], input_ids, max_tokens)
            _check_room(images, max_tokens)
            image = self._process(attachment)
            images.append(image)
            processed[id(attachment)] = Attachment(attachment.kind, image)
            spans.append(VisualSpan(len(input_ids), image.merged_grid_thw))
            input_ids += [self.tokenizer.token_id(token)] * image.num_visual_tokens
            end = offset + len(token)
        input_ids += self._encode(chat.text[end:], input_ids, max_tokens)
        prompt = Prompt(input_ids, tuple(spans), chat.text)
        shown = Messages(turns, tuple(processed[id(each)] for each in attachments))
        num_read = sum(type(each.source) is not ProcessedImage for each in attachments)
        return Prepared(prompt, tuple(images), mrope_positions(len(input_ids), spans), shown, num_read)

    def _process(self, attachment: Attachment) -> ProcessedImage:
        """Read and cut what a message holds, unless that was done before."""
        source = attachment.source
        if type(source) is not ProcessedImage:
            return attachment.kind.process(source, self.image_config, max_image_pixels=self.max_image_pixels)
        remedy = "pass an image of model.prepare(messages).images, of a model with the same patches"
        with reading("the processed image", remedy):
            shape = (math.prod(source.grid_thw), self.config.vision.patch_elements)
            fits = (
                source.merge_size == self.config.vision.spatial_merge_size
                and isinstance(source.pixel_values, np.ndarray)
                and source.pixel_values.dtype == np.float32
                and source.pixel_values.shape == shape
                and source.grid_thw[0] == 1
                and all(side > 0 and side % source.merge_size == 0 for side in source.grid_thw[1:])
                and isinstance(source.digest, bytes)
                and len(source.digest) == hashlib.sha256().digest_size
            )
        if not fits:
            raise UsageError("a processed image does not fit this model", remedy=remedy)
        return source

    def _encode(self, text: str, before: Sequence[int], max_tokens: int | None) -> list[int]:
        room = None if max_tokens is None else max(0, max_tokens - len(before))
        return self.tokenizer.encode(text, max_tokens=room)

    def vision_inputs(self, image: ProcessedImage) -> VisionInputs:
        """Return what the vision tower takes of an image."""
        return vision_inputs(image.pixel_values, image.grid_thw, self.config.vision)


def _placed(attachments: Sequence[Attachment], places: Sequence[tuple[int, str]]) -> Iterator[tuple[int, Attachment]]:
    """Give each place that the template wrote the next attachment of its kind.

    Raises:
        UsageError: The template writes not one token for each attachment.
    """
    waiting = {kind.token: [each for each in attachments if each.kind is kind] for kind in input_kinds()}
    for kind in input_kinds():
        num_attached, num_written = len(waiting[kind.token]), sum(token == kind.token for _, token in places)
        if num_attached != num_written:
            raise UsageError(
                f"the messages hold {num_attached} {kind.name}s but the chat template wrote {num_written} {kind.token}",
                remedy=f"put {kind.name}s into user turns: templates leave them out of system and assistant turns",
            )
    for offset, token in places:
        yield offset, waiting[token].pop(0)


def _check_room(images: Sequence[ProcessedImage], max_tokens: int | None) -> None:
    """Raise if no prompt with these images and more can have so few tokens."""
    num_tokens = sum(image.num_visual_tokens for image in images)
    if max_tokens is not None and num_tokens >= _HOPELESS * max_tokens:
        raise CapacityError(
            f"the first {len(images)} image(s) alone are {num_tokens} visual tokens: max_context is {max_tokens}",
            remedy="lower max_pixels, send fewer images, or raise max_context",
        )


def _check_patches(image_config: ImageProcessorConfig, config: ModelConfig, path: Path) -> None:
    """Raise if images would be cut into other patches than the vision tower takes."""
    vision = config.vision
    if vision.in_channels != NUM_CHANNELS:
        raise EngineError(
            f"{path}: the model takes images of {vision.in_channels} channels, expected {NUM_CHANNELS}",
            remedy=_BUILD_AGAIN,
        )
    for name, found, key, expected in (
        ("patch_size", image_config.patch_size, "patch_size", vision.patch_size),
        ("temporal_patch_size", image_config.temporal_patch_size, "temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", image_config.merge_size, "spatial_merge_size", vision.spatial_merge_size),
    ):
        if found != expected:
            raise EngineError(
                f"{path}: {name} is {found}, the model has vision_config.{key} = {expected}", remedy=_BUILD_AGAIN
            )
