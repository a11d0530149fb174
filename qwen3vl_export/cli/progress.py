"""Progress on stderr: a bar on a terminal, a line for each stage elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3vl_export.cli.output import is_terminal, note


class Progress:
    """Say nothing."""

    def stage(self, text: str) -> None:
        """Begin a stage of work."""

    def advance(self, num_bytes: int, total_bytes: int) -> None:
        """Tell of bytes that were written in this stage, and of all that it will write."""


class LineProgress(Progress):
    """Print each stage on a line of its own."""

    def stage(self, text: str) -> None:
        """Print it."""
        note(text)


class BarProgress(Progress):
    """Draw the present stage, the time that it takes, and a bar for bytes; gone when the work is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[size]}", markup=False),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._task = self.bars.add_task("", total=None, visible=False, size="")

    def stage(self, text: str) -> None:
        """Draw it in place of the last one."""
        self.bars.remove_task(self._task)
        self._task = self.bars.add_task(text, total=None, size="")

    def advance(self, num_bytes: int, total_bytes: int) -> None:
        """Move the bar."""
        self.bars.update(self._task, advance=num_bytes, total=total_bytes, size=f"of {total_bytes / 1e6:,.1f} MB")


@contextmanager
def progress(*, is_wanted: bool) -> Iterator[Progress]:
    """Return what shows the progress of the work in this context."""
    if not is_wanted:
        yield Progress()
    elif is_terminal(sys.stderr):
        shown = BarProgress()
        with shown.bars:
            yield shown
    else:
        yield LineProgress()
