"""What a load asks: an engine opened in this process, or a server (`qwen3vl_export.load.server`), behind one face."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel


@dataclass(frozen=True)
class Reply:
    """What a client knows of one answer. None stands for what was not told.

    Attributes:
        ttft_s: Seconds from the call to the first token.
        tpot_s: Mean seconds for each later token.
        new_tokens: Tokens of the answer.
        prompt_tokens: Tokens of the prompt, visual ones included.
        queue_s: Seconds in the queue.
        cached_tokens: Tokens of the prompt that were found in a cache.
        cached_images: Images whose embeddings were found in a cache.
    """

    ttft_s: float
    tpot_s: float
    new_tokens: int
    prompt_tokens: int | None = None
    queue_s: float | None = None
    cached_tokens: int | None = None
    cached_images: int | None = None


class Client(Protocol):
    """Ask, from many threads at once."""

    def prepare(self, messages: list[dict[str, Any]], new_tokens: int) -> Any:
        """Return a request for `ask`, before the time of its arrival.

        Args:
            messages: A prompt, as `Prompts.messages` returns it.
            new_tokens: Tokens of the answer, which no end token ends.
        """
        ...

    def ask(self, request: Any) -> Reply:
        """Send a request and return when its answer is complete.

        Raises:
            OverloadError: It was refused because too many wait.
            Qwen3VLError: It failed otherwise.
        """
        ...

    def statistics(self) -> dict[str, Any]:
        """Return counters as `Qwen3VLModel.statistics` does; none if they cannot be seen."""
        ...

    def memory_bytes(self) -> int | None:
        """Return the resident bytes of the process that answers; None if they cannot be seen."""
        ...

    def stop(self) -> None:
        """End all requests that run; those who asked get an error."""
        ...


class InProcess:
    """An engine that is open in this process.

    Args:
        model: The engine, which `stop` closes.
    """

    def __init__(self, model: Qwen3VLModel) -> None:
        self.model = model

    def prepare(self, messages: list[dict[str, Any]], new_tokens: int) -> Any:
        """Return both; preparation proper is part of the answer's time."""
        return messages, new_tokens

    def ask(self, request: Any) -> Reply:
        """Answer greedily."""
        messages, new_tokens = request
        stats = self.model.generate(messages, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[]).stats
        return Reply(
            stats.ttft_s,
            stats.tpot_s,
            stats.new_tokens,
            stats.prompt_tokens,
            stats.queue_s,
            stats.cached_tokens,
            stats.cached_images,
        )

    def statistics(self) -> dict[str, Any]:
        """Return those of the model."""
        return self.model.statistics()

    def memory_bytes(self) -> int | None:
        """Return the resident bytes of this process; None where the system has no /proc."""
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return None

    def stop(self) -> None:
        """Close the model without waiting for answers."""
        self.model.close(drain=False)
