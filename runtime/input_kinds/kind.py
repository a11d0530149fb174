"""What a kind of input says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import ProcessedImage


class InputKind(ABC):
    """One kind of input: how messages hold it, what a template writes for it, and what an engine gets.

    Attributes:
        name: In messages to users, such as `image`.
        token: What a template writes in its place. A model whose tokenizer has no id for it takes no such parts.
        part_types: Values of `type` of its message parts.
        placeholder: The part that a template sees instead, without the data.
        path_keys: Keys of a part that may hold a path.
    """

    name: ClassVar[str]
    token: ClassVar[str]
    part_types: ClassVar[tuple[str, ...]]
    placeholder: ClassVar[Mapping[str, Any]]
    path_keys: ClassVar[tuple[str, ...]]

    @abstractmethod
    def source(self, part: Mapping[Any, Any], place: str) -> Any:
        """Check a message part, null fields left out, and return what `process` reads.

        Args:
            part: Its `type` is one of `part_types`.
            place: Where it stands, for messages: `messages[2].content[1]`.

        Raises:
            UsageError: A key is unknown or missing, or a value is of the wrong type.
        """

    def part(self, processed: ProcessedImage) -> dict[str, Any]:
        """Return a message part that holds what `process` returned; a part of images may be given again."""
        return {"type": self.part_types[0], self.name: processed}

    @abstractmethod
    def process(self, source: Any, config: ImageProcessorConfig, *, max_image_pixels: int) -> ProcessedImage:
        """Read a source and cut it into patches.

        Raises:
            ImageError: It cannot be read.
            CapacityError: It is too large.
        """
