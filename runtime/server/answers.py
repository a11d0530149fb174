"""Answers to what a body asks, whole or piece by piece, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from runtime.answer import Generation
from runtime.conversation import complete
from runtime.input_limits import INPUT_KEYWORDS
from runtime.piece import Piece
from runtime.server.engines import Served
from runtime.server.protocol.asked import Asked

Part = Piece | Generation
"""A piece of an answer, or, at its end, all of it."""

_FOR_PREPARE = frozenset(("tools", "chat_template_kwargs", *INPUT_KEYWORDS))


async def whole_answers(served: Served, asked: Asked) -> list[Generation]:
    """Return all answers, those to one prompt one after the other, then those to the next.

    Raises:
        Qwen3VLError: What ended one of them; the others are stopped.
    """
    if "best_of" in asked.options:
        ranked: list[Generation] = []
        for prompt in asked.prompts:
            best = await served.model.agenerate(prompt, **asked.options, n=asked.num_answers)
            ranked += best.choices or [best]
        return ranked
    if len(asked.prompts) * asked.num_answers == 1:
        return [await _whole(served, asked.prompts[0], asked.options)] * asked.num_copies
    found: dict[int, Generation] = {}
    async with aclosing(answer_parts(served, asked)) as parts:
        async for index, part in parts:
            if isinstance(part, Generation):
                found[index] = part
    return [each for _, each in sorted(found.items())]


async def answer_parts(served: Served, asked: Asked) -> AsyncGenerator[tuple[int, Part], None]:
    """Yield the parts of all answers as they come, each with the number of its answer; the last of each is all of it.

    Closing the iterator stops all of them.

    Raises:
        Qwen3VLError: What ended one of them; the others are stopped.
    """
    copies = asked.num_copies
    if len(asked.prompts) * asked.num_answers == 1:
        async with aclosing(_parts(served, asked.prompts[0], asked.options)) as parts:
            async for part in parts:
                for index in range(copies):
                    yield index, part
        return
    async with aclosing(_merged(served, asked)) as merged:
        async for index, part in merged:
            for copy in range(copies):
                yield index * copies + copy, part


async def _whole(served: Served, prompt: Any, options: Mapping[str, Any]) -> Generation:
    async with served.model.stream(prompt, **options) as stream:
        await served.turns.begin(stream, prompt)
        return complete(await stream.wait_async())


async def _parts(served: Served, prompt: Any, options: Mapping[str, Any]) -> AsyncGenerator[Part, None]:
    async with served.model.stream(prompt, **options) as stream:
        await served.turns.begin(stream, prompt)
        async for piece in stream:
            yield piece
        yield complete(stream.result)


async def _merged(served: Served, asked: Asked) -> AsyncGenerator[tuple[int, Part], None]:
    """Yield the parts of several streams."""
    queue: asyncio.Queue[tuple[int, Part | BaseException]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    async def answer(index: int, prompt: Any, options: Mapping[str, Any], shows: asyncio.Event) -> None:
        try:
            async with aclosing(_parts(served, prompt, options)) as parts:
                async for part in parts:
                    queue.put_nowait((index, part))
                    shows.set()
        except Exception as error:
            queue.put_nowait((index, error))
        finally:
            shows.set()

    async def answer_several(first: int, prompt: Any) -> None:
        """Answer one prompt several times: its images are read once, and its rows of the KV cache are shared."""
        try:
            keywords = {name: value for name, value in asked.options.items() if name in _FOR_PREPARE}
            timeout_s = asked.options.get("timeout_s")
            prepared = await served.turns.prepare(served.model, prompt, timeout_s, **keywords)
        except Exception as error:
            queue.put_nowait((first, error))
            return
        for number in range(asked.num_answers):
            options = dict(asked.options)
            if options.get("seed") is not None:
                options["seed"] += number
            shows = asyncio.Event()
            tasks.append(asyncio.create_task(answer(first + number, prepared.messages, options, shows)))
            if number == 0:
                await shows.wait()  # then its rows are there

    try:
        for number, prompt in enumerate(asked.prompts):
            if asked.num_answers == 1:
                tasks.append(asyncio.create_task(answer(number, prompt, asked.options, asyncio.Event())))
            else:
                tasks.append(asyncio.create_task(answer_several(number * asked.num_answers, prompt)))
        left = len(asked.prompts) * asked.num_answers
        while left:
            index, part = await queue.get()
            if isinstance(part, BaseException):
                raise part
            left -= isinstance(part, Generation)
            yield index, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
