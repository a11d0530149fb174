"""What a generation option takes: checks of kinds of values, which return the value in its plain form.

A check takes the option's name, for messages, and the value, and raises `UsageError`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import UsageError
from runtime.shown import shown
from runtime.stopping import check_stops

Check = Callable[[str, Any], Any]

_MOST_IDS, _MOST_STOPS, _MOST_BIASES = 1024, 1024, 1024
_LARGEST_BIAS = 100.0  # OpenAI's: beyond all differences of logits that models give


def any_number(name: str, value: Any) -> float:
    """Return any number; infinite for an integer beyond 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, got {shown(value)}")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(number, int) and number.bit_length() > 63:
        return math.inf if number > 0 else -math.inf
    return number


def true_or_false(name: str, value: Any) -> bool:
    """Return a truth value as it is."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {shown(value)}")
    return value


def integer(minimum: int, *, bits: int = 63, most: int | None = None, remedy: str | None = None) -> Check:
    """Make the check of an integer from `minimum` up to `most`, and below 2^bits."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UsageError(f"{name} must be an integer, got {shown(value)}")
        number = int(value)
        if number < minimum or number >= 1 << bits:
            limit = f"at least {minimum}" if number < minimum else f"below 2^{bits}"
            raise UsageError(f"{name} must be {limit}, got {shown(number)}")
        if most is not None and number > most:
            raise UsageError(f"{name} must be at most {most}, got {number}", remedy=remedy)
        return number

    return check


def zero_or_more_than_one(name: str, value: Any) -> int:
    """Return a number of times that something happens again: 0, or 2 and more."""
    number: int = integer(0)(name, value)
    if number == 1:
        raise UsageError(f"{name} must be 0 or at least 2, got 1", remedy=f"{name}=0 switches it off")
    return number


def optional(check: Check) -> Check:
    """Let a check take None, too."""
    return lambda name, value: None if value is None else check(name, value)


def between(low: float, high: float, remedy: str) -> Check:
    """Make the check of a finite number from `low` to `high`; `{name}` in the remedy is the option's."""

    def check(name: str, value: Any) -> float:
        number = float(any_number(name, value))
        if not (math.isfinite(number) and low <= number <= high):
            advice = remedy.format(name=name)
            raise UsageError(f"{name} must be in [{low:g}, {high:g}], got {shown(value)}", remedy=advice)
        return number

    return check


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """Return one string or several as a tuple."""
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or len(stops) > _MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"{name} must be a string or a list of at most {_MOST_STOPS} strings, got {shown(value)}")
    check_stops(stops)
    return tuple(stops)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return one token id or several as a tuple."""
    ids = (value,) if isinstance(value, numbers.Integral) else value
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise UsageError(f"{name} must be a token id or a list of token ids, got {shown(value)}")
    if len(ids) > _MOST_IDS:
        raise UsageError(f"{name} must hold at most {_MOST_IDS} token ids, got {shown(value)}")
    check = integer(0)
    return tuple(check(f"{name}[{i}]", token_id) for i, token_id in enumerate(ids))


def logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Return biases by token id, as pairs in the order of the ids; an id may be spelled as text, as JSON has to."""
    if not isinstance(value, (Mapping, tuple)):
        raise UsageError(f"{name} must be a dict from token ids to biases, got {shown(value)}")
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value)
    if len(pairs) > _MOST_BIASES:
        raise UsageError(f"{name} must hold at most {_MOST_BIASES} token ids, got {len(pairs)}")
    check_id, advice = integer(0), "token ids are whole numbers; model.tokenizer.encode(text) gives those of a text"
    check_bias = between(-_LARGEST_BIAS, _LARGEST_BIAS, "-100 bans a token, 100 makes it the only choice")
    found: dict[int, float] = {}
    for key, bias in pairs:
        if isinstance(key, str) and not (key.isascii() and key.isdecimal() and len(key) < 19):
            raise UsageError(f"{name} has the key {shown(key)}, expected a token id", remedy=advice)
        token_id = check_id(f"{name}'s key", int(key) if isinstance(key, str) else key)
        if token_id in found:
            raise UsageError(f"{name} names the token {token_id} twice", remedy="give it one bias")
        found[token_id] = check_bias(f"{name}[{token_id}]", bias)
    return tuple(sorted(found.items()))
