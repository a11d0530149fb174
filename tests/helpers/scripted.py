"""A model that writes what a test tells it, with a tokenizer and a template that know thoughts and calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from helpers.answers import END, TOKENIZER
from helpers.serving import WrappedSession
from runtime.chat import ChatTemplate
from runtime.contract import DecoderInputs, FloatArray
from runtime.model import Qwen3VLModel
from runtime.scheduling.plan import plan_limits
from runtime.serving_options import ServingOptions
from runtime.session import Session

_LIKELIEST = 1e4
_MAX_CONTEXT = 1024


class ScriptedSession(WrappedSession):
    """Makes the next token of a script the likeliest, whatever was written; after the script, the engine's own is.

    The first token of the script follows the prompt that was run last, so that sequences beside each other have prompts
    of one length.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.script: list[int] = []
        self._last_row = 0  # of the prompt

    def prefill(self, inputs: DecoderInputs, cache: Any, slot: int = 0) -> FloatArray:
        self._last_row = int(inputs.past_lengths[0] + inputs.logits_positions[0, -1])
        return self._scripted(inputs, self.wrapped.prefill(inputs, cache, slot))

    def decode(self, inputs: DecoderInputs, cache: Any, slot: int = 0) -> FloatArray:
        return self._scripted(inputs, self.wrapped.decode(inputs, cache, slot))

    def _scripted(self, inputs: DecoderInputs, logits_BLV: FloatArray) -> FloatArray:
        logits_BLV = logits_BLV.copy()
        places_BL = inputs.past_lengths[:, None] + inputs.logits_positions - self._last_row
        for logits_LV, places_L in zip(logits_BLV, places_BL, strict=True):
            for logits_V, place in zip(logits_LV, places_L, strict=True):
                if 0 <= place < len(self.script):
                    logits_V[self.script[place]] = _LIKELIEST
        return logits_BLV


class Scripted:
    """A model on such a session.

    Args:
        opened: The engine; its vocabulary has room for the tokenizer's.
        template: The chat template.
        **serving: How many requests it takes.
    """

    def __init__(self, opened: Qwen3VLModel, template: str, **serving: Any) -> None:
        assert opened.config.text.vocab_size >= TOKENIZER.num_tokens
        self.session = ScriptedSession(opened.session)
        defaults = opened.defaults.replace(eos_token_ids=[END], max_new_tokens=400)
        preparation = dataclasses.replace(
            opened.preparation, tokenizer=TOKENIZER, template=ChatTemplate(template), defaults=defaults
        )
        options = ServingOptions(**({"max_sequences": 2, "kept_sequences": 2} | serving))
        limits = plan_limits(opened.manifest, options, _MAX_CONTEXT, None)
        self.model = Qwen3VLModel(opened.manifest, self.session, preparation, _MAX_CONTEXT, 1 << 40, limits=limits)

    def write(self, text: str | Sequence[int], *, ends: bool = True) -> list[int]:
        """Let the next answer be a text, or tokens, and return its tokens."""
        ids = TOKENIZER.encode(text) if isinstance(text, str) else [*text]
        self.session.script = [*ids, END] if ends else ids
        return self.session.script
