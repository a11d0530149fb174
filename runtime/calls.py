"""What a caller says beside messages and options, and many prompts at once."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from runtime.answer import Generation
from runtime.arguments import (
    AUTO,
    NO_CALLS,
    reading,
    template_variables,
    tool_schemas,
    whole_number,
)
from runtime.errors import Qwen3VLError, UsageError
from runtime.generation_config import GenerationOptions
from runtime.input_limits import InputLimits
from runtime.preparation import Prepared
from runtime.scheduling.pieces import Pieces
from runtime.shown import shown
from runtime.tools.choice import tool_choice as checked_tool_choice

_LARGEST_PRIORITY = 1 << 31
Outcome = Generation | Qwen3VLError


class Call:
    """Arguments of a call that are no options of the answer, checked when the caller gives them.

    Args:
        tools, chat_template_kwargs, priority, timeout_s, tool_choice, parallel_tool_calls: As in
            `Qwen3VLModel.stream`.
        keywords: Its other keywords, of which those of `InputLimits` are taken.

    Attributes:
        limits: Limits on images and videos.
        tools: Those that the prompt shows.
        tool_choice: What the answer may call.
        deadline: When the answer has to be complete, by `time.perf_counter`, if there is such a time.

    Raises:
        UsageError: One of them is of the wrong kind.
    """

    def __init__(
        self,
        tools: Any,
        chat_template_kwargs: Any,
        priority: Any = 0,
        timeout_s: Any = None,
        *,
        tool_choice: Any = AUTO,
        parallel_tool_calls: Any = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> None:
        # Now, since work begins later, when the caller may have changed them.
        self.tools = tool_schemas(tools)
        self.tool_choice = checked_tool_choice(tool_choice, parallel_tool_calls, self.tools)
        if self.tool_choice.mode == NO_CALLS:
            self.tools = None
        self.chat_template_kwargs = template_variables(chat_template_kwargs)
        self.limits = InputLimits().with_keywords(keywords or {})
        self._take_order(priority, timeout_s)

    def again(self) -> Call:
        """Return the same call, whose time begins now."""
        return self.with_order(self.priority, self._timeout_s)

    def with_order(self, priority: Any, timeout_s: Any, keywords: Mapping[str, Any] | None = None) -> Call:
        """Return a call with the same tools and variables, limits laid over, whose time begins now.

        Raises:
            UsageError: As the constructor.
        """
        call = object.__new__(type(self))
        call.__dict__ = {**vars(self)}
        call.limits = self.limits.with_keywords(keywords or {})
        call._take_order(priority, timeout_s)
        return call

    def _take_order(self, priority: Any, timeout_s: Any) -> None:
        limit = _LARGEST_PRIORITY
        expected = "a whole number from -2^31 to 2^31, higher ones first"
        self.priority = whole_number("priority", priority, -limit, limit, expected, "leave priority out for 0")
        self._timeout_s = None if timeout_s is None else seconds(timeout_s)
        self.deadline = None if self._timeout_s is None else time.perf_counter() + self._timeout_s


class Begin(Protocol):
    """Prepares a prompt and submits it."""

    def __call__(
        self,
        messages: Any,
        options: GenerationOptions,
        call: Call,
        pieces: Pieces,
        *,
        waits: bool = False,
        on_prepared: Callable[[Prepared], object] | None = None,
    ) -> None:
        """Return once the request waits.

        Args:
            messages: The prompt.
            options: Those of the answer.
            call: What the caller says beside them.
            pieces: Where the answer goes.
            waits: Wait for room in the queue.
            on_prepared: Called with the prompt before it is submitted.
        """


def run_batch(
    begin: Begin,
    prompts: Iterable[Any],
    options: GenerationOptions | Sequence[GenerationOptions],
    call: Call,
    on_done: Callable[[int, Outcome], object] | None,
) -> list[Outcome]:
    """Answer all prompts; see `Qwen3VLModel.generate_batch`."""
    messages = _listed(prompts)
    if not isinstance(options, GenerationOptions) and len(options) != len(messages):
        raise UsageError(
            f"{len(options)} options for {len(messages)} prompts", remedy="give one for each, or one for all"
        )
    begun: list[Pieces | Qwen3VLError] = []
    outcomes: list[Outcome] = []

    def collect(waits: bool) -> None:
        while len(outcomes) < len(begun):
            pieces = begun[len(outcomes)]
            if not (waits or isinstance(pieces, Qwen3VLError) or pieces.is_ended):
                return
            outcomes.append(_outcome(pieces))
            if on_done is not None:
                on_done(len(outcomes) - 1, outcomes[-1])

    try:
        for index, each in enumerate(messages):
            own = options if isinstance(options, GenerationOptions) else options[index]
            # Noted first, so that an interrupt leaves no request that nobody stops.
            pieces = Pieces()
            begun.append(pieces)
            try:
                begin(each, own, call.again(), pieces, waits=True)
            except Qwen3VLError as error:
                begun[-1] = error
            collect(waits=False)
        collect(waits=True)
        return outcomes
    finally:
        for left in begun[len(outcomes) :]:
            if isinstance(left, Pieces):
                left.cancel()


def _outcome(pieces: Pieces | Qwen3VLError) -> Outcome:
    if isinstance(pieces, Qwen3VLError):
        return pieces
    try:
        generation = pieces.wait()
    except Qwen3VLError as error:
        return error
    assert generation is not None, "nobody else can stop it"
    return generation


def _listed(prompts: Any) -> list[Any]:
    remedy = "pass a list with the messages of each prompt"
    if isinstance(prompts, (str, bytes, dict)):
        raise UsageError(f"prompts must be a list, got {shown(prompts)}", remedy=remedy)
    with reading("prompts", remedy):
        return list(prompts)


def check_callback(name: str, value: Any) -> None:
    """Check what is to be called with pieces or outcomes, if there is such a thing.

    Raises:
        UsageError: It cannot be called.
    """
    if value is not None and not callable(value):
        raise UsageError(f"{name} must be a function, got {shown(value)}", remedy=f"leave {name} out")


def seconds(value: Any) -> float:
    """Return a `timeout_s`.

    Raises:
        UsageError: It is no number.
    """
    remedy = "leave timeout_s out for no limit"
    with reading("timeout_s", remedy):  # a whole number may be too large for a float
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
            raise UsageError(f"timeout_s = {shown(value)}, expected seconds", remedy=remedy)
        return float(value)
