"""`Qwen3VLModel`: open an engine and answer messages."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from runtime.answer import Generation
from runtime.arguments import AUTO, folder_path, reading
from runtime.calls import Call, check_callback, run_batch, seconds
from runtime.choices import refuse_several, run_choices, run_choices_async
from runtime.context_room import ContextRoom
from runtime.contract import FloatArray, no_visual_embeds, on_host
from runtime.conversation import Conversation, complete
from runtime.engine_options import EngineOptions, OpeningKeywords
from runtime.errors import Qwen3VLError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.generation_keywords import RequestKeywords
from runtime.guard import Owner, naming_errors
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import OnImages, ProcessedImage
from runtime.input_limits import INPUT_KEYWORDS, InputKeywords, answer_keywords
from runtime.manifest import Manifest
from runtime.memory import check_fits
from runtime.memory_plan import Planner
from runtime.messages import normalise_messages, system_message
from runtime.notebook import table
from runtime.opening import OpenSession, open_engine
from runtime.option_checks import true_or_false
from runtime.piece import Piece
from runtime.preparation import Preparation, Prepared
from runtime.route import Route, describe, other_engines, take_route
from runtime.scheduling.ahead import Ahead
from runtime.scheduling.pieces import Pieces
from runtime.scheduling.plan import plan_limits, work_of
from runtime.scheduling.request import Limits, Request
from runtime.scheduling.worker import Worker
from runtime.serving_options import ServingOptions
from runtime.session import Session
from runtime.shown import shown
from runtime.still_wanted import Check, NotWanted, StillWanted, always
from runtime.stream import Stream
from runtime.structured.compiler import Compiler
from runtime.structured.constraint import MakeConstraint
from runtime.thinking import checked_marks
from runtime.tokenizer import Tokenizer
from runtime.tools.grammar import calls_format
from runtime.tools.reader import ExpectedCalls
from runtime.tuning import Tuning
from runtime.urls import check_local

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)


class Qwen3VLModel:
    """An opened engine that answers many requests at once, from any thread or asyncio loop.

    Requests wait in a bounded queue, then run side by side, step by step, in a thread of the engine's own. What one
    answers does not depend on those beside it, but for rounding where a library's kernels round differently for other
    numbers of rows.
    """

    def __init__(
        self,
        manifest: Manifest,
        session: Session,
        preparation: Preparation,
        max_context: int,
        max_memory: int,
        *,
        limits: Limits | None = None,
        source: str | None = None,
        threads: int | None = None,
        fitted: Mapping[str, tuple[int, int]] | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Put a session to work; `from_engine` opens one. Without limits, it runs one sequence at a time."""
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
        self.tuning = tuning or Tuning()
        self._owner = Owner(session)
        self._compiler = Compiler(preparation.tokenizer, manifest.model.text.vocab_size)
        self._source = source
        self.threads = threads
        self._fitted = fitted or {}
        self._room = ContextRoom.of(manifest, preparation, max_context, limits)
        if limits is None:
            # Nothing is kept either: the weights of a torch model may be changed between two calls.
            one = ServingOptions(max_sequences=1, kept_sequences=0, prefix_cache=False, vision_cache_bytes=0)
            limits = plan_limits(manifest, one, max_context, None)
        self._planner, self._work = Planner.of(manifest, threads), work_of(limits)
        with naming_errors():
            self._worker = Worker(session, manifest, preparation.tokenizer, limits)
        # When the model is dropped, or Python ends.
        weakref.finalize(self, self._worker.stop)

    def __repr__(self) -> str:
        """Say what is open: `Qwen3VLModel('out/demo', target='ort-cpu-fp32', model='demo', …)`."""
        words = [
            *([shown(self._source)] if self._source is not None else []),
            f"target={shown(self.manifest.target)}",
            f"model={shown(self.manifest.source.get('name'))}",
            *self._room.shown(),
            *([f"threads={self.threads}"] if self.threads is not None else []),
            *([f"tuning={str(self.tuning)!r}"] if str(self.tuning) else []),
            *(["fit=True"] if self._fitted else []),
            *(f"{option}={shown(folder)}" for option, folder in other_engines(self.session)),
        ]
        return f"{type(self).__name__}({', '.join(words)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        model, capabilities = self.config, self.manifest.capabilities
        return table(
            [
                ("engine", str(self._source or "not of a folder")),
                ("target", self.manifest.target),
                *other_engines(self.session),
                ("checkpoint", str(self.manifest.source.get("name"))),
                ("precision", str(capabilities.get("precision"))),
                ("weights", f"{self.manifest.weight_bytes / 1e6:.1f} MB"),
                ("layers", f"{model.vision.depth} of vision, {model.text.num_layers} of the decoder"),
                ("context", ", ".join(self._room.shown())),
                ("at once", f"{self.limits.max_sequences} sequences"),
            ]
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the checkpoint."""
        return self.preparation.tokenizer

    @property
    def image_config(self) -> ImageProcessorConfig:
        """How images are resized and cut, with the limits that the engine was opened with."""
        return self.preparation.inputs.image

    @property
    def max_image_pixels(self) -> int:
        """Images that have more pixels are refused before they are decoded."""
        return self.preparation.inputs.max_image_pixels

    @property
    def limits(self) -> Limits:
        """How many requests run and wait at most, and what is kept for later ones."""
        return self._worker.limits

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
        huge_pages: bool | None = None,
        cuda_graphs: bool | None = None,
        max_context: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_memory: int | None = None,
        max_image_pixels: int | None = None,
        legacy_video_prompt: bool = False,
        **keywords: Unpack[OpeningKeywords],
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
            min_pixels: Smaller images, and frames of videos, are enlarged to this area.
            max_pixels: Larger images, and frames of videos, are reduced to this area.
            max_memory: Most bytes that the engine may take in all by its plan (`runtime.memory_plan`): of a CPU engine,
                the whole process; the machine's memory, or the container's, by default; on a GPU, which refuses what it
                cannot hold, none.
            max_image_pixels: Images that have more pixels are refused before they are decoded, whatever `max_pixels`
                would reduce them to; 50 million by default, at most 178 million.
            legacy_video_prompt: Write prompts with videos as transformers before 5.10 did (docs/messages.md).
            **keywords: Requests at once, kernels, engines of parts, what `qwen3vl tune` found, what is given up where
                not all fits, and approximations (`OpeningKeywords`).

        Raises:
            EngineError: A file is missing or altered, or the engine does not open.
            CapacityError: Weights, a full KV cache and the prefill exceed `max_memory`.
            UsageError: An option is out of range or of no use to this engine, or `path` is a URL.
        """
        source = folder_path("engine", path)
        check_local(source, "engine")
        folder = Path(source)
        route = Route.read(folder, check=check, **take_route(keywords))
        options = EngineOptions.checked(
            route.manifest,
            threads=threads,
            huge_pages=huge_pages,
            cuda_graphs=cuda_graphs,
            max_context=max_context,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_memory=max_memory,
            max_image_pixels=max_image_pixels,
            legacy_video_prompt=legacy_video_prompt,
            **keywords,
        )
        return cls.from_manifest(folder, route.manifest, options, source=source, open_with=route.open)

    @classmethod
    def from_manifest(
        cls,
        folder: Path,
        manifest: Manifest,
        options: EngineOptions,
        *,
        source: str | None = None,
        open_with: OpenSession | None = None,
    ) -> Qwen3VLModel:
        """Open the files of an engine whose manifest is at hand, and need not be in the folder.

        Raises:
            EngineError, CapacityError, UsageError: As `from_engine`.
        """
        opened = open_engine(folder, manifest, options, open_with)
        return cls(
            manifest,
            opened.session,
            opened.preparation,
            options.max_context if options.window else opened.limits.max_context,
            options.max_memory,
            limits=opened.limits,
            source=source,
            threads=opened.threads,
            fitted=opened.fitted,
            tuning=options.tuning,
        )

    def generate(
        self,
        messages: Any,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = AUTO,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        on_piece: Callable[[Piece], object] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Generation:
        """Answer messages in the Hugging Face chat format; see `stream`.

        `on_piece` is called in this thread with each piece of text; if it raises, the answer is stopped. With `n` or
        `best_of`, `choices` of what is returned are all answers.
        """
        check_callback("on_piece", on_piece)
        call = Call(
            tools,
            chat_template_kwargs,
            priority,
            timeout_s,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            keywords=keywords,
        )
        chosen = self._chosen(options, keywords)
        if chosen.num_answers > 1 and on_piece is None:
            return run_choices(self._begin, messages, chosen, call)
        with self._stream(messages, chosen, call) as stream:
            if on_piece is not None:
                for piece in stream:
                    on_piece(piece)
            return complete(stream.wait())

    async def agenerate(
        self,
        messages: Any,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = AUTO,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Generation:
        """As `generate`, in an asyncio loop; a task that is cancelled stops its answer."""
        call = Call(
            tools,
            chat_template_kwargs,
            priority,
            timeout_s,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            keywords=keywords,
        )
        chosen = self._chosen(options, keywords)
        if chosen.num_answers > 1:
            return await run_choices_async(self._begin, messages, chosen, call)
        async with self._stream(messages, chosen, call) as stream:
            return complete(await stream.wait_async())

    def stream(
        self,
        messages: Any,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = AUTO,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Stream:
        """Answer messages piece by piece, cut at UTF-8 boundaries.

        Work begins with the first piece. Requests of all threads run beside each other, as many as `max_sequences`.

        Args:
            messages: Hugging Face chat format; an image is a path, bytes, a data URL, a PIL image or an array. Or a
                `RawPrompt`, text or token ids to continue without a chat template.
            options: All options of the answer, in place of the defaults, but that its `eos_token_ids`, if it has none,
                are the model's; `model.defaults.replace(…)` makes such a set. The defaults are `model.defaults`, which
                come from generation_config.json.
            tools: JSON schemas of functions, for chat templates that know tools. Calls of them are told from the text
                of the answer (`Generation.tool_calls`) if the template asks for a known format.
            tool_choice: "auto" lets the model call them, "none" leaves them out of the prompt. "required", or the name
                of one in a dict as OpenAI's interfaces have it (`runtime.tools.choice`), holds the answer to calls,
                whose arguments follow the schemas; that needs the extra `structured`.
            parallel_tool_calls: False: at most one call, with which the answer ends.
            chat_template_kwargs: Further variables of the chat template, such as `enable_thinking`.
            priority: Requests of a higher one leave the queue first, and their prompts go first in every second step.
            timeout_s: Seconds from this call on in which the answer has to be complete.
            **keywords: Single options with Hugging Face's names, laid over that set; and limits on images and videos
                (`runtime.input_limits.InputLimits`).

        Raises:
            UsageError: A message or an option is not valid, the template does not know a variable, the model was
                closed, or this process was forked from the one that opened it.
            ImageError: An image cannot be read.
            CapacityError: The prompt leaves no room in `max_context`, or the estimated memory exceeds `max_memory`. An
                answer that fills `max_context` ends with finish_reason "length".
            OverloadError: The queue is full.
            DeadlineError: `timeout_s` was over.
        """
        call = Call(
            tools,
            chat_template_kwargs,
            priority,
            timeout_s,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            keywords=keywords,
        )
        return self._stream(messages, self._chosen(options, keywords), call)

    def astream(self, messages: Any, options: GenerationOptions | None = None, **keywords: Any) -> Stream:
        """Return `stream(…)`, which `async for` reads as well."""
        return self.stream(messages, options, **keywords)

    def generate_batch(
        self,
        prompts: Iterable[Any],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = AUTO,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        on_done: Callable[[int, Generation | Qwen3VLError], object] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> list[Generation | Qwen3VLError]:
        """Answer many prompts side by side, as many at once as the engine runs.

        Prompts are prepared one by one while others run, and wait for room in the queue, so there may be any number.

        Args:
            prompts: The messages of each; see `stream`.
            options: Those of all answers, or of each.
            tools: As in `stream`, for all.
            tool_choice: As in `stream`, for all.
            parallel_tool_calls: As in `stream`, for all.
            chat_template_kwargs: As in `stream`, for all.
            priority: As in `stream`.
            timeout_s: As in `stream`, from when a prompt's turn to be prepared has come.
            on_done: Called in this thread with the number and the outcome of each prompt, in order; if it raises, the
                rest is stopped.
            **keywords: As in `stream`, for all.

        Returns:
            The outcome of each prompt in its place: its answer, or the error that ended it alone.

        Raises:
            UsageError: The options are not valid, or not as many as the prompts.
        """
        check_callback("on_done", on_done)
        call = Call(
            tools,
            chat_template_kwargs,
            priority,
            timeout_s,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            keywords=keywords,
        )
        return run_batch(self._begin, prompts, self._chosen_for_all(options, keywords), call, on_done)

    def chat(
        self,
        system: str | None = None,
        options: GenerationOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = AUTO,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Conversation:
        """Begin a conversation: each turn follows all before it, and runs only what is new.

        Any number of conversations may go on beside each other and beside other requests.

        Args:
            system: How the model is to answer.
            options: As in `stream`, for all answers.
            tools: As in `stream`, for all turns.
            tool_choice: As in `stream`, for all turns.
            parallel_tool_calls: As in `stream`, for all turns.
            chat_template_kwargs: As in `stream`, for all turns.
            **keywords: As in `stream`, for all answers.

        Raises:
            UsageError: An argument or an option is not valid.
        """
        self._owner.check()
        if not (system is None or isinstance(system, str)):
            raise UsageError(f"system must be a string, got {type(system).__name__}", remedy="leave system out")
        start = None if system is None else normalise_messages(system_message(system))
        call = Call(
            tools,
            chat_template_kwargs,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            keywords=keywords,
        )
        return Conversation(self._begin, self._chosen(options, keywords), call, start, self._room.window)

    def _chosen_for_all(
        self, options: GenerationOptions | Sequence[GenerationOptions] | None, keywords: Mapping[str, Any]
    ) -> GenerationOptions | list[GenerationOptions]:
        if isinstance(options, (list, tuple)):
            return [self._chosen(each, keywords) for each in options]
        return self._chosen(options, keywords)  # type: ignore[arg-type]

    def _chosen(self, options: GenerationOptions | None, given: Mapping[str, Any]) -> GenerationOptions:
        keywords = answer_keywords(given)
        if options is None:
            return self.defaults.replace(**keywords)
        if not isinstance(options, GenerationOptions):
            raise UsageError(
                f"options must be GenerationOptions, got {type(options).__name__}",
                remedy="pass single options as keyword arguments: max_new_tokens=32",
            )
        return options.replace(eos_token_ids=options.eos_token_ids or self.defaults.eos_token_ids).replace(**keywords)

    def _stream(self, messages: Any, options: GenerationOptions, call: Call) -> Stream:
        self._owner.check()
        refuse_several(options, "a stream")
        return Stream(partial(self._begin, messages, options, call), keeps=self)

    def _begin(
        self,
        messages: Any,
        options: GenerationOptions,
        call: Call,
        pieces: Pieces,
        *,
        waits: bool = False,
        on_prepared: Callable[[Prepared], object] | None = None,
    ) -> None:
        """Prepare a prompt in this thread, and put it into the queue, unless its pieces are cancelled before."""
        self._owner.check()
        if options.max_thinking_tokens is not None:
            checked_marks(self.tokenizer)
        refuse_several(options, "this call")
        is_open = partial(self._worker.check_open, has_place=True)
        check = StillWanted(lambda: pieces.is_cancelled, call.deadline, also=is_open)
        try:
            self._queue(messages, options, call, pieces, check, waits=waits, on_prepared=on_prepared)
        except NotWanted:
            pieces.cancel()  # of a stream that was dropped they are only marked

    def _queue(
        self,
        messages: Any,
        options: GenerationOptions,
        call: Call,
        pieces: Pieces,
        check: Check,
        *,
        waits: bool,
        on_prepared: Callable[[Prepared], object] | None,
    ) -> None:
        with self._worker.reserve(waits=waits, check=check) as place, naming_errors(), Ahead() as ahead:
            started = time.perf_counter()
            make_constraint = self._compiled(options, call)

            def on_images(images: Sequence[ProcessedImage]) -> None:
                self._check_memory(images)
                self._worker.encode_ahead(images, ahead.embeds, lambda: not (pieces.is_cancelled or ahead.is_refused))

            prepared = self._prepare(messages, call, on_images, check)
            max_new_tokens = self._room.answer_tokens(prepared, options)
            self._check_memory(self._room.images_in_reach(prepared))
            for note in self._room.notes(prepared, options, max_new_tokens):
                _LOGGER.warning("%s", note)
            if on_prepared is not None:
                on_prepared(prepared)
            ready = time.perf_counter()
            request = Request(
                prepared,
                options,
                max_new_tokens,
                started,
                ready,
                call.priority,
                call.deadline,
                ahead.embeds,
                expected_calls=ExpectedCalls.of(self.preparation.template.call_format, call.tools, call.tool_choice),
                make_constraint=make_constraint,
                pieces=pieces,
            )
            self._worker.submit(place, request, waits=waits, check=check)

    def _compiled(self, options: GenerationOptions, call: Call) -> MakeConstraint | None:
        """Return what holds an answer to its format, before the prompt is read, and check the ids of its biases."""
        num_logits = self.config.text.vocab_size
        beyond = [token_id for token_id, _ in options.logit_bias if token_id >= num_logits]
        if beyond:
            raise UsageError(
                f"logit_bias names the token {beyond[0]}, the model has {num_logits}", remedy="leave that id out"
            )
        wanted = options.response_format
        if call.tool_choice.is_forced:
            if wanted is not None:
                raise UsageError(
                    "tool_choice asks for a call, and response_format for an answer of another form",
                    remedy="leave one of them out: a call follows the schema of its function",
                )
            wanted = calls_format(
                call.tool_choice, call.tools or (), self.preparation.template.call_format, self.tokenizer.mark_id
            )
        return None if wanted is None else self._compiler.compile(wanted, options.eos_token_ids)

    def logits(self, messages: Any) -> FloatArray:
        """Return the logits of every prompt token, float32 [prompt tokens, vocab], generation prompt included.

        Opened with `visual_token_share`, an engine gives those of the tokens that stay in the prompt.
        """
        self._owner.check()
        self._room.check_exact("logits")
        chunks: list[FloatArray] = []
        pieces = Pieces()
        try:
            with self._worker.reserve() as place, naming_errors():
                prepared = self.prepare(messages)
                self._check_memory(prepared.images, logits_of=len(prepared.prompt.input_ids))
                now = time.perf_counter()
                request = Request(prepared, self.defaults, 0, now, now, on_logits=chunks.append, pieces=pieces)
                self._worker.submit(place, request)
            pieces.wait()
        finally:
            pieces.cancel()
        return np.concatenate(chunks)

    def warm_up(self) -> None:
        """Run each kind of call once, so that the first requests are as fast as later ones.

        On a GPU that takes seconds and saves as many: kernels are loaded, and decode steps recorded for each number of
        sequences. Requests may run beside it; they wait for it once.
        """
        self._owner.check()
        self._worker.call(self._worker.warm_up)

    def check_open(self) -> None:
        """Raise if requests are not taken any more.

        Raises:
            UsageError: The model was closed, or this process was forked from the one that opened it.
            EngineError: The engine has failed.
        """
        self._owner.check()
        self._worker.check_open()

    def statistics(self) -> dict[str, Any]:
        """Return what the engine has done and holds, as plain data; see `runtime.scheduling.counters`."""
        self._owner.check()
        kernels = getattr(self.session, "decode_kernels", None)
        problem = getattr(self.session, "decode_plan_problem", None)
        path = {} if kernels is None else {"decode_kernels": kernels, "decode_plan_problem": problem}
        fitted = {name: {"wanted": wanted, "chosen": chosen} for name, (wanted, chosen) in self._fitted.items()}
        route = describe(self.session)
        more = {"fitted": fitted, "route": route}
        path["tuning"] = self.tuning.values()
        return {**self._worker.statistics(), **path, **{name: value for name, value in more.items() if value}}

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests and end the engine's thread.

        Args:
            drain: Answer what was accepted first; otherwise it fails with an error that says so.
            timeout_s: Answer no longer than that.

        Raises:
            UsageError: An argument is of the wrong kind.
        """
        drains = true_or_false("drain", drain)
        self._worker.close(drains=drains, timeout_s=None if timeout_s is None else seconds(timeout_s))

    def __enter__(self) -> Qwen3VLModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def prepare(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        check: Check = always,
        **keywords: Unpack[InputKeywords],
    ) -> Prepared:
        """Render, tokenise, process images and videos and number the positions.

        Args:
            messages: As in `stream`, as the next two and the keywords.
            tools: As in `stream`.
            chat_template_kwargs: As in `stream`.
            check: Called before each image, frame and piece of a long text; what it raises ends the reading.
            **keywords: As in `stream`.
        """
        if unknown := keywords.keys() - INPUT_KEYWORDS:
            raise UsageError(
                f"prepare takes no {', '.join(sorted(unknown))}", remedy=f"it takes {', '.join(sorted(INPUT_KEYWORDS))}"
            )
        return self._prepare(messages, Call(tools, chat_template_kwargs, keywords=keywords), check=check)

    def _prepare(self, messages: Any, call: Call, on_images: OnImages | None = None, check: Check = always) -> Prepared:
        prepared = self.preparation.prepare(
            messages,
            tools=call.tools,
            chat_template_kwargs=call.chat_template_kwargs,
            limits=call.limits,
            max_tokens=self.max_context,
            on_images=on_images,
            check=check,
        )
        self._room.check(prepared)
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
        # One by one, so that requests that run wait for one image at most.
        embeds = [
            self._worker.call(partial(self._encode, image), is_vision=True) for image in processed if image is not None
        ]
        return np.concatenate(embeds, axis=1) if embeds else no_visual_embeds(self.config)

    def _encode(self, image: ProcessedImage) -> FloatArray:
        return on_host(self.session.vision(self.preparation.vision_inputs(image)))

    def _check_memory(self, images: Sequence[ProcessedImage], *, logits_of: int = 0) -> None:
        patches = tuple(math.prod(image.grid_thw) for image in images)
        work = replace(self._work, images=patches, prompts_with_images=1, logits_of=logits_of)
        check_fits(self._planner.plan(work).parts, self.max_memory)
