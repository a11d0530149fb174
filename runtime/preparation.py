"""From messages to what an engine takes: token ids, pixels and positions.

What that needs of a checkpoint belongs together and is opened together: tokenizer, chat template, the image processor's
settings and the defaults of generation.

Shapes: D DeepStack levels, V visual rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import reading
from runtime.chat import ChatTemplate, template_source
from runtime.contract import DecoderInputs, FloatArray, VisionInputs, VisualEmbeds
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.files import MAX_TOKENIZER_BYTES, parse_json_object, read_small_file
from runtime.generation_config import GenerationOptions
from runtime.image_bounds import MAX_IMAGE_PIXELS
from runtime.image_config import NUM_CHANNELS, ImageProcessorConfig
from runtime.image_processor import OnImages, ProcessedImage
from runtime.input_kinds.image import IMAGE_TOKEN, Image
from runtime.input_kinds.kind import InputKind, InputSettings
from runtime.input_kinds.registry import input_kinds
from runtime.input_limits import InputLimits, common_limit
from runtime.machine import default_threads
from runtime.messages import Attachment, Messages, normalise_messages
from runtime.model_config import ModelConfig
from runtime.parallel import ordered_map
from runtime.patches import PixelScale
from runtime.picture_source import PictureSource
from runtime.positions import PromptPositions, VisualSpan, mrope_positions
from runtime.prompt_builder import PromptBuilder
from runtime.raw_prompt import RawPrompt
from runtime.still_wanted import Check, always
from runtime.tokenizer import Tokenizer
from runtime.video.config import VideoProcessorConfig
from runtime.video.processor import ProcessedVideo
from runtime.vision_inputs import VISION_PATCHES, inputs_of_segments, takes_grey_levels
from runtime.visual_pruning.prompt import decided_spans

if TYPE_CHECKING:
    from runtime.input_kinds.kind import Processed

TOKENIZER, TEMPLATE, TOKENIZER_SETTINGS = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_BUILD_AGAIN = "build the engine again"


@dataclass(frozen=True)
class Prompt:
    """Hold one prompt.

    Attributes:
        input_ids: Token ids; the token of images or videos stands once for every visual token.
        spans: Place of every segment in `input_ids`: an image, or a temporal patch of a video. Such a token outside
            these was typed by a user and is text: only spans refer to visual embeddings.
        text: The rendered chat, one token for each image or video.
    """

    input_ids: list[int]
    spans: tuple[VisualSpan, ...]
    text: str


@dataclass(frozen=True)
class Prepared:
    """A prompt ready for the engine: token ids, pixels and positions.

    Attributes:
        prompt: The prompt.
        images: Its segments, in the order of their places in the prompt.
        positions: Its position inputs; those of an image of which some tokens stay are not known before its embeddings.
        messages: What it was made of, with processed inputs in the place of their sources, or the raw prompt; it may be
            given again.
        inputs: Its images and videos, in the order of their places in the prompt.
        num_read: Images and videos that were read for it; the others had been processed before.
        sources: Where these are.
    """

    prompt: Prompt
    images: tuple[ProcessedImage, ...]
    positions: PromptPositions
    messages: Messages | RawPrompt
    inputs: tuple[Processed, ...]
    num_read: int
    sources: tuple[PictureSource, ...] = field(default=(), repr=False, compare=False)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(span.num_tokens for span in self.prompt.spans)

    @property
    def num_pruned_tokens(self) -> int:
        """Visual tokens that do not stay in the prompt."""
        return sum(span.num_rows - span.num_tokens for span in self.prompt.spans)

    def decoder_inputs(
        self,
        visual_embeds: VisualEmbeds,
        *,
        all_logits: bool = False,
        num_skipped: int = 0,
        token_scores: FloatArray | None = None,
    ) -> DecoderInputs:
        """Return what the decoder takes; see `DecoderInputs.prompt`.

        Args:
            visual_embeds: Those of all segments, in order, [1+D, V, hidden]; `no_visual_embeds` without any.
            all_logits: Every token gets logits, not the last one alone.
            num_skipped: Segments at the start without embeddings: their tokens are not to be run.
            token_scores: Those of the embeddings, [V], for an engine that has them.
        """
        ids, spans, positions = self.prompt.input_ids, self.prompt.spans, self.positions
        if any(isinstance(span.kept, int) for span in spans[num_skipped:]):
            positions = mrope_positions(len(ids), decided_spans(spans, visual_embeds, num_skipped, token_scores))
        if num_rows := sum(span.num_rows for span in spans[:num_skipped]):
            rows = positions.visual_rows
            positions = replace(positions, visual_rows=np.where(rows < num_rows, -1, rows - num_rows))
        return DecoderInputs.prompt(ids, positions, visual_embeds, all_logits=all_logits)


@dataclass(frozen=True)
class Preparation:
    """What a checkpoint says about the way from messages to an engine's inputs.

    Attributes:
        config: Shape of the model.
        tokenizer: The tokenizer.
        template: The chat template.
        inputs: Settings of its image and video processors.
        defaults: Default options of an answer.
        can_prune: Images may keep a share of their visual tokens.
        keeps_markers: A video's segments stand inside of the markers that the template writes, as transformers has it
            since 5.10; without, in place of them, as before.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    inputs: InputSettings
    defaults: GenerationOptions
    keeps_markers: bool = True
    can_prune: bool = True

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
        for name in (TOKENIZER_SETTINGS, VIDEO_PREPROCESSOR):
            if os.path.lexists(folder / name):
                files[name] = read_small_file(folder / name)
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
            image = ImageProcessorConfig.from_dict(settings_in(PREPROCESSOR))
            _check_patches(image, config, folder / PREPROCESSOR)
        with opening(folder / VIDEO_PREPROCESSOR):
            is_there = VIDEO_PREPROCESSOR in files  # not in engines of earlier versions
            video = VideoProcessorConfig.from_dict(settings_in(VIDEO_PREPROCESSOR) if is_there else {}, image)
            _check_patches(video, config, folder / VIDEO_PREPROCESSOR)
        with opening(folder / GENERATION):
            defaults = GenerationOptions.from_generation_config(settings_in(GENERATION))
        return cls(config, tokenizer, template, InputSettings(image, video, MAX_IMAGE_PIXELS), defaults)

    def for_engine(self, capabilities: Mapping[str, Any]) -> Preparation:
        """Return a copy whose images are what an engine takes: grey levels where it normalises them itself."""
        can_prune = capabilities.get("device") != "gpu"
        if not takes_grey_levels(capabilities):
            return replace(self, can_prune=can_prune)
        image, video = replace(self.inputs.image, keeps_levels=True), self.inputs.video
        video = replace(video, image=replace(video.image, keeps_levels=True))
        return replace(self, inputs=replace(self.inputs, image=image, video=video), can_prune=can_prune)

    def with_limits(self, limits: InputLimits, max_image_pixels: int | None = None) -> Preparation:
        """Return a copy with other limits; None keeps the checkpoint's, or what a lower `max_pixels` leaves of it.

        Raises:
            UsageError: The lower limit of pixels or frames is above the upper, or visual tokens cannot be pruned.
        """
        inputs = self.inputs
        share = inputs.visual_token_share if limits.visual_token_share is None else limits.visual_token_share
        if share < 1 and not self.can_prune:
            raise UsageError(
                "visual_token_share: this engine runs on a GPU, where prefill of the tokens takes less time than the "
                "choice of those that stay, which is made on the CPU",
                remedy="leave visual_token_share out, or pass max_pixels or max_visual_tokens for fewer visual tokens",
            )
        image = inputs.image.with_limits(*inputs.image.both_limits(limits.min_pixels, limits.max_pixels))
        most = inputs.max_image_pixels if max_image_pixels is None else max_image_pixels
        settings = InputSettings(image, inputs.video.with_limits(limits), most, visual_token_share=share)
        return replace(self, inputs=settings)

    def prepare(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        limits: InputLimits | None = None,
        max_tokens: int | None = None,
        on_images: OnImages | None = None,
        check: Check = always,
    ) -> Prepared:
        """Render, tokenise, process images and videos and number the positions.

        The ids equal those of transformers' `Qwen3VLProcessor` on the same messages, which refuses typed image tokens.

        Args:
            messages: As `normalise_messages` takes them, or a `RawPrompt`.
            tools: JSON schemas of functions, for templates that know tools.
            chat_template_kwargs: Further variables of the template.
            limits: In place of the own ones, for this prompt.
            max_tokens: Give up long texts and many images that have more; a prompt may still come out longer.
            on_images: Given segments as soon as they are there, if more will follow.
            check: Asked between two steps; what it raises, when the prompt is not wanted any more, ends the work.

        Raises:
            UsageError: The messages are not valid, hold what the tokenizer has no token for, or the template does not
                write one image token for each image.
            ImageError: An image or a video cannot be read.
            CapacityError: A text is too long, or an image too large or one too many.
        """
        limits = limits or InputLimits()
        settings = self.with_limits(limits).inputs
        if isinstance(messages, RawPrompt):
            _check_keeps_all(messages, settings)
            return self._raw(messages, tools, chat_template_kwargs, max_tokens, check)
        check()
        turns, attachments = normalise_messages(messages)
        check()
        self._check_tokens(attachments)
        chat = self.template.render(turns, tools=tools, chat_template_kwargs=chat_template_kwargs)
        check()
        places = list(_placed(attachments, chat.places))
        placed = [attachment for _, attachment in places]
        processed = self._processed(
            placed,
            replace(settings, context=max_tokens, check=check),
            (limits or InputLimits()).max_visual_tokens,
            on_images,
        )
        builder = PromptBuilder(self.tokenizer, max_tokens, check, settings.visual_token_share)
        self._build(builder, chat.text, places, processed)
        return Prepared(
            Prompt(builder.input_ids, tuple(builder.spans), chat.text),
            tuple(builder.images),
            mrope_positions(len(builder.input_ids), builder.spans),
            _shown(turns, attachments, placed, builder.inputs),
            tuple(builder.inputs),
            sum(found is not attachment.source for attachment, found in zip(placed, builder.inputs, strict=True)),
            tuple(PictureSource(each.source) for each in placed),
        )

    def _build(
        self,
        builder: PromptBuilder,
        text: str,
        places: Sequence[tuple[int, Attachment]],
        processed: Iterator[Processed],
    ) -> None:
        """Tokenise a text with its images and videos in their places."""
        end = 0
        for offset, attachment in places:
            start, next_end = self._extent(attachment.kind, text, offset)
            builder.add_text(text[end:start])
            builder.add_input(attachment.kind, lambda: next(processed))
            end = next_end
        builder.add_text(text[end:])
        builder.finish()

    def _check_tokens(self, attachments: Sequence[Attachment]) -> None:
        for kind in dict.fromkeys(each.kind for each in attachments):
            if len(self.tokenizer.encode(kind.token)) != 1:
                raise UsageError(f"this model has no token for {kind.name}s", remedy="leave them out of the messages")

    def _raw(
        self, prompt: RawPrompt, tools: Any, chat_template_kwargs: Any, max_tokens: int | None, check: Check
    ) -> Prepared:
        """Prepare a prompt that is no chat."""
        for name, value in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
            if value:
                raise UsageError(
                    f"a raw prompt was given with {name}, which only a chat template writes into a prompt",
                    remedy=f"leave {name} out, or pass messages in place of the RawPrompt",
                )
        images = prompt.images
        self._check_segments(images)
        spans = prompt.spans(self.config)
        ids, text = prompt.encoded(self.tokenizer, self.config.text.vocab_size, max_tokens, check)
        return Prepared(Prompt(ids, spans, text), images, mrope_positions(len(ids), spans), prompt, images, 0)

    def _extent(self, kind: InputKind, text: str, offset: int) -> tuple[int, int]:
        """Return start and end of what an input stands in place of."""
        end = offset + len(kind.token)
        if self.keeps_markers or kind.markers is None:
            return offset, end
        before, after = kind.markers
        is_marked = text.endswith(before, 0, offset) and text.startswith(after, end)
        return (offset - len(before), end + len(after)) if is_marked else (offset, end)

    def _processed(
        self,
        attachments: Sequence[Attachment],
        inputs: InputSettings,
        budget: int | None,
        on_images: OnImages | None,
    ) -> Iterator[Processed]:
        """Read and cut what messages hold, unless that was done before, several at once; yield it in order."""
        attachments = _sharing(attachments)
        if budget is None:
            yield from self._read(attachments, inputs, on_images)
            return
        # What was processed before stays as it is. The others within what that leaves, then once more those that are
        # too large beside each other.
        is_fixed = [_is_processed(each) for each in attachments]
        left = budget - sum(
            each.source.num_visual_tokens for each, fixed in zip(attachments, is_fixed, strict=True) if fixed
        )
        found = list(self._read(attachments, replace(inputs, max_tokens=max(1, left)), None))
        counts = [0 if fixed else each.num_visual_tokens for each, fixed in zip(found, is_fixed, strict=True)]
        limit = common_limit([count for count in counts if count], max(0, left))
        again = [index for index, count in enumerate(counts) if count > limit]
        if again and limit:
            settings = replace(inputs, max_tokens=limit)
            for index, each in zip(again, self._read([attachments[i] for i in again], settings, None), strict=True):
                found[index] = each
        num_tokens = sum(each.num_visual_tokens for each in found)
        if num_tokens > budget:
            raise CapacityError(
                f"{len(found)} images and videos are at least {num_tokens} visual tokens: "
                f"max_visual_tokens is {budget}",
                remedy="raise max_visual_tokens, send fewer of them, or fewer frames of a video (max_frames, fps)",
            )
        yield from found

    def _read(
        self, attachments: Sequence[Attachment], settings: InputSettings, on_images: OnImages | None
    ) -> Iterator[Processed]:
        # Of one object in several parts, one is read at a time: files of Pillow's and iterators know no threads.
        locks = {id(each.kind.content(each.source)): threading.Lock() for each in attachments}

        def process(attachment: Attachment) -> Processed:
            with locks[id(attachment.kind.content(attachment.source))]:
                found = attachment.kind.process(attachment.source, settings, on_images)
            if found is attachment.source:
                self._check_segments([insertion.image for insertion in attachment.kind.expansion(found)])
            elif on_images is not None and isinstance(found, ProcessedImage) and _fills_a_call(found):
                on_images([found])
            return found

        if len(attachments) == 1 and isinstance(attachments[0].kind, Image):
            on_images = None  # nothing follows that the vision tower could run beside

        return ordered_map(process, attachments, default_threads())

    def _check_segments(self, images: Sequence[ProcessedImage]) -> None:
        """Raise if segments that were processed before are not of this model."""
        remedy = "pass an image or a video of model.prepare(messages).inputs, of a model with the same patches"
        with reading("the processed input", remedy):
            fits = all(self._fits(image) for image in images)
        if not fits:
            raise UsageError("a processed input does not fit this model", remedy=remedy)

    def _fits(self, image: ProcessedImage) -> bool:
        shape = (math.prod(image.grid_thw), self.config.vision.patch_elements)
        return (
            image.merge_size == self.config.vision.spatial_merge_size
            and isinstance(image.patches, np.ndarray)
            and image.patches.dtype in (np.float32, np.uint8)
            and image.patches.shape in (shape, (0, shape[1]))  # the latter of one that was run before
            and isinstance(image.scale, PixelScale)
            and image.grid_thw[0] == 1
            and all(side > 0 and side % image.merge_size == 0 for side in image.grid_thw[1:])
            and isinstance(image.digest, bytes)
            and len(image.digest) == hashlib.sha256().digest_size
        )

    def vision_inputs(self, image: ProcessedImage) -> VisionInputs:
        """Return what the vision tower takes of an image."""
        return inputs_of_segments([image], self.config.vision, takes_levels=self.inputs.image.keeps_levels)


def _check_keeps_all(prompt: RawPrompt, settings: InputSettings) -> None:
    if prompt.segments and settings.visual_token_share < 1:
        raise UsageError(
            "visual_token_share and a raw prompt, whose token ids hold one for each visual token",
            remedy="pass messages, or visual_token_share=1",
        )


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


def _is_processed(attachment: Attachment) -> bool:
    return isinstance(attachment.source, (ProcessedImage, ProcessedVideo))


def _sharing(attachments: Sequence[Attachment]) -> list[Attachment]:
    """Let parts with one object read it through the first of them; see `InputKind.sharing`."""
    firsts: dict[int, Any] = {}
    shared = []
    for each in attachments:
        first = firsts.setdefault(id(each.kind.content(each.source)), each.source)
        shared.append(each if first is each.source else Attachment(each.kind, each.kind.sharing(each.source, first)))
    return shared


def _fills_a_call(image: ProcessedImage) -> bool:
    """Return whether an image goes through the vision tower alone, with no others of its grid."""
    return 2 * len(image.patches) > VISION_PATCHES


def _shown(
    turns: list[dict[str, Any]],
    attachments: Sequence[Attachment],
    placed: Sequence[Attachment],
    inputs: Sequence[Processed],
) -> Messages:
    """Return the messages with processed inputs in the place of their sources."""
    of = {id(attachment): found for attachment, found in zip(placed, inputs, strict=True)}
    return Messages(turns, tuple(Attachment(each.kind, of[id(each)]) for each in attachments))


def _check_patches(settings: ImageProcessorConfig | VideoProcessorConfig, config: ModelConfig, path: Path) -> None:
    """Raise if images would be cut into other patches than the vision tower takes."""
    vision = config.vision
    if vision.in_channels != NUM_CHANNELS:
        raise EngineError(
            f"{path}: the model takes images of {vision.in_channels} channels, expected {NUM_CHANNELS}",
            remedy=_BUILD_AGAIN,
        )
    for name, found, key, expected in (
        ("patch_size", settings.patch_size, "patch_size", vision.patch_size),
        ("temporal_patch_size", settings.temporal_patch_size, "temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", settings.merge_size, "spatial_merge_size", vision.spatial_merge_size),
    ):
        if found != expected:
            raise EngineError(
                f"{path}: {name} is {found}, the model has vision_config.{key} = {expected}", remedy=_BUILD_AGAIN
            )
