"""`qwen3vl chat`: turns of one conversation, read line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from qwen3vl_export.cli.errors import spell_options
from qwen3vl_export.cli.output import note, print_stats, print_stream
from runtime.errors import Qwen3VLError, UsageError

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel


class Conversation:
    """A chat in progress: the turns so far and the images that wait for the next one.

    Raises:
        ImageError, UsageError: One of the first images cannot be shown.
    """

    def __init__(
        self, model: Qwen3VLModel, options: dict[str, Any], images: list[str], *, system: str | None, has_stats: bool
    ) -> None:
        from runtime.messages import system_message  # loads numpy, as the kinds of input do

        self._model = model
        self._options = options
        self._has_stats = has_stats
        self._system = system_message(system)
        self._turns: list[dict[str, Any]] = []
        self._images: list[str] = []
        for path in images:
            self._attach(path)

    def loop(self) -> None:
        """Read and answer until /quit or the end of the input."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401 (gives input() editing and history)

            note("/image PATH, /reset, /quit")
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self._take(line)
            except Qwen3VLError as error:
                note(spell_options(f"error: {error}"))

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/image":
            self._attach(argument.strip())
        elif line == "/reset":
            self._turns, self._images = [], []
            note("conversation forgotten")
        elif command.startswith("/") and command[1:].isalpha():
            raise UsageError(f"unknown command {command}", remedy="the commands are /image PATH, /reset, /quit")
        elif line:
            self._answer(line)

    def _attach(self, path: str) -> None:
        from runtime.images import load_image

        if not path:
            raise UsageError("/image needs a path", remedy="/image picture.png")
        # What is wrong with it is said now: an image that is attached stays until a turn succeeds.
        height, width = load_image(path, max_image_pixels=self._model.max_image_pixels).shape[:2]
        self._model.image_config.target_size(height, width)
        self._images.append(path)
        note(f"{path}: {width} x {height} pixels, shown with the next turn")

    def _answer(self, prompt: str) -> None:
        """Generate one turn; a turn that fails or is stopped leaves no trace, and its images stay attached."""
        from runtime.messages import user_message

        turns = [*self._turns, *user_message(prompt, self._images)]
        try:
            generation = print_stream(self._model, [*self._system, *turns], self._options)
        except KeyboardInterrupt:
            note("stopped; this turn is dropped")
            return
        self._turns = [*turns, {"role": "assistant", "content": generation.text}]
        self._images = []
        if self._has_stats:
            print_stats(generation.stats)
