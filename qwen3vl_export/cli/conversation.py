"""`qwen3vl chat`: turns of one conversation, read line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qwen3vl_export.cli.errors import spell_options
from qwen3vl_export.cli.output import cached_text, note, print_stats, print_stream
from runtime.errors import Qwen3VLError, UsageError

if TYPE_CHECKING:
    from runtime.conversation import Conversation
    from runtime.model import Qwen3VLModel


_MOST_DIGITS = 9
COMMANDS = "/image PATH, /video PATH, /rewind [N], /reset, /quit"


class LineChat:
    """A conversation that is typed line by line, and the images and videos that wait for its next turn.

    Args:
        chat: The conversation.
        model: Says which images it takes.
        images: Shown with the first turn.
        videos: Shown with the first turn.
        has_stats: Print the statistics of each answer.
        is_quiet: Print no notes, only errors.
        hides_thinking: Print no thoughts.

    Raises:
        ImageError, UsageError: One of the first images cannot be shown.
    """

    def __init__(
        self,
        chat: Conversation,
        model: Qwen3VLModel,
        images: list[str],
        videos: list[str],
        *,
        has_stats: bool,
        is_quiet: bool,
        hides_thinking: bool = False,
    ) -> None:
        self._chat = chat
        self._model = model
        self._has_stats = has_stats
        self._is_quiet = is_quiet
        self._hides_thinking = hides_thinking
        self._images: list[str] = []
        self._videos: list[str] = []
        for path in images:
            self._attach(path)
        for path in videos:
            self._attach_video(path)

    def loop(self) -> None:
        """Read and answer until /quit or the end of the input."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401 (gives input() editing and history)

            self._say(COMMANDS)
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
        elif command == "/video":
            self._attach_video(argument.strip())
        elif command == "/rewind":
            self._rewind(argument.strip())
        elif line == "/reset":
            self._chat.reset()
            self._images, self._videos = [], []
            self._say("conversation forgotten")
        elif command.startswith("/") and command[1:].isalpha():
            raise UsageError(f"unknown command {command}", remedy=f"the commands are {COMMANDS}")
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
        self._say(f"{path}: {width} x {height} pixels, shown with the next turn")

    def _attach_video(self, path: str) -> None:
        from runtime.video.opening import open_video

        if not path:
            raise UsageError("/video needs a path", remedy="/video clip.mp4")
        reader = open_video(path, self._model.max_image_pixels)
        reader.close()
        self._videos.append(path)
        rate = "" if reader.fps is None else f", {reader.fps:.4g} a second"
        self._say(f"{path}: {reader.num_frames} frames{rate}, shown with the next turn")

    def _rewind(self, argument: str) -> None:
        """Drop the last turns; their images too, those that wait for the next one stay."""
        num_turns = len(self._chat.turns)
        digits = argument or "1"
        number = int(digits) if digits.isdecimal() and len(digits) <= _MOST_DIGITS else 0
        if not 1 <= number <= num_turns:
            raise UsageError(
                f"/rewind {digits}: expected a number of turns to drop, there are {num_turns}",
                remedy="/rewind drops the last one, /rewind 2 the last two",
            )
        self._chat.rewind(num_turns - number)
        self._say(f"{number} of {num_turns} turns dropped")

    def _answer(self, prompt: str) -> None:
        """Generate one turn; a turn that fails or is stopped leaves no trace, and its images stay attached."""
        try:
            stream = self._chat.stream(prompt, images=self._images, videos=self._videos)
            generation = print_stream(stream, hides_thinking=self._hides_thinking)
        except KeyboardInterrupt:
            self._say("stopped; this turn is dropped")
            return
        self._images, self._videos = [], []
        cached = cached_text(generation.stats)
        if self._has_stats:
            print_stats(generation.stats)
        elif cached:
            self._say(f"note: found in the cache: {cached}")

    def _say(self, text: str) -> None:
        if not self._is_quiet:
            note(text)
