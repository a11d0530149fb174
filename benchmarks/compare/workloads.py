"""What every side computes, and how many operations and bytes that needs at least.

Lengths and batches are fixed here. Operations are those that the answer needs, the same for all sides: two for each
weight and token, causal attention counted as the half that is visible, logits of the last token only. A side that
computes more (logits of the whole prompt) shows fewer operations a second, as it should.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VISION, PREFILL, DECODE = "vision", "prefill", "decode"
IMAGE_SIZE = (1024, 768)
IMAGE_TOKENS = 768
PROMPT_TOKENS = 20
TOKEN = 65

# (height, width) in patches of 16 pixels: images of 256 × 256, 448 × 448 and 1024 × 768 pixels.
GRIDS = {256: (16, 16), 784: (28, 28), 3072: (48, 64)}
_TEXTS = (
    "Read the digits in the image from the left to the right and answer with the digits alone.",
    "Invoice 2041. Three boxes of paper at 12.50 each, one lamp at 39.90. Total to pay by the end of May: 77.40.",
    "The river had risen in the night, and by the morning the lower road lay under a foot of brown water.",
    "def mean(values):\n    if not values:\n        raise ValueError('empty')\n    return sum(values) / len(values)\n",
)


@dataclass(frozen=True)
class Point:
    """One measured call.

    Attributes:
        phase: `VISION`, `PREFILL` or `DECODE`.
        size: Patches of the image, new tokens of a prompt, or valid rows of the cache.
        batch: Sequences; images are always alone.
    """

    phase: str
    size: int
    batch: int = 1

    @property
    def name(self) -> str:
        """Key in the results, such as `decode-512-b4`."""
        return f"{self.phase}-{self.size}-b{self.batch}"

    @property
    def is_timed_once(self) -> bool:
        """A prompt of 2048 tokens, or of several sequences: up to half a minute a call."""
        return self.phase == PREFILL and (self.size > 512 or self.batch > 1)


# Prompts of four times 512 tokens and more are left out: a minute a call at some peers, and a graph that computes the
# logits of all positions needs 5 GB for those of four times 2048.
POINTS = (
    *(Point(VISION, size) for size in GRIDS),
    *(Point(PREFILL, size) for size in (128, 512, 2048)),
    Point(PREFILL, 128, 4),
    *(Point(DECODE, size, batch) for batch in (1, 4) for size in (0, 512, 4096)),
)


def texts() -> tuple[str, ...]:
    """Return the text prompts on which logits are compared."""
    return _TEXTS


def operations(point: Point, config: Mapping[str, Any]) -> int:
    """Return the operations (a multiplication or an addition each) that the result of a call needs.

    Args:
        point: The call.
        config: Contents of the checkpoint's `config.json`.
    """
    if point.phase == VISION:
        return _vision_operations(point.size, config["vision_config"])
    text = config["text_config"]
    new, past = (point.size, 0) if point.phase == PREFILL else (1, point.size)
    queries = text["num_attention_heads"] * text["head_dim"]
    visible = new * past + new * (new + 1) // 2
    layers = text["num_hidden_layers"] * (new * layer_weights(text) + 2 * visible * queries)
    return 2 * point.batch * (layers + text["hidden_size"] * text["vocab_size"])


def layer_weights(text: Mapping[str, Any]) -> int:
    """Return the weights of the matrices of one decoder layer that a token goes through.

    In a mixture of experts these are the router and the experts chosen; all layers have one, as in Qwen's sizes.
    """
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    widths = 3 * text["intermediate_size"]
    if "num_experts" in text:
        widths = text["num_experts"] + 3 * text["num_experts_per_tok"] * text["moe_intermediate_size"]
    return hidden * (2 * queries + 2 * keys + widths)


def _vision_operations(patches: int, vision: Mapping[str, Any]) -> int:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    pixels = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    block = patches * (4 * hidden * hidden + 2 * hidden * inner) + 2 * patches * patches * hidden
    merged = hidden * vision["spatial_merge_size"] ** 2
    tokens = patches // vision["spatial_merge_size"] ** 2
    merger = tokens * merged * (merged + vision["out_hidden_size"])
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    return 2 * (patches * pixels * hidden + vision["depth"] * block + mergers * merger)
