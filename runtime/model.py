"""`Qwen3VLModel`: open an engine and answer messages."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from runtime.answer import Answer, Call, Generation, Stats, Stream, Turn, in_turn
from runtime.arguments import folder_path, reading, template_variables, tool_schemas
from runtime.context_room import ContextRoom
from runtime.contract import FloatArray, no_visual_embeds
from runtime.engine_options import EngineOptions
from runtime.errors import UsageError
from runtime.generation import chunk_limit, decode_steps, prefill, prefill_chunks
from runtime.generation_config import GenerationOptions
from runtime.generation_keywords import GenerationKeywords
from runtime.guard import Owner
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import ProcessedImage
from runtime.machine import default_threads
from runtime.manifest import Manifest
from runtime.memory import (
    CACHE,
    LOGITS,
    PREFILL,
    VISION,
    WEIGHTS,
    cache_bytes,
    check_fits,
    logits_bytes,
    prefill_bytes,
    vision_bytes,
)
from runtime.preparation import GENERATION, PREPROCESSOR, TOKENIZER, Preparation, Prepared
from runtime.prompt_lookup import PromptLookup
from runtime.sampling import Sampler
from runtime.session import Session, open_session
from runtime.shown import shown
from runtime.stop_text import AnswerText
from runtime.tokenizer import Tokenizer
from runtime.urls import check_local

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)


class Qwen3VLModel:
    """An opened engine. One call runs at a time; a call of another thread waits for its turn."""

    def __init__(
        self,
        manifest: Manifest,
        session: Session,
        preparation: Preparation,
        max_context: int,
        max_memory: int,
        *,
        source: str | None = None,
        threads: int | None = None,
    ) -> None:
        if not isinstance(manifest, Manifest):
            raise UsageError(
                f"manifest must be a Manifest, got {type(manifest).__name__}",
                remedy="open an engine with Qwen3VLModel.from_engine",
            )
        self.manifest = manifest
        self.config = manifest.model
        self.session = session
        self.preparation = preparation
        self.max_context = max_context
        self.max_memory = max_memory
        self._owner = Owner(session)
        self._source = source
        self._threads = threads
        self._turn = Turn()
        capacity = manifest.capabilities.get("capacity")
        self._room = ContextRoom(max_context, preparation, sys.maxsize if capacity is None else int(capacity))
        self._chunk = chunk_limit(manifest.capabilities)
        self._logits_chunk = chunk_limit(manifest.capabilities, all_logits=True)

    def __repr__(self) -> str:
        """Say what is open: `Qwen3VLModel('out/demo', target='ort-cpu-fp32', model='demo', …)`."""
        words = [
            *([shown(self._source)] if self._source is not None else []),
            f"target={shown(self.manifest.target)}",
            f"model={shown(self.manifest.source.get('name'))}",
            f"max_context={self.max_context}",
            *([f"threads={self._threads}"] if self._threads is not None else []),
        ]
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint."""
        return self.preparation.tokenizer

    @property
    def image_config(self) -> ImageProcessorConfig:
        """How images are resized and cut, with the limits that the engine was opened with."""
        return self.preparation.image_config

    @property
    def max_image_pixels(self) -> int:
        """Images that have more pixels are refused before they are decoded."""
        return self.preparation.max_image_pixels

    @property
    def defaults(self) -> GenerationOptions:
        """Options of an answer that a caller does not give."""
        return self.preparation.defaults

    @classmethod
    def from_engine(
        cls,
        path: str | Path,
        *,
        check: bool = False,
        threads: int | None = None,
        huge_pages: bool = False,
        cuda_graphs: bool = True,
        max_context: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_memory: int | None = None,
        max_image_pixels: int | None = None,
    ) -> Qwen3VLModel:
        """Open an engine folder.

        Args:
            path: The folder.
            check: Compare the hashes of the weight files too; otherwise only their sizes.
            threads: Threads of the engine; by default OMP_NUM_THREADS, or the cores that this process may run on.
            huge_pages: Move the weights to huge pages: seconds to open, faster tokens (`runtime.huge_pages`).
            cuda_graphs: On a GPU, record the decode step once and launch it from then on: faster tokens.
            max_context: Most tokens of prompt and answer together; 4096 by default, or what the model was trained for,
                or the capacity that the engine was built with.
            min_pixels: Smaller images are enlarged to this area.
            max_pixels: Larger images are reduced to this area.
            max_memory: Most bytes that weights, cache and workspace may take together, by estimate; the machine's
                memory, or the container's, by default. A GPU refuses by itself what it cannot hold, so an engine on one
                has no default.
            max_image_pixels: Images that have more pixels are refused before they are decoded, whatever `max_pixels`
                would reduce them to; 50 million by default, at most 178 million.

        Raises:
            EngineError: A file is missing or altered, or the engine does not open.
            CapacityError: Weights, a full KV cache and the prefill exceed `max_memory`.
            UsageError: An option is out of range or of no use to this engine, or `path` is a URL.
        """
        source = folder_path("engine", path)
        check_local(source, "engine")
        folder = Path(source)
        manifest = Manifest.read(folder)
        manifest.check(folder, full=check)
        manifest.require(folder, PREPROCESSOR, TOKENIZER, GENERATION)
        options = EngineOptions.checked(
            manifest,
            threads=threads,
            huge_pages=huge_pages,
            cuda_graphs=cuda_graphs,
            max_context=max_context,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_memory=max_memory,
            max_image_pixels=max_image_pixels,
        )
        return cls.from_manifest(folder, manifest, options, source=source)

    @classmethod
    def from_manifest(
        cls, folder: Path, manifest: Manifest, options: EngineOptions, *, source: str | None = None
    ) -> Qwen3VLModel:
        """Open the files of an engine whose manifest is at hand, and need not be in the folder.

        Raises:
            EngineError, CapacityError, UsageError: As `from_engine`.
        """
        check_fits(_decoder_needs(manifest, options.max_context), options.max_memory)
        preparation = Preparation.from_folder(folder, manifest.model)
        preparation = preparation.with_image_limits(options.min_pixels, options.max_pixels, options.max_image_pixels)
        session, threads = open_session(folder, manifest, options.session), options.session.threads
        limits = options.max_context, options.max_memory
        return cls(manifest, session, preparation, *limits, source=source, threads=threads or default_threads())

    def generate(
        self,
        messages: Any,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Generation:
        """Answer messages in the Hugging Face chat format; see `stream`."""
        stream = self.stream(messages, options, tools=tools, chat_template_kwargs=chat_template_kwargs, **keywords)
        for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    def stream(
        self,
        messages: Any,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Stream:
        """Answer messages piece by piece, cut at UTF-8 boundaries.

        Work begins with the first piece. Until the stream is exhausted or closed, calls of other threads wait, and a
        call of the thread that reads it is an error.

        Args:
            messages: Hugging Face chat format; an image is a path, bytes, a data URL, a PIL image or an array.
            options: All options of the answer, in place of the defaults, but that its `eos_token_ids`, if it has none,
                are the model's; `model.defaults.replace(…)` makes such a set. The defaults are `model.defaults`, which
                come from generation_config.json.
            tools: JSON schemas of functions, for chat templates that know tools.
            chat_template_kwargs: Further variables of the chat template, such as `enable_thinking`.
            **keywords: Single options with Hugging Face's names, laid over that set.

        Raises:
            UsageError: A message or an option is not valid, the template does not know a variable, this thread left
                another stream open, or this process was forked from the one that opened the model.
            ImageError: An image cannot be read.
            CapacityError: The prompt leaves no room in `max_context`, or the estimated memory exceeds `max_memory`. An
                answer that fills `max_context` ends with finish_reason "length".
        """
        self._owner.check()
        chosen = self._chosen(options, keywords)
        # Now, since work begins later, when the caller may have changed them.
        tools, chat_template_kwargs = tool_schemas(tools), template_variables(chat_template_kwargs)
        prepare = partial(self.prepare, messages, tools=tools, chat_template_kwargs=chat_template_kwargs)
        return Stream(in_turn(self._turn, partial(self._generate, prepare, chosen)))

    def _chosen(self, options: GenerationOptions | None, keywords: Mapping[str, Any]) -> GenerationOptions:
        if options is None:
            return self.defaults.replace(**keywords)
        if not isinstance(options, GenerationOptions):
            raise UsageError(
                f"options must be GenerationOptions, got {type(options).__name__}",
                remedy="pass single options as keyword arguments: max_new_tokens=32",
            )
        return options.replace(eos_token_ids=options.eos_token_ids or self.defaults.eos_token_ids).replace(**keywords)

    def logits(self, messages: Any) -> FloatArray:
        """Return the logits of every prompt token, float32 [prompt tokens, vocab], generation prompt included."""
        self._owner.check()
        steps = in_turn(self._turn, lambda _: self._all_logits(messages))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                logits: FloatArray = end.value
                return logits

    def _all_logits(self, messages: Any) -> Generator[str, None, FloatArray]:
        prepared = self.prepare(messages)
        capacity = len(prepared.prompt.input_ids)
        self._check_memory(prepared, capacity, all_logits=True)
        prompt = prepared.decoder_inputs((yield from self._encode(prepared)), all_logits=True)
        cache = self.session.new_cache(capacity)
        return prefill(self.session, cache, prompt, chunk=self._logits_chunk)

    def prepare(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Render, tokenise, process the images and number the positions; the arguments are those of `stream`."""
        prepared = self.preparation.prepare(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs, max_tokens=self.max_context
        )
        if len(prepared.prompt.input_ids) > self.max_context:
            raise self._room.too_long(prepared)
        return prepared

    def encode_images(self, images: Sequence[ProcessedImage]) -> FloatArray:
        """Run the vision tower on each image: [1+D, V, hidden], in order; one zero row if none.

        Raises:
            UsageError: They are not the images of `prepare`, or this process was forked from another.
        """
        self._owner.check()
        remedy = "pass model.prepare(messages).images"
        with reading("images", remedy):
            processed = list(images) if isinstance(images, (list, tuple)) else [None]
        if any(type(image) is not ProcessedImage for image in processed):
            raise UsageError(f"images must be a list of ProcessedImage, got {shown(images)}", remedy=remedy)
        return self._join([self._encode_image(image) for image in processed if image is not None])

    def _encode(self, prepared: Prepared) -> Generator[str, None, FloatArray]:
        """Return the embeddings of all images; after each, an empty piece, at which `Stream.close` can stop."""
        embeds = []
        for image in prepared.images:
            embeds.append(self._encode_image(image))
            yield ""
        return self._join(embeds)

    def _encode_image(self, image: ProcessedImage) -> FloatArray:
        return self.session.vision(self.preparation.vision_inputs(image))

    def _join(self, embeds: Sequence[FloatArray]) -> FloatArray:
        return np.concatenate(embeds, axis=1) if embeds else no_visual_embeds(self.config)

    def _check_memory(self, prepared: Prepared, capacity: int, *, all_logits: bool = False) -> None:
        patches = [math.prod(image.grid_thw) for image in prepared.images]
        needed = _decoder_needs(self.manifest, capacity) | {VISION: vision_bytes(self.config, patches)}
        if all_logits:
            needed[LOGITS] = logits_bytes(self.config, capacity)
        check_fits(needed, self.max_memory)

    def _lookup(self, prompt_ids: list[int], num_tokens: int) -> PromptLookup | None:
        num_tokens = min(num_tokens, self._logits_chunk - 1)
        # From this many tokens on a call runs in another decoder, and other logits would give other tokens.
        other_decoder = self.manifest.capabilities.get("prefill_min_tokens")
        if other_decoder is not None:
            num_tokens = min(num_tokens, int(other_decoder) - 2)
        never = (self.config.image_token_id, self.config.video_token_id)
        return PromptLookup(prompt_ids, num_tokens, never) if num_tokens > 0 else None

    def _generate(
        self, prepare: Callable[[], Prepared], options: GenerationOptions, call: Call
    ) -> Generator[str, None, Generation]:
        times = [time.perf_counter()]
        prepared = prepare()
        prompt_ids = prepared.prompt.input_ids
        max_new_tokens = self._room.answer_tokens(prepared, options)
        self._check_memory(prepared, len(prompt_ids) + max_new_tokens)
        if note := self._room.note(prepared):
            _LOGGER.warning("%s", note)
        times.append(time.perf_counter())
        prompt = prepared.decoder_inputs((yield from self._encode(prepared)))
        times.append(time.perf_counter())
        cache = self.session.new_cache(len(prompt_ids) + max_new_tokens)
        logits = []
        for logits_LV in prefill_chunks(self.session, cache, prompt, chunk=self._chunk):
            logits.append(logits_LV)
            yield ""  # as after an image
        sampler = Sampler(options)
        sampler.start(prompt_ids)
        lookup = self._lookup(prompt_ids, options.prompt_lookup_num_tokens)
        steps = decode_steps(
            self.session,
            cache,
            logits[-1][-1],
            len(prompt_ids),
            prepared.positions.delta,
            prompt.visual_embeds[:, :1],
            sampler.next,
            lookup,
            sampler.can_use_top(int(self.manifest.capabilities.get("top_k", 0))),
        )
        text = AnswerText(self.tokenizer, options.stop, prompt_ids)
        answer = Answer(text, options.eos_token_ids, max_new_tokens)
        for token in steps:
            if not answer.token_ids:
                times.append(time.perf_counter())
            yield answer.push(token)
            call.thread = threading.get_ident()  # a stream may be read by another thread than began it
            if answer.finish_reason:
                break
        times.append(time.perf_counter())
        return answer.finished(
            Stats.of(
                times,
                prompt_tokens=len(prompt_ids),
                visual_tokens=prepared.num_visual_tokens,
                new_tokens=len(answer.token_ids),
                peak_cache_bytes=cache.num_bytes,
                drafted_tokens=lookup.num_drafted if lookup else 0,
                accepted_tokens=lookup.num_accepted if lookup else 0,
            )
        )


def _decoder_needs(manifest: Manifest, capacity: int) -> dict[str, int]:
    capacity = int(manifest.capabilities.get("capacity", capacity))
    return {
        WEIGHTS: manifest.weight_bytes,
        CACHE: cache_bytes(manifest.model, manifest.capabilities, capacity),
        PREFILL: prefill_bytes(manifest.model, capacity),
    }
