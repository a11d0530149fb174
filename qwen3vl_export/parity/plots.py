"""Plots as files: panels side by side, such as of a figure for each layer with one logarithmic axis."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.disk import check_file, replaced_file
from runtime.errors import UsageError
from runtime.installation import how_to_install


def check_plot(file: Path) -> None:
    """Check that a plot can be drawn into a file.

    Raises:
        UsageError: matplotlib is not installed, the suffix is not one it draws, or the folder cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a plot needs the Python package 'matplotlib', which is not installed",
            remedy=how_to_install("plot"),
        )
    if file.suffix not in (".png", ".svg"):
        raise UsageError(f"{file}: a plot is a .png or a .svg file", remedy="give the file one of these suffixes")
    check_file(file)


@contextmanager
def drawn_panels(
    file: Path, titles: Mapping[str, str], y_label: str, *, width: float, salt: str
) -> Iterator[list[Any]]:
    """Give panels to draw into, and write them as the suffix of `file` says (.svg, .png).

    Args:
        file: Where.
        titles: Title of each panel, and what it counts along its x axis.
        y_label: Label of the axis that all share.
        width: In inches.
        salt: Makes the names in an SVG file, so that the same numbers give the same file.

    Raises:
        UsageError: As `check_plot`.
    """
    with drawn_figure(file, len(titles), width=width, salt=salt, shares_y=True) as panels:
        yield panels
        for panel, (title, label) in zip(panels, titles.items(), strict=True):
            panel.set_title(title)
            panel.set_xlabel(label)
            panel.set_yscale("log")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel(y_label)
        panels[-1].legend()


@contextmanager
def drawn_figure(
    file: Path, num_panels: int, *, width: float, salt: str, shares_y: bool = False
) -> Iterator[list[Any]]:
    """Give empty panels to draw into, and write them; the arguments are those of `drawn_panels`.

    Args:
        file: Where.
        num_panels: Panels side by side.
        width: In inches.
        salt: As there.
        shares_y: All panels have one y axis.

    Raises:
        UsageError: As `check_plot`.
    """
    check_plot(file)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        yield list(figure.subplots(1, num_panels, sharey=shares_y))
        with replaced_file(file) as partial:
            # No date, for the same reason.
            figure.savefig(partial, metadata={"Date": None} if file.suffix == ".svg" else {})
