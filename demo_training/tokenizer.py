"""Build the demo's tokenizer: Qwen's pipeline with a small vocabulary.

Byte-level byte-pair encoding with Qwen's pre-tokenizer, so any UTF-8 text encodes and decodes; the merges are learned
from the sentences of the tasks alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3vl_export.demo.tasks import PLACES, QUESTIONS, answer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 512

# The split of Qwen2's tokenizer.json: contractions, words with their leading space, single digits, punctuation, spaces.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def task_texts() -> list[str]:
    """Return every question and every kind of answer, and the words of the chat format, as the merges' corpus."""
    texts = ["user", "assistant", "system", "\n", "Picture 1: ", "Video 1: ", "You are a helpful assistant."]
    for phrasings in QUESTIONS.values():
        texts += [p.format(digit=d) for p in phrasings for d in range(10)]
    texts += [" " + p for p in PLACES] + list(PLACES)
    for count in range(1, 5):
        texts += [answer("json", [(start + i) % 10 for i in range(count)], 0) for start in range(10)]
    return texts * 4


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer: 256 bytes, merges, and the special tokens at the end of `VOCAB_SIZE` ids or fewer."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Adds no token; transformers would put it there.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(task_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer
