"""Options of the pictures that `qwen3vl run` writes beside an answer, checked before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.drawing import PICTURE_SUFFIXES
from runtime.errors import UsageError
from runtime.shown import shown

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel


@dataclass(frozen=True)
class Pictures:
    """Pictures to write beside an answer.

    Attributes:
        draw: Write the last image with the boxes and points of the answer on it to this file.
        show_input: Write images and frames as the model sees them: all in this file, or each in this folder.
    """

    draw: Annotated[Path | None, typer.Option(metavar="FILE.png")] = None
    show_input: Annotated[Path | None, typer.Option(metavar="FILE.png|FOLDER")] = None

    def check(self, images: Sequence[str]) -> None:
        """Raise before any work if they cannot be written.

        Raises:
            UsageError: A name is not one of a picture, or there is no image to draw on.
        """
        if self.draw is not None:
            if not images:
                raise UsageError("--draw draws on an image, and there is none", remedy="add --image PATH")
            check_picture("--draw", self.draw, images)
        if self.show_input is not None and self.show_input.suffix.lower() in PICTURE_SUFFIXES:
            check_picture("--show-input", self.show_input, images)

    def before(self, model: Qwen3VLModel, messages: Any, limits: dict[str, Any], *, is_quiet: bool) -> Any:
        """Show the input, and return the messages to answer: what was read is not read again."""
        if self.show_input is None:
            return messages
        from qwen3vl_export.cli.pictures import write_inputs

        prepared = model.prepare(messages, **limits)
        _note(write_inputs(prepared.inputs, model.preparation.inputs, self.show_input), is_quiet=is_quiet)
        return prepared.messages

    def after(self, model: Qwen3VLModel, answer: str, images: Sequence[str], *, is_quiet: bool) -> None:
        """Draw what the answer found on the last image."""
        if self.draw is not None:
            from qwen3vl_export.cli.pictures import write_shapes

            _note(write_shapes(answer, images[-1], self.draw, model.max_image_pixels), is_quiet=is_quiet)


def check_picture(option: str, path: Path, sources: Sequence[str] = ()) -> None:
    """Raise before any work if a picture cannot be written.

    Args:
        option: In messages.
        path: Where it is to be written.
        sources: Files that it must not replace.

    Raises:
        UsageError: The name has no ending of a picture, its folder does not exist, or it is one of `sources`.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UsageError(
            f"{option} {shown(path)}: expected a name that ends in {', '.join(PICTURE_SUFFIXES)}",
            remedy="write out.png",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{option} {shown(path)}: not a file in a folder that exists", remedy="make the folder first")
    if any(os.path.exists(source) and path.exists() and path.samefile(source) for source in sources):
        raise UsageError(f"{option} {shown(path)}: that is an image of the prompt", remedy="give another name")


def _note(text: str, *, is_quiet: bool) -> None:
    if not is_quiet:
        print(text, file=sys.stderr)
