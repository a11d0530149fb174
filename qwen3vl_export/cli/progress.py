"""Progress on stderr: a bar on a terminal, a line for each stage elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.progress import SILENT, Progress, Stage
from qwen3vl_export.cli.output import is_terminal, note


class LineProgress(Progress):
    """Print each stage on a line of its own."""

    def report(self, stage: Stage, text: str) -> None:
        """Print it."""
        note(text)


class BarProgress(Progress):
    """Draw the present stage, the time that it takes, and a bar for bytes; gone when the work is done.

    Args:
        has_notes: Print what was chosen, which stays.
    """

    def __init__(self, *, has_notes: bool) -> None:
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
        self._has_notes = has_notes

    def report(self, stage: Stage, text: str) -> None:
        """Draw it in place of the last one."""
        if stage is not Stage.CHOOSING:
            self.bars.start()  # not before the notes, which it would fold
            self.bars.remove_task(self._task)
            self._task = self.bars.add_task(text, total=None, size="")
        elif self._has_notes:
            note(text)

    def advance(self, num_bytes: int, total_bytes: int) -> None:
        """Move the bar."""
        self.bars.update(self._task, advance=num_bytes, total=total_bytes, size=f"of {total_bytes / 1e6:,.1f} MB")

    def count(self, done: int, total: int, unit: str) -> None:
        """Move the bar."""
        self.bars.update(self._task, completed=done, total=total, size=f"{done} of {total} {unit}")


@contextmanager
def progress(*, is_quiet: bool = False, is_json: bool = False) -> Iterator[Progress]:
    """Return what shows the progress of the work in this context; beside JSON, none but a bar on a terminal."""
    if not is_quiet and is_terminal(sys.stderr):
        shown = BarProgress(has_notes=not is_json)
        try:
            yield shown
        finally:
            shown.bars.stop()
    else:
        yield SILENT if is_quiet or is_json else LineProgress()


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """Return what draws a bar on a terminal: given how much is done, of how much (None: unknown), and a word on it."""
    if not is_terminal(sys.stderr):
        yield lambda done, total, word: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[word]}", markup=False),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text, total=None, word="")
        yield lambda done, total, word: bars.update(task, completed=done, total=total, word=word)
