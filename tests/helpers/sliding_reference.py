"""What a sliding window with sinks gives, by an explicit mask: our own model in PyTorch on a whole sequence at once.

No key is moved here. Where the sinks have moved, the sequence holds a copy of them at their new positions, which sees
itself alone, and queries see that copy: a sink's hidden state depends on sinks alone, and positions are relative.

Shapes: S tokens, C tokens and copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helpers.serving import asked, serving, watched_logits
from qwen3vl_export.parity.metrics import difference
from runtime.contract import FloatArray, IntArray
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.positions import PromptPositions, VisualSpan
from runtime.preparation import Prepared
from runtime.sliding_window import MAX_TOKENS, SlidingWindow

WINDOW = SlidingWindow(96, 4)
NUM_TOKENS = 100
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), np.uint8)


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


def windowed(opened: Qwen3VLModel, window: SlidingWindow = WINDOW, **limits: Any) -> Qwen3VLModel:
    """A model on an opened one's session, with a window."""
    rows, tokens = window.tokens, MAX_TOKENS
    return serving(
        opened, max_context=tokens, max_rows=rows, **{"window": window, "max_queue_tokens": tokens, **limits}
    )


@dataclass(frozen=True)
class Answered:
    """A prompt, the tokens of its answer, and the logits that each was chosen from."""

    prepared: Prepared
    token_ids: list[int]
    logits: list[FloatArray]

    @property
    def ids(self) -> list[int]:
        return [*self.prepared.prompt.input_ids, *self.token_ids]


def answered(model: Qwen3VLModel, prompt: Any, num_tokens: int = NUM_TOKENS, **options: Any) -> Answered:
    """Answer greedily with so many tokens, whatever they are."""
    with watched_logits() as found:
        answer = model.generate(prompt, long_answer(model, num_tokens, **options))
    ((request, logits),) = found.items()
    assert len(answer.token_ids) == num_tokens
    return Answered(request.prepared, answer.token_ids, logits)


def long_answer(model: Qwen3VLModel, num_tokens: int, **options: Any) -> Any:
    never = (model.config.text.vocab_size - 1,)
    return model.defaults.replace(max_new_tokens=num_tokens, do_sample=False, eos_token_ids=never, **options)


def distance(
    torch_model: Any,
    model: Qwen3VLModel,
    found: Answered,
    window: SlidingWindow = WINDOW,
    *,
    is_continued: bool = False,
) -> float:
    """Return the difference of logits from those with an explicit mask, over their spread.

    Args:
        torch_model: `Qwen3VL`.
        model: What has answered.
        found: The answer.
        window: That of the model.
        is_continued: The rows of earlier turns were there, however long the prompt is.
    """
    prompt = found.prepared.prompt
    num_prompt, spans = len(prompt.input_ids), prompt.spans
    num_sinks = min([window.sink_tokens, *(span.start for span in spans)])
    is_late = num_prompt > 5 * window.tokens and not is_continued
    begins_at = num_prompt - 4 * window.tokens if is_late else 0
    block = (window.tokens - window.sink_tokens) // 8
    schedule = epochs(len(found.ids), window.tokens, num_sinks, block, spans, begins_at=begins_at)
    shown = {image.digest: image for image in model.prepare(asked("", *PIXELS)).images}
    embeds = model.encode_images([shown[image.digest] for image in found.prepared.images])
    places = range(num_prompt - 1, len(found.ids) - 1)
    expected = sliding_logits(torch_model, found.ids, found.prepared.positions, embeds, num_sinks, schedule, places)
    return difference(np.array(found.logits), expected).scaled


def with_positions(manifest: Manifest, max_positions: int) -> Manifest:
    """Return a manifest whose model was trained for so many positions."""
    text = replace(manifest.model.text, max_positions=max_positions)
    return replace(manifest, model=replace(manifest.model, text=text))
