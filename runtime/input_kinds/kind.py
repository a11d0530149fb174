"""What a kind of input says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import OnImages, ProcessedImage
from runtime.still_wanted import Check, always

if TYPE_CHECKING:
    from runtime.video.config import VideoProcessorConfig
    from runtime.video.processor import ProcessedVideo

    Processed: TypeAlias = ProcessedImage | ProcessedVideo


@dataclass(frozen=True)
class InputSettings:
    """How inputs are read.

    Attributes:
        image: How images are resized and cut.
        video: How frames are chosen, resized and cut.
        max_image_pixels: Images and frames that have more pixels are refused before they are decoded.
        max_tokens: Most visual tokens of one input, whatever its own limits say; None for no such bound.
        context: Tokens of a whole prompt: an input that has more is refused before it is read to its end.
        check: Asked between two steps of reading; raises where the prompt is not wanted any more.
        visual_token_share: Of the visual tokens of each input, how many stay in the prompt.
    """

    image: ImageProcessorConfig
    video: VideoProcessorConfig
    max_image_pixels: int
    max_tokens: int | None = None
    context: int | None = None
    check: Check = always
    visual_token_share: float = 1.0


@dataclass(frozen=True)
class Insertion:
    """One segment in the prompt: text, the segment's visual tokens, text."""

    before: str
    image: ProcessedImage
    after: str


class InputKind(ABC):
    """One kind of input: how messages hold it, what a template writes for it, and what an engine gets.

    Attributes:
        name: In messages to users, such as `image`.
        token: What a template writes in its place. A model whose tokenizer has no id for it takes no such parts.
        part_types: Values of `type` of its message parts.
        placeholder: The part that a template sees instead, without the data.
        path_keys: Keys of a part that may hold a path.
        markers: What a template writes around the token and the first releases of transformers took away with it.
    """

    name: ClassVar[str]
    token: ClassVar[str]
    part_types: ClassVar[tuple[str, ...]]
    placeholder: ClassVar[Mapping[str, Any]]
    path_keys: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, str] | None] = None

    @abstractmethod
    def source(self, part: Mapping[Any, Any], place: str) -> Any:
        """Check a message part, null fields left out, and return what `process` reads.

        Args:
            part: Its `type` is one of `part_types`.
            place: Where it stands, for messages: `messages[2].content[1]`.

        Raises:
            UsageError: A key is unknown or missing, or a value is of the wrong type.
        """

    def content(self, source: Any) -> object:
        """Return what the caller gave, by which two parts are known to hold the same object."""
        return source

    def sharing(self, source: Any, first: Any) -> Any:
        """Return a source that reads its object through the first one of that object, where reading uses it up."""
        return source

    def part(self, processed: Any) -> dict[str, Any]:
        """Return a message part that holds what `process` returned; it may be given again."""
        return {"type": self.part_types[0], self.name: processed}

    @abstractmethod
    def process(self, source: Any, settings: InputSettings, on_images: OnImages | None = None) -> Processed:
        """Read a source and cut it into patches; what was processed before is returned as it is.

        Args:
            source: What the method `source` returned.
            settings: How it is read.
            on_images: Given segments as soon as they are there, if that is before the end.

        Raises:
            ImageError: It cannot be read.
            CapacityError: It is too large.
            Exception: What `settings.check` raises.
        """

    @abstractmethod
    def expansion(self, processed: Any) -> tuple[Insertion, ...]:
        """Return what stands in the prompt in place of the token, segment by segment.

        Args:
            processed: What `process` returned.
        """
