"""Hold the demo: a small Qwen3-VL that reads handwritten digits, and the held-out canvases that it is asked about."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
"""The shipped Hugging Face folder."""
CHECKPOINT_MOE = Path(__file__).with_name("checkpoint_moe")
"""The one with a mixture of experts."""
CHECKPOINT_LONG = Path(__file__).with_name("checkpoint_long")
"""The one for long prompts: several pictures, pages of digits, conversations."""
IMAGES = Path(__file__).with_name("images")
"""A few held-out pictures, with `truth.json`."""
