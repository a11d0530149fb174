"""Run our definition on what transformers' processor returns: images, videos, and batches with padding on the right."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.positions import PromptPositions, VisualSpan, mrope_positions
from runtime.vision_inputs import position_tables

if TYPE_CHECKING:
    from torch import Tensor


def visual_levels(model: Any, pixel_values: Tensor, grid_thw: Tensor, *, grad: bool = False) -> list[Tensor]:
    """Return the embeddings of every segment, [1+levels, V, D]; a temporal patch of a video is a segment."""
    import torch

    vision, like, start, segments = model.config.vision, model.lm_head.weight, 0, []
    for t, h, w in grid_thw.tolist():
        tables = position_tables(h, w, vision)
        patches = pixel_values[start : start + t * h * w].reshape(t, h * w, -1).to(like.dtype)
        start += t * h * w
        with torch.set_grad_enabled(grad):
            levels = model.visual(patches, *map(torch.from_numpy, tables))
        segments += levels.chunk(t, dim=1)
    assert start == len(pixel_values)
    return segments


def run(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of every position, float32 [B, S, vocab]; those of padding mean nothing."""
    import torch

    arguments = decoder_arguments(model, inputs)
    batch, length = inputs["input_ids"].shape
    every = torch.arange(length).expand(batch, -1)
    with torch.no_grad():
        logits, _ = model(
            *arguments, torch.zeros(batch, dtype=torch.int64), every, model.new_cache(length + 2, batch=batch)
        )
    return logits


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the normalised hidden states of every position, computed without a cache, [B, S, D]."""
    import torch

    with torch.no_grad():
        hidden, presents = model.language_model(*decoder_arguments(model, inputs))
        assert presents == []
        return model.language_model.norm(hidden)


def greedy(model: Any, inputs: Mapping[str, Tensor], num_tokens: int) -> tuple[list[int], Tensor]:
    """Return so many greedy tokens after one prompt, token by token with the cache, and the logits that chose each."""
    import torch

    ids, positions, rows, embeds = decoder_arguments(model, inputs)
    length = ids.shape[1]
    delta = int(positions.max()) + 1 - length
    cache, past, tokens, chosen_by = model.new_cache(length + num_tokens), torch.tensor([0]), [], []
    with torch.no_grad():
        for _ in range(num_tokens):
            last = torch.tensor([[ids.shape[1] - 1]])
            logits, cache = model(ids, positions, rows, embeds, past, last, cache)
            chosen_by.append(logits[0])
            tokens.append(int(logits[0, -1].argmax()))
            past = past + ids.shape[1]
            ids, rows = torch.tensor([[tokens[-1]]]), torch.tensor([[-1]])
            positions = (past + delta).expand(3, 1, 1)
    return tokens, torch.cat(chosen_by)


def decoder_arguments(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input_ids, position_ids, visual_rows and visual_embeds."""
    import torch

    config, ids = model.config, inputs["input_ids"]
    lengths = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else [ids.shape[1]] * len(ids)
    left = {
        config.image_token_id: _segments(model, inputs, "pixel_values", "image_grid_thw"),
        config.video_token_id: _segments(model, inputs, "pixel_values_videos", "video_grid_thw"),
    }
    positions, rows, embeds = [], [], []
    for row, length in zip(ids, lengths, strict=True):
        num_rows = sum(each.shape[1] for each in embeds)
        found, used = _positions(row[:length].tolist(), left)
        embeds += used
        padding = ids.shape[1] - length
        positions.append(np.pad(found.position_ids, ((0, 0), (0, 0), (0, padding))))
        numbered = np.where(found.visual_rows >= 0, found.visual_rows + num_rows, -1)
        rows.append(np.pad(numbered, ((0, 0), (0, padding)), constant_values=-1))
    assert not any(left.values()), "segments are left over"
    text = config.text.hidden_size
    joined = torch.cat(embeds, 1) if embeds else torch.zeros(config.num_visual_levels, 1, text)
    position_ids, visual_rows = np.concatenate(positions, 1), np.concatenate(rows)
    return ids, torch.from_numpy(position_ids), torch.from_numpy(visual_rows), joined


Segments = list[tuple[tuple[int, int, int], Any]]


def _segments(model: Any, inputs: Mapping[str, Tensor], pixels: str, grids: str) -> Segments:
    """Return the merged grid and the embeddings of each segment, in order."""
    if pixels not in inputs:
        return []
    merge = model.config.vision.spatial_merge_size
    merged = [(1, h // merge, w // merge) for t, h, w in inputs[grids].tolist() for _ in range(t)]
    return list(zip(merged, visual_levels(model, inputs[pixels], inputs[grids]), strict=True))


def _positions(tokens: list[int], left: dict[int, Segments]) -> tuple[PromptPositions, list[Any]]:
    """Number one prompt's tokens; each run of image or video tokens takes the next segment of its kind."""
    spans, used, start = [], [], 0
    for token, group in itertools.groupby(tokens):
        length = len(list(group))
        if token in left:
            grid, embeds = left[token].pop(0)
            spans.append(VisualSpan(start, grid))
            used.append(embeds)
            assert spans[-1].num_tokens == length
        start += length
    return mrope_positions(len(tokens), spans), used
