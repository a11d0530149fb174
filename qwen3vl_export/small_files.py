"""Read the small files of a checkpoint with bounds on their size and on what parsing them can take.

A JSON text of 100 MB may hold millions of objects, which take seconds and gigabytes once parsed. What a file holds is
counted in its bytes first. The most that a real checkpoint has: 30B-A3B in AWQ and one file 56 000 tensors in 7 MB of
header, 235B-A22B in GPTQ 145 000 tensors and an index of 20 MB; Qwen3-VL's tokenizer.json 151 643 pairs in 11 MB.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError
from runtime.shown import shown_name

MAX_JSON_BYTES = 32 << 20
# Parsed, these take at most about 250 MB together.
_MOST = {b"{": 250_000, b"[": 500_000, b",": 3_000_000, b":": 1_500_000}
_COMPLETE = "give a complete Hugging Face folder"
_DAMAGED = "the file is damaged: download it again"


def read_file(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole small file.

    Raises:
        CheckpointError: It is missing, no ordinary file, not readable, or larger than `limit` bytes.
    """
    name = shown_name(str(path))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name}: expected an ordinary file", remedy=_COMPLETE)
        if status.st_size > limit:
            raise CheckpointError(
                f"{name}: {status.st_size} bytes, expected at most {limit}: no checkpoint has a file of this kind so large",
                remedy="take the file from the original checkpoint",
            )
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}: missing", remedy=_COMPLETE) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte or a lone surrogate in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{name}: cannot be read ({reason})", remedy="check the path and its permissions"
        ) from error


def parse_json(raw: bytes, path: Path, *, remedy: str = _DAMAGED) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: The text.
        path: Where it came from, for messages.
        remedy: What to do about a file that is not readable.

    Raises:
        CheckpointError: It is none, or holds more than any checkpoint's.
    """
    name = shown_name(str(path))
    for mark, most in _MOST.items():
        found = raw.count(mark)
        if found > most:
            raise CheckpointError(
                f"{name}: {found} times {mark.decode()!r} in its JSON, expected at most {most}: no checkpoint has so much",
                remedy="take the file from the original checkpoint",
            )
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, thousands of digits or of brackets
        raise CheckpointError(f"{name}: not readable as JSON ({str(error)[:120]})", remedy=remedy) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: expected a JSON object, got {type(values).__name__}", remedy=remedy)
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        CheckpointError: As `read_file` and `parse_json`.
    """
    return parse_json(read_file(path), path)
