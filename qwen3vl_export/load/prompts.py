"""Prompts of a load: each with words and pixels of its own, so that no cache helps unless it is asked to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

_WORDS = ("red", "green", "blue", "left", "right", "above", "below", "one", "two", "three", "round", "small")
_SAMPLE = 256


@dataclass(frozen=True)
class Prompts:
    """What clients ask.

    Attributes:
        num_words: Words of the text.
        image_size: Width and height of the image in pixels, which holds random ones; None for no image.
        shared_words: Words of a system message that all prompts begin with; 0 for none.
        seed: Another seed makes other prompts.
    """

    num_words: int
    image_size: tuple[int, int] | None = None
    shared_words: int = 0
    seed: int = 0

    @classmethod
    def of_tokens(
        cls,
        tokenizer: Tokenizer,
        num_tokens: int,
        image_size: tuple[int, int] | None = None,
        *,
        shared_tokens: int = 0,
        seed: int = 0,
    ) -> Prompts:
        """Return prompts whose texts have about so many tokens.

        Args:
            tokenizer: That of the engine.
            num_tokens: Tokens of the text that each prompt has of its own.
            image_size: As the attribute.
            shared_tokens: Tokens of the system message.
            seed: As the attribute.
        """
        per_word = len(tokenizer.encode(_text(_SAMPLE, seed))) / _SAMPLE
        return cls.of_length(per_word, num_tokens, image_size, shared_tokens=shared_tokens, seed=seed)

    @classmethod
    def of_length(
        cls,
        tokens_per_word: float,
        num_tokens: int,
        image_size: tuple[int, int] | None = None,
        *,
        shared_tokens: int = 0,
        seed: int = 0,
    ) -> Prompts:
        """Return the same, where it is known how many tokens a word has."""
        shared_words = max(1, round(shared_tokens / tokens_per_word)) if shared_tokens else 0
        return cls(max(1, round(num_tokens / tokens_per_word)), image_size, shared_words, seed)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """Return the prompt with this number, at least 0, the same on every call."""
        import numpy as np

        content: list[dict[str, Any]] = []
        if self.image_size is not None:
            width, height = self.image_size
            pixels = np.random.default_rng([self.seed, index]).integers(0, 256, (height, width, 3), np.uint8)
            content.append({"type": "image", "image": pixels})
        content.append({"type": "text", "text": _text(self.num_words, self.seed, index)})
        messages = [{"role": "user", "content": content}]
        if self.shared_words:
            messages.insert(0, {"role": "system", "content": _text(self.shared_words, self.seed)})
        return messages


def _text(num_words: int, *seed: int) -> str:
    import numpy as np

    rng = np.random.default_rng(seed)
    # A number first: of few words, two prompts might begin with the same ones.
    chosen = rng.integers(0, len(_WORDS), num_words - 1)
    return " ".join([str(rng.integers(10**5, 10**6)), *(_WORDS[index] for index in chosen)])
