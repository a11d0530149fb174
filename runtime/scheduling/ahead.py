"""What the vision tower was given before the prompt that it is for was complete."""

from __future__ import annotations

from concurrent.futures import Future

from runtime.visual_pruning.scored import Encoded


class Ahead:
    """Segments of one prompt that is being prepared; the block around that says whether it came to an end.

    Attributes:
        embeds: Their embeddings by digest, [1+D, V, hidden].
        is_refused: The prompt was not submitted, so nobody wants them any more.
    """

    def __init__(self) -> None:
        self.embeds: dict[bytes, Future[Encoded]] = {}
        self.is_refused = False

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.is_refused = error is not None
