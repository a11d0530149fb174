"""The error tree of the whole project.

Every error that a user can meet derives from `Qwen3VLError`; the command line turns one into a single line and the
exit code of its class. A message says what went wrong, where, what was expected, what was found, and the remedy.
Assertions are for our own bugs.

Messages quote what users, files and libraries say, so the base class makes each fit to be shown, whoever wrote it:
one line, no control characters, and with the remedy no more than `MAX_CHARACTERS`.
"""

from __future__ import annotations

from runtime.shown import one_line, shorten, shown

MAX_CHARACTERS = 500
"""Longest text of an error, message and remedy together; what is longer loses its middle."""

_REMEDY = "\n  remedy: "


class Qwen3VLError(Exception):
    """Report a condition that the user can act on.

    Args:
        message: What went wrong and where, with the expected and the found value.
        remedy: What the user can do about it; printed on its own line.

    Attributes:
        message: The same, shortened and escaped.
        remedy: The same, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        room = MAX_CHARACTERS - len(_REMEDY)
        # They are texts; but an error that raises another would hide what went wrong.
        self.message = one_line(message if isinstance(message, str) else shown(message), MAX_CHARACTERS)
        self.remedy = remedy
        if remedy is not None:
            self.remedy = one_line(remedy if isinstance(remedy, str) else shown(remedy), MAX_CHARACTERS)
        if self.remedy is not None:
            # Each may have half of the room, and what the other leaves.
            self.remedy = shorten(self.remedy, max(room // 2, room - len(self.message)))
            self.message = shorten(self.message, room - len(self.remedy))
        super().__init__(self.message)

    def __str__(self) -> str:
        """Return the message, and the remedy on a line of its own."""
        return self.message if self.remedy is None else f"{self.message}{_REMEDY}{self.remedy}"


class UsageError(Qwen3VLError, ValueError):
    """An argument, option or message is not what the interface takes."""

    exit_code = 2


class CheckpointError(Qwen3VLError):
    """A Hugging Face folder is missing, damaged, or not a Qwen3-VL this project can export."""

    exit_code = 3


class BundleError(Qwen3VLError):
    """A bundle of ONNX graphs violates the graph contract."""

    exit_code = 4


class EngineError(Qwen3VLError):
    """An engine folder is missing, altered, of another version, or for another machine."""

    exit_code = 5


class TargetError(Qwen3VLError):
    """A target is unknown, or cannot be built or run on this machine."""

    exit_code = 6


class ImageError(Qwen3VLError, ValueError):
    """An image cannot be read, or has a size or shape the model does not take."""

    exit_code = 7


class CapacityError(Qwen3VLError):
    """A prompt, an image or a model does not fit the memory, the KV cache or the disk."""

    exit_code = 8


class ParityError(Qwen3VLError):
    """An engine does not agree with PyTorch within the tolerances."""

    exit_code = 9


class OverloadError(Qwen3VLError):
    """Too many requests wait already.

    Args:
        message: What is full.
        remedy: What to do.
        retry_after_s: Seconds until there may be room, by what the engine did last.
    """

    exit_code = 10

    def __init__(self, message: str, *, remedy: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class DeadlineError(Qwen3VLError):
    """The time that a caller gave for an answer was over before it was complete."""

    exit_code = 11


class RequestError(Qwen3VLError):
    """A server did not answer a request as it should."""

    exit_code = 12


class RegressionError(Qwen3VLError):
    """An engine has become slower than it may."""

    exit_code = 13
