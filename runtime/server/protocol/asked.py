"""`Asked`: what a body asks of an engine, checked as far as that goes without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError
from runtime.server.engines import Served


@dataclass(frozen=True)
class Asked:
    """Prompts, and how each is to be answered.

    Attributes:
        prompts: What `Qwen3VLModel.stream` takes.
        options: Its arguments.
        num_answers: How many answers to each prompt are made.
        num_copies: How often each of them is given: greedy answers to one prompt are the same.
    """

    prompts: Sequence[Any]
    options: dict[str, Any]
    num_answers: int = 1
    num_copies: int = 1

    @classmethod
    def checked(cls, served: Served, prompts: Sequence[Any], options: dict[str, Any], n: int) -> Asked:
        """Check the number of answers.

        Args:
            served: Who is asked.
            prompts: As the attribute.
            options: As the attribute.
            n: Answers to each prompt that the client wants.

        Raises:
            UsageError: There would be too many.
        """
        most = served.settings.max_choices
        num_made = max(n, options.get("best_of", 1)) * len(prompts)
        if num_made > most:
            raise UsageError(
                f"{num_made} answers are asked for, at most {most} are made", remedy="ask for fewer in one request"
            )
        is_drawn = options.get("do_sample", served.model.defaults.do_sample) and options.get("temperature") != 0
        if not is_drawn:
            options.pop("best_of", None)  # all would be the same
        return cls(prompts, options, n if is_drawn else 1, 1 if is_drawn else n)

    @property
    def num_choices(self) -> int:
        """Answers that the client gets."""
        return len(self.prompts) * self.num_answers * self.num_copies
