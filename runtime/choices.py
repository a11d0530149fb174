"""Several answers to one prompt (`n`, `best_of`).

The prompt's images are read once. The first answer goes ahead: as soon as it shows something, the rows of the prompt
are in the KV cache, and the other requests take them from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from runtime.answer import Generation
from runtime.calls import Begin, Call
from runtime.conversation import complete
from runtime.errors import UsageError
from runtime.generation_config import GenerationOptions
from runtime.preparation import Prepared
from runtime.scheduling.pieces import Pieces

_LARGEST_SEED = (1 << 256) - 1


def refuse_several(options: GenerationOptions, what: str) -> None:
    """Raise if options ask for several answers where there can be one only.

    Raises:
        UsageError: They do.
    """
    if options.num_answers > 1:
        raise UsageError(
            f"{what} gives one answer, n and best_of ask for {options.num_answers}",
            remedy="call generate or agenerate without on_piece, or leave n and best_of out",
        )


def run_choices(begin: Begin, messages: Any, options: GenerationOptions, call: Call) -> Generation:
    """Make several answers to one prompt.

    Args:
        begin: Prepares and submits a prompt.
        messages: The prompt.
        options: With `n` or `best_of`.
        call: What the caller says beside them.

    Returns:
        The first or the best one, with all that were asked for as its `choices`.
    """
    answers = _Answers(begin, options, call)
    try:
        answers.begin_first(messages)
        answers.pieces[0].take()
        answers.begin_others()
        return _chosen(options, [complete(each.wait()) for each in answers.pieces])
    finally:
        answers.cancel()


async def run_choices_async(begin: Begin, messages: Any, options: GenerationOptions, call: Call) -> Generation:
    """As `run_choices`, in an asyncio loop."""
    answers = _Answers(begin, options, call)
    try:
        await asyncio.to_thread(answers.begin_first, messages)
        await answers.pieces[0].take_async()
        await asyncio.to_thread(answers.begin_others)
        return _chosen(options, [complete(await each.wait_async()) for each in answers.pieces])
    finally:
        answers.cancel()


class _Answers:
    """The requests of one call."""

    def __init__(self, begin: Begin, options: GenerationOptions, call: Call) -> None:
        self._begin = begin
        self._options = _single(options)
        self._call = call
        self._prepared: list[Prepared] = []
        self.pieces = [Pieces() for _ in self._options]

    def begin_first(self, messages: Any) -> None:
        first = self._prepared.append
        self._begin(messages, self._options[0], self._call, self.pieces[0], on_prepared=first)

    def begin_others(self) -> None:
        messages = self._prepared[0].messages
        for options, pieces in zip(self._options[1:], self.pieces[1:], strict=True):
            if not pieces.is_cancelled:
                self._begin(messages, options, self._call, pieces, waits=True)

    def cancel(self) -> None:
        for each in self.pieces:
            each.cancel()


def mean_logprob(generation: Generation) -> float:
    """Return the mean log probability of an answer's tokens, which `logprobs` noted; -inf if there is none."""
    noted = generation.logprobs or ()
    return math.fsum(each.logprob for each in noted) / len(noted) if noted else -math.inf


def _single(options: GenerationOptions) -> list[GenerationOptions]:
    """Return the options of each answer."""
    first = dataclasses.replace(options, n=1, best_of=None, logprobs=options.logprobs or options.best_of is not None)
    if options.seed is None:
        return [first] * options.num_answers
    last = options.seed + options.num_answers - 1
    if last > _LARGEST_SEED:
        raise UsageError("seed is too large for so many answers", remedy="pass a smaller seed")
    return [dataclasses.replace(first, seed=options.seed + i) for i in range(options.num_answers)]


def _chosen(options: GenerationOptions, answers: Iterable[Generation]) -> Generation:
    ranked = list(answers)
    if options.best_of is not None:
        ranked.sort(key=mean_logprob, reverse=True)  # stable: of equally likely ones the lower seed
    kept = ranked[: options.n]
    if not options.logprobs:
        kept = [dataclasses.replace(each, logprobs=None) for each in kept]
    return dataclasses.replace(kept[0], choices=tuple(kept))
