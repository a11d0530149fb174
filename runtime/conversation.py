"""`Conversation`: turns one after the other, each with all before it, of which an engine runs only what is new.

Nothing of a conversation is held by the engine. Each turn renders all messages again and asks with the whole prompt;
the engine finds the rows that it still has by token ids and digests of pixels. So what a template renders otherwise a
turn later, such as the thoughts of an earlier answer that it leaves out, and what other requests have driven out of the
KV cache, is run again: that costs time, and never makes an answer wrong.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Unpack

from runtime.answer import Generation
from runtime.arguments import whole_number
from runtime.calls import Begin, Call, check_callback
from runtime.errors import UsageError
from runtime.generation_config import GenerationOptions
from runtime.generation_keywords import RequestKeywords
from runtime.image_processor import ProcessedImage
from runtime.input_limits import answer_keywords
from runtime.messages import Messages, asked_messages
from runtime.piece import Piece
from runtime.preparation import Prepared
from runtime.raw_prompt import RawPrompt
from runtime.scheduling.pieces import Pieces
from runtime.sliding_window import SlidingWindow
from runtime.stream import Stream


@dataclass(frozen=True)
class Turn:
    """What was asked, and the answer.

    Attributes:
        messages: As in `Conversation.messages`; nearly always one.
        answer: The answer.
    """

    messages: Sequence[dict[str, Any]]
    answer: Generation


@dataclass(eq=False)
class _Asked:
    """A turn that is not complete: what it asks, then also with processed images, and its stream.

    Attributes:
        messages: As they were given.
        shown: With processed images.
        passed: Images of earlier turns that will not be run any more, by identity.
        stream: Its stream.
    """

    messages: Messages
    shown: Messages | None = None
    passed: set[int] = field(default_factory=set)
    stream: weakref.ref[Stream] | None = None

    @property
    def is_open(self) -> bool:
        """Whether its answer may still be read."""
        stream = None if self.stream is None else self.stream()
        return stream is not None and stream.is_open


class Conversation:
    """Turns with a model, which `Qwen3VLModel.chat` begins.

    A turn is part of the conversation once its answer was read to the end; one that fails, or whose stream is closed or
    dropped, leaves no trace. Images are read when they are shown, and kept as patches (24 bytes for each pixel after
    resizing), until a sliding window has passed them for good: a file may change or go away later. Methods may be
    called from any thread, but there is one turn at a time; for several answers to one history, `fork` it.

    Args:
        begin: Prepares and submits a prompt.
        options: Options of the answers.
        call: Tools and variables of the chat template.
        start: Messages before the first turn; none by default.
        window: The engine's sliding window, if it has one.
    """

    def __init__(
        self,
        begin: Begin,
        options: GenerationOptions,
        call: Call,
        start: Messages | None = None,
        window: SlidingWindow | None = None,
    ) -> None:
        self._begin = begin
        self._options = options
        self._call = call
        self._start = Messages([], ()) if start is None else start
        self._window = window
        self._lock = threading.Lock()
        self._turns: list[tuple[Messages, Generation]] = []
        self._asked: _Asked | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(turns={len(self._turns)})"

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns that are complete, the oldest first; copies."""
        with self._lock:
            turns = list(self._turns)
        return tuple(Turn(tuple(messages.filled()), answer) for messages, answer in turns)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system message and the answers included; a copy, fit for `Qwen3VLModel.generate`.

        An image is a `ProcessedImage`, as it was shown, whatever it was given as.
        """
        with self._lock:
            return self._history().filled()

    def ask(
        self,
        prompt: Any,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        priority: int = 0,
        timeout_s: float | None = None,
        on_piece: Callable[[Piece], object] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Generation:
        """Answer the next turn; see `stream`.

        `on_piece` is called in this thread with each piece of text; if it raises, the turn is dropped.
        """
        check_callback("on_piece", on_piece)
        with self.stream(
            prompt, images=images, videos=videos, priority=priority, timeout_s=timeout_s, **keywords
        ) as stream:
            if on_piece is not None:
                for piece in stream:
                    on_piece(piece)
            return complete(stream.wait())

    async def aask(
        self,
        prompt: Any,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        priority: int = 0,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Generation:
        """As `ask`, in an asyncio loop; a task that is cancelled drops its turn."""
        async with self.stream(
            prompt, images=images, videos=videos, priority=priority, timeout_s=timeout_s, **keywords
        ) as stream:
            return complete(await stream.wait_async())

    def stream(
        self,
        prompt: Any,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        priority: int = 0,
        timeout_s: float | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> Stream:
        """Answer the next turn piece by piece, for `for` and for `async for`.

        The turn begins with the first piece, behind the turns that are complete then, and ends when the stream has been
        read to its end.

        Args:
            prompt: What the user says: text, or parts of a message as in `Qwen3VLModel.stream`. Or one whole message or
                several, such as `{"role": "tool", "content": …}`.
            images: Shown before the text.
            videos: Shown after the images.
            priority: As in `Qwen3VLModel.stream`.
            timeout_s: As in `Qwen3VLModel.stream`.
            **keywords: Single options of this answer, laid over those of the conversation.

        Raises:
            UsageError: Another turn is being answered; and as `Qwen3VLModel.stream`.
            ImageError, CapacityError, OverloadError, DeadlineError: As `Qwen3VLModel.stream`.
        """
        if isinstance(prompt, RawPrompt):
            raise UsageError(
                "a raw prompt is no turn of a conversation", remedy="pass it to generate or stream of the model"
            )
        asked = _Asked(asked_messages(prompt, images, videos))
        call = self._call.with_order(priority, timeout_s, keywords)
        begin = partial(self._begin_turn, asked, self._options.replace(**answer_keywords(keywords)), call)
        stream = Stream(begin, keeps=self, on_end=partial(self._end_turn, asked))
        asked.stream = weakref.ref(stream)
        return stream

    def rewind(self, turn: int) -> None:
        """Drop a turn and all after it.

        Args:
            turn: Its place in `turns`; -1 is the last.

        Raises:
            UsageError: There is no such turn, or one is being answered.
        """
        with self._lock:
            self._check_idle()
            most = len(self._turns)
            expected = f"-{most} to {most - 1}: there are {most} turns" if most else "nothing: there are no turns"
            place = whole_number("turn", turn, -most, most - 1, expected, "-1 drops the last turn; reset() drops all")
            del self._turns[place:]

    def reset(self) -> None:
        """Drop all turns; a system message stays.

        Raises:
            UsageError: A turn is being answered.
        """
        with self._lock:
            self._check_idle()
            self._turns.clear()

    def fork(self) -> Conversation:
        """Return another conversation with the same complete turns and options; neither knows of the other's next."""
        other = type(self)(self._begin, self._options, self._call, self._start, self._window)
        with self._lock:
            other._turns = list(self._turns)
        return other

    def _history(self) -> Messages:
        """Return all messages; under the lock."""
        messages, attachments = list(self._start.turns), list(self._start.attachments)
        for asked, answer in self._turns:
            messages += [*asked.turns, answer.to_message()]
            attachments += asked.attachments
        return Messages(messages, tuple(attachments))

    def _check_idle(self) -> None:
        """Raise if a turn is being answered; under the lock."""
        if self._asked is not None and self._asked.is_open:
            raise UsageError(
                "a turn of this conversation is being answered",
                remedy="read its stream to the end, or close it; for an answer beside it, ask a fork() instead",
            )

    def _begin_turn(self, asked: _Asked, options: GenerationOptions, call: Call, pieces: Pieces) -> None:
        with self._lock:
            self._check_idle()
            self._asked = asked
            history = self._history()

        def show(prepared: Prepared) -> None:
            # From now on the images are those that were shown.
            assert isinstance(prepared.messages, Messages), "a conversation holds no raw prompt"
            turns, attachments = prepared.messages
            asked.shown = Messages(turns[len(history.turns) :], attachments[len(history.attachments) :])
            if self._window is not None:
                in_reach = self._window.in_reach(prepared.prompt)
                asked.passed = {id(prepared.images[i]) for i in set(range(len(prepared.images))).difference(in_reach)}

        self._begin(history.then(asked.messages), options, call, pieces, on_prepared=show)

    def _end_turn(self, asked: _Asked, answer: Generation) -> None:
        with self._lock:
            if self._asked is asked:  # not closed and followed by another in the meantime
                assert asked.shown is not None, "it was begun"
                self._asked = None
                if self._window is not None:
                    # That of all images of the prompt, turn after turn, would grow with the square of their number.
                    newest = slice(-max(1, len(asked.shown.attachments)), None)
                    sizes, sources = answer.image_sizes[newest], answer.sources[newest]
                    answer = replace(answer, image_sizes=sizes, sources=sources)
                self._turns.append((asked.shown, answer))
                if asked.passed:
                    self._turns = [(_without_pixels(each, asked.passed), answer) for each, answer in self._turns]


def _without_pixels(messages: Messages, passed: set[int]) -> Messages:
    """Return messages that hold no pixels of some images."""
    attachments = tuple(
        replace(each, source=each.source.without_patches())
        if id(each.source) in passed and isinstance(each.source, ProcessedImage) and each.source.has_patches
        else each
        for each in messages.attachments
    )
    return Messages(messages.turns, attachments)


def complete(generation: Generation | None) -> Generation:
    """Return an answer.

    Raises:
        UsageError: Somebody has closed its stream.
    """
    if generation is None:
        raise UsageError("the answer was stopped before its end", remedy="ask again")
    return generation
