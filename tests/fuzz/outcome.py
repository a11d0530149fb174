"""What became of an input: taken, refused, or a finding."""

from __future__ import annotations

import re
import traceback
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import runtime
from runtime.errors import Qwen3VLError

_CODE = Path(runtime.__file__).resolve().parent.parent

TAKEN, REFUSED = "taken", "refused"
RAW, MESSAGE, SLOW, MEMORY, HANG, CRASH = "raw exception", "message", "slow", "memory", "hang", "crash"

MAX_BYTES = 300_000_000
MAX_MESSAGE = 500
# What a wrong value has to be is remedy enough.
_SAYS_WHAT_IS_WANTED = re.compile(r"\b(must be|expected|at most|at least|is missing|without|known are)\b")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@dataclass(frozen=True)
class Bounds:
    """How long an input may take.

    Attributes:
        max_cpu_s: Of CPU time: the wall clock also shows what else the machine is doing.
        max_wall_s: After which an input hangs: fifteen times its CPU time, for a machine that is busy.
    """

    max_cpu_s: float = 2.0
    max_wall_s: float = 30.0


USUAL = Bounds()
"""Of a long run."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        kind: `TAKEN`, `REFUSED`, or what kind of finding it is.
        place: Of a raw exception its type and the line of ours it came from; of a refusal the class.
        text: The message, or what the family said.
        cpu_s: CPU time, that of child processes included.
        grown_bytes: Peak of resident memory above what was resident before, of this process or of a child.
    """

    kind: str
    place: str = ""
    text: str = ""
    cpu_s: float = 0.0
    grown_bytes: int = 0

    @property
    def is_finding(self) -> bool:
        """Whether it is to be mended."""
        return self.kind not in (TAKEN, REFUSED)

    @property
    def key(self) -> tuple[str, str]:
        """What findings of one cause have in common."""
        return self.kind, self.place

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def of_error(error: BaseException) -> Outcome:
    """Classify what an input raised."""
    if isinstance(error, MemoryError):
        return Outcome(MEMORY, f"MemoryError at {place_of(error)}", "wants more than the process may have")
    if not isinstance(error, Qwen3VLError):
        return Outcome(RAW, f"{type(error).__name__} at {place_of(error)}", ascii(_text(error))[:300])
    fault = fault_of_message(error)
    if fault:
        return Outcome(MESSAGE, f"{fault}: {type(error).__name__} at {place_of(error)}", ascii(str(error))[:700])
    return Outcome(REFUSED, type(error).__name__, str(error))


def fault_of_message(error: Qwen3VLError) -> str:
    """Return what is wrong with the text of an error of ours; empty if nothing is."""
    text = str(error)
    if not (error.remedy or "").strip() and not _SAYS_WHAT_IS_WANTED.search(error.message):
        return "no remedy"
    if len(text) > MAX_MESSAGE:
        return "longer than 500 characters"
    if any(map(_is_control, text.replace("\n  remedy: ", "", 1))):
        return "control characters"
    if "internal error" in text or not error.message.strip():
        return "says nothing"
    return ""


def _is_control(letter: str) -> bool:
    """Whether a letter moves the cursor, ends a line, turns the direction of the text, or cannot be written."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in _TURNS


def place_of(error: BaseException) -> str:
    """Return the innermost line of this project's packages that an error passed."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_CODE) and not Path(frame.filename).is_relative_to(_CODE / "tests")
    ]
    if not own:
        return "a library"
    return f"{Path(own[-1].filename).relative_to(_CODE)}:{own[-1].name}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"(its text raises {type(other).__name__})"
