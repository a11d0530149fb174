"""What a sliding window with sinks gives, by an explicit mask: our own model in PyTorch on a whole sequence at once.

No key is moved here. Where the sinks have moved, the sequence holds a copy of them at their new positions, which sees
itself alone, and queries see that copy: a sink's hidden state depends on sinks alone, and positions are relative.

Shapes: S tokens, C tokens and copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.contract import FloatArray, IntArray
from runtime.positions import PromptPositions, VisualSpan


@dataclass(frozen=True)
class Epoch:
    """From `start` on, tokens see the sinks and what follows from `kept` on."""

    start: int
    kept: int


def epochs(
    num_tokens: int, window: int, num_sinks: int, block: int, spans: Sequence[VisualSpan] = (), *, begins_at: int = 0
) -> list[Epoch]:
    """Return what tokens see, by counting rows one by one; `begins_at` is where a prompt begins behind its sinks."""
    found, kept = [Epoch(0, num_sinks)], num_sinks
    token = num_sinks
    if begins_at:
        token = kept = begins_at
        found.append(Epoch(token, kept))
    while token < num_tokens:
        token += 1
        if num_sinks + token - kept == window:
            kept += block
            for span in spans:
                if span.start < kept < span.end:
                    kept = span.end if span.end <= token else span.start
            found.append(Epoch(token, kept))
    return found


def sliding_logits(
    model: Any,
    ids: Sequence[int],
    positions: PromptPositions,
    embeds: FloatArray,
    num_sinks: int,
    schedule: Sequence[Epoch],
    asked: Sequence[int],
) -> FloatArray:
    """Return the logits after some tokens, float32 [asked, vocab].

    Args:
        model: `Qwen3VL`.
        ids: Tokens of prompt and answer.
        positions: Those of the prompt.
        embeds: Visual embeddings of the prompt, [1+D, V, hidden].
        num_sinks: Sinks.
        schedule: What tokens see.
        asked: The tokens.
    """
    import torch

    from qwen3vl_export.modeling import language_head

    num_tokens = len(ids)
    prompt = positions.position_ids.shape[2]
    position_3S = np.empty((3, num_tokens), np.int64)
    position_3S[:, :prompt] = positions.position_ids[:, 0]
    position_3S[:, prompt:] = np.arange(prompt, num_tokens) + positions.delta
    rows_S = np.full(num_tokens, -1, np.int64)
    rows_S[:prompt] = positions.visual_rows[0]
    ids_S = np.array(ids, np.int64)
    # The tokens in their order, then a copy of the sinks for each time that they have moved.
    sources: list[IntArray] = [np.arange(num_tokens)]
    moves = [np.zeros(num_tokens, np.int64)]
    for epoch in schedule[1:]:
        sources.append(np.arange(num_sinks))
        first = position_3S[0, epoch.kept] if epoch.kept < num_tokens else num_tokens + positions.delta
        moves.append(np.full(num_sinks, first - position_3S[0, num_sinks]))
    source_C, move_C = np.concatenate(sources), np.concatenate(moves)
    visible_CC = np.zeros((len(source_C), len(source_C)), bool)
    for number, epoch in enumerate(schedule):
        stop = schedule[number + 1].start if number + 1 < len(schedule) else num_tokens
        copy = num_tokens + (number - 1) * num_sinks
        for token in range(epoch.start, stop):
            visible_CC[token, epoch.kept : token + 1] = True
            if number:
                visible_CC[token, copy : copy + num_sinks] = True
            else:
                visible_CC[token, : min(num_sinks, token + 1)] = True
        for sink in range(num_sinks if number else 0):
            visible_CC[copy + sink, copy : copy + sink + 1] = True
    visible_CC[np.arange(len(source_C)), np.arange(len(source_C))] = True  # tokens that are not run: no empty rows
    with torch.no_grad():
        hidden, _ = model.language_model(
            torch.from_numpy(ids_S[source_C])[None],
            torch.from_numpy(position_3S[:, source_C] + move_C)[:, None],
            torch.from_numpy(rows_S[source_C])[None],
            torch.from_numpy(np.ascontiguousarray(embeds)),
            visible=torch.from_numpy(visible_CC),
        )
        logits = language_head(model.language_model.norm, model.lm_head, hidden, torch.tensor([list(asked)]))
    return logits[0].float().numpy()
