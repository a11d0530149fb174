"""Keys of messages and of their parts: known, mistyped, or refused because they hold what would be lost."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import UsageError
from runtime.shown import shown

_RESOLUTION = "set it in the part of the image or video, or for all of them as an argument of generate or stream"
REFUSED_PART_KEYS = {
    **dict.fromkeys(("max_pixels", "min_pixels", "resized_height", "resized_width"), _RESOLUTION),
    "file_id": "nothing is fetched: pass the image itself, as a path, bytes or base64",
}
_LEAST_LIKENESS = 0.8  # of a key to a known one, to be called mistyped
_LONGEST_KEY = 40  # that is compared: longer ones are nothing mistyped, and take long


def exact(value: Any) -> str:
    """Return a string, also one of an enumeration, as an exact `str`, to be looked up; empty if it is none."""
    return str.__str__(value) if isinstance(value, str) else ""


def check_keys(found: Mapping[Any, Any], known: Sequence[str], refused: Mapping[str, str], place: str) -> None:
    """Refuse keys that are a known one mistyped, or hold what would be lost; others change no prompt."""
    for key, value in found.items():
        name = exact(key)
        if name in known:
            continue
        if name in refused and not (isinstance(value, (str, list, tuple, dict)) and len(value) == 0):
            raise UsageError(f"{place} has the key {name!r}, which is not taken here", remedy=refused[name])
        close = difflib.get_close_matches(name.lower()[:_LONGEST_KEY], known, n=1, cutoff=_LEAST_LIKENESS)
        if close or not isinstance(key, str):
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"{place} has the unknown key {shown(key)}", remedy=f"{hint}the keys are {', '.join(known)}"
            )
