"""How many requests run and wait on an engine, and what is kept for later ones."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from runtime.arguments import reading, whole_number
from runtime.errors import UsageError
from runtime.option_checks import between, true_or_false
from runtime.shown import shown

_LARGEST = 1 << 62


class ServingKeywords(TypedDict, total=False):
    """The options as keyword arguments; None means "not given".

    Attributes:
        max_sequences: Most requests that run at once; by default 8, or as many as half of the memory that is left holds
            with `max_context` tokens each.
        kept_sequences: So many more sequences keep their rows of the KV cache after they have ended, for prompts that
            begin as they do; by default 4, or as many as fit, and 0 without `prefix_cache`.
        prefix_cache: Take rows over from other sequences at all; True by default.
        vision_cache_bytes: Most bytes of images' embeddings that are kept for prompts with the same image; by default
            256 MiB, or a sixteenth of the memory that is left.
        max_queue: Most requests that wait; more are refused. 256 by default.
        max_queue_tokens: Most tokens of their prompts together; 16 times `max_context` by default.
        max_delay_ms: While other sequences run, a prompt runs in chunks that take about this long; 200 by default.
        kv_budget: After a longer prompt, keep so many of its rows in each head, those that its last tokens attend to
            most: faster tokens, less memory, approximate answers (docs/kv_cache.md). By default, all are kept.
    """

    max_sequences: int | None
    kept_sequences: int | None
    prefix_cache: bool | None
    vision_cache_bytes: int | None
    max_queue: int | None
    max_queue_tokens: int | None
    max_delay_ms: float | None
    kv_budget: int | None


@dataclass(frozen=True)
class ServingOptions:
    """The checked values of `ServingKeywords`; None leaves a number to `runtime.scheduling.plan`."""

    max_sequences: int | None = None
    kept_sequences: int | None = None
    prefix_cache: bool = True
    vision_cache_bytes: int | None = None
    max_queue: int = 256
    max_queue_tokens: int | None = None
    max_delay_ms: float = 200.0
    kv_budget: int | None = None

    @classmethod
    def checked(cls, **given: Any) -> ServingOptions:
        """Check what a caller gave; None stands for the default.

        Raises:
            UsageError: An option is of the wrong type or out of range, or there is none of that name.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(name for name in given if name not in known)
        if unknown:
            close = difflib.get_close_matches(unknown[0][:80], known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"unknown option {shown(unknown[0])}", remedy=f"{hint}the options are {', '.join(known)}")
        values = {name: value for name, value in given.items() if value is not None}
        for name, minimum in (
            ("max_sequences", 1),
            ("kept_sequences", 0),
            ("vision_cache_bytes", 0),
            ("max_queue", 1),
            ("max_queue_tokens", 1),
            ("kv_budget", 1),
        ):
            if name in values:
                remedy = f"leave {name} out for the default"
                values[name] = whole_number(name, values[name], minimum, _LARGEST, f"{minimum} to 2^62", remedy)
        if "prefix_cache" in values:
            values["prefix_cache"] = true_or_false("prefix_cache", values["prefix_cache"])
        if values.get("kept_sequences") and not values.get("prefix_cache", True):
            raise UsageError(
                f"kept_sequences = {values['kept_sequences']}: without the prefix cache, nothing uses what they keep",
                remedy="leave kept_sequences out, or the option that switches the prefix cache off",
            )
        if "max_delay_ms" in values:
            remedy = "leave max_delay_ms out for 200 ms"
            with reading("max_delay_ms", remedy):  # a fraction may be too large for a float
                values["max_delay_ms"] = between(1, 1e6, remedy)("max_delay_ms", values["max_delay_ms"])
        return cls(**values)
