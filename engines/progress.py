"""The stages of an export, and what is told of them."""

from __future__ import annotations

from enum import Enum, auto


class Stage(Enum):
    """What an export does, in the order in which it does it."""

    CHOOSING = auto()
    TRACING = auto()
    STITCHING = auto()
    CALIBRATING = auto()
    LOWERING = auto()
    WRITING = auto()
    COMPILING = auto()
    QUANTISING_CACHE = auto()


class Progress:
    """What an export tells of its work; this one shows nothing."""

    def report(self, stage: Stage, text: str) -> None:
        """Take one line on a stage that begins; of `CHOOSING`, what was chosen."""

    def advance(self, num_bytes: int, total_bytes: int) -> None:
        """Take the bytes of weights that were written since the last call, and those of all that will be."""

    def count(self, done: int, total: int, unit: str) -> None:
        """Take how many things of how many are done in this stage, and what they are."""


SILENT = Progress()
