"""Make the batches of the training: canvases of one grid, their questions as token segments, and dense labels.

Shapes: B images of one grid, P patches, E values of a patch (3 channels, 2 equal frames, 16 by 16 pixels), V = P/4
visual tokens, S tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from demo_training.packing import Packing, pack
from qwen3vl_export.demo.data import MAX_DIGITS, MAX_SIDE, MIN_SIDE, Canvas, Digits, make_canvas
from qwen3vl_export.demo.tasks import QUESTIONS, answer, place_of, question

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NO_DIGIT = 10
"""Class of a visual token that holds no digit's centre."""
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        patches_BPE: Normalised patches, as the vision tower takes them.
        ids_BS: Tokens, or None for a vision-only batch.
        targets_BS: The token that position s must predict, `IGNORE` elsewhere.
        segment_S: Which task a position belongs to (-1: prefix).
        packing: Positions and mask shared by the batch.
        rows: Visual tokens per column.
        cols: Visual tokens per row.
        classes_BV: Digit whose centre lies in the token's 32 by 32 cell, or `NO_DIGIT`.
        ranks_BV: Place of that digit in the reading order, or `IGNORE`.
        places_BV: Its third of the canvas (index in `PLACES`), or `IGNORE`.
    """

    patches_BPE: torch.Tensor
    ids_BS: torch.Tensor | None
    targets_BS: torch.Tensor | None
    segment_S: torch.Tensor | None
    packing: Packing | None
    rows: int
    cols: int
    classes_BV: torch.Tensor
    ranks_BV: torch.Tensor
    places_BV: torch.Tensor


class Prompter:
    """Turn canvases into token segments with the tokens of the chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Encode the fixed parts of the prompt once."""
        self._encode = lambda text: list(tokenizer.encode(text).ids)
        self._cache: dict[str, list[int]] = {}
        self.before = self.encode("<|im_start|>user\n<|vision_start|>")
        self.image = self.encode("<|image_pad|>")[0]
        self.after = self.encode("<|vision_end|>")
        self.turn = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.encode("<|im_end|>")
        self.next_turn = self.encode("\n<|im_start|>user\n")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; sentences of the tasks repeat, so they are kept."""
        if text not in self._cache:
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def segment(self, task: str, canvas: Canvas, phrasing: int) -> tuple[list[int], int]:
        """Return the tokens of a question with its answer, and how many of them are given (not to be predicted)."""
        asked = canvas.digits[canvas.asked].label
        given = self.encode(question(task, asked, phrasing)) + self.turn
        return given + self.encode(answer(task, canvas.labels, canvas.place)) + self.end, len(given)


def cell_of(canvas: Canvas, rows: int, cols: int) -> list[int]:
    """Return the visual token that holds each digit's centre. Centres are ≥ 32 px apart, so cells differ at scale 1."""
    width, height = canvas.image.size
    cells = []
    for digit in canvas.digits:
        x, y = digit.centre
        cells.append(min(rows - 1, int(y / height * rows)) * cols + min(cols - 1, int(x / width * cols)))
    return cells


def to_pixels(canvas: Canvas, rows: int, cols: int) -> np.ndarray:
    """Resize as the processor does: bicubic on bytes, both sides to multiples of 32.

    This is the call that transformers' torchvision backend ends in, without torchvision's checks. Pillow's bicubic was
    up to 18 grey levels off on 60 held-out canvases.

    Returns:
        uint8 [rows * 32, cols * 32, 3].
    """
    pixels = np.array(canvas.image)
    if pixels.shape[:2] == (rows * 32, cols * 32):
        return pixels
    bytes_1CHW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(bytes_1CHW, (rows * 32, cols * 32), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def patchify(images_BHWC: np.ndarray) -> torch.Tensor:
    """Cut uint8 images into normalised patches [B, P, 1536] in merge order; both frames are the image."""
    b, h, w, _ = images_BHWC.shape
    x = torch.from_numpy(np.array(images_BHWC)).reshape(b, h // 32, 2, 16, w // 32, 2, 16, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(b, h // 16 * (w // 16), 3, 1, 256)
    return x.float().mul_(2 / 255).sub_(1).expand(-1, -1, -1, 2, -1).flatten(2)


def dense_labels(canvases: Sequence[Canvas], rows: int, cols: int) -> tuple[torch.Tensor, ...]:
    """Return class, rank and place of the digit in each visual token, as `Batch` has them, [B, V] each."""
    shape_BV = len(canvases), rows * cols
    classes, ranks, places = np.full(shape_BV, NO_DIGIT), np.full(shape_BV, IGNORE), np.full(shape_BV, IGNORE)
    for i, canvas in enumerate(canvases):
        for rank, (digit, cell) in enumerate(zip(canvas.digits, cell_of(canvas, rows, cols), strict=True)):
            classes[i, cell], ranks[i, cell] = digit.label, rank
            places[i, cell] = place_of(*digit.centre, *canvas.image.size)
    return torch.from_numpy(classes), torch.from_numpy(ranks), torch.from_numpy(places)


def collate(
    canvases: Sequence[Canvas],
    rows: int,
    cols: int,
    prompter: Prompter | None,
    tasks: Sequence[str],
    phrasings: np.ndarray | None = None,
    *,
    chained: bool = False,
) -> Batch:
    """Assemble a batch of canvases that share the grid rows by cols.

    Args:
        canvases: The pictures.
        rows: Visual tokens per column.
        cols: Visual tokens per row.
        prompter: None for a vision-only batch.
        tasks: The tasks asked about every canvas, in this order.
        phrasings: [B, len(tasks)] which phrasing; canonical by default.
        chained: Ask the tasks as turns of one conversation; their segments must then have equal lengths in the batch.
    """
    b, v = len(canvases), rows * cols
    patches = patchify(np.stack([to_pixels(c, rows, cols) for c in canvases]))
    dense = dense_labels(canvases, rows, cols)
    if prompter is None:
        return Batch(patches, None, None, None, None, rows, cols, *dense)

    prefix = prompter.before + [prompter.image] * v + prompter.after
    ids_parts = [np.tile(np.asarray(prefix), (b, 1))]
    target_parts = [np.full((b, len(prefix)), IGNORE)]
    lengths = [len(prompter.after)]
    owner = [-1] * len(prefix)
    for t, task in enumerate(tasks):
        opening = prompter.next_turn if chained and t else []
        segments = []
        for i, canvas in enumerate(canvases):
            tokens, given = prompter.segment(task, canvas, 0 if phrasings is None else int(phrasings[i, t]))
            segments.append((opening + tokens, len(opening) + given))
        length = max(len(tokens) for tokens, _ in segments)
        assert not chained or all(len(tokens) == length for tokens, _ in segments)
        ids = np.full((b, length), prompter.end[0])
        targets = np.full((b, length), IGNORE)
        for i, (tokens, given) in enumerate(segments):
            ids[i, : len(tokens)] = tokens
            targets[i, given - 1 : len(tokens) - 1] = tokens[given:]
        ids_parts.append(ids)
        target_parts.append(targets)
        lengths.append(length)
        owner += [t] * length
    packing = pack(rows, cols, len(prompter.before), lengths, chained=chained)
    return Batch(
        patches,
        torch.from_numpy(np.concatenate(ids_parts, 1)),
        torch.from_numpy(np.concatenate(target_parts, 1)),
        torch.tensor(owner),
        packing,
        rows,
        cols,
        *dense,
    )


def draw_grid(rng: np.random.Generator, max_side: int) -> tuple[int, int]:
    """Draw rows and columns as log-uniform sides of `MIN_SIDE`..max_side give them."""
    sides = np.exp(rng.uniform(np.log(MIN_SIDE), np.log(max_side), 2))
    return round(sides[0] / 32), round(sides[1] / 32)


def draw_side_in(rng: np.random.Generator, cells: int) -> int:
    """Draw a side in pixels that the processor's rounding takes to `cells` · 32."""
    while True:
        side = int(rng.integers(max(MIN_SIDE, cells * 32 - 16), min(MAX_SIDE, cells * 32 + 16) + 1))
        if round(side / 32) == cells:
            return side


def training_batch(
    rng: np.random.Generator,
    pool: Digits,
    prompter: Prompter | None,
    *,
    max_side: int,
    max_patches: int,
    max_images: int,
    tasks: Sequence[str],
    free_sides: bool,
    min_distractors: int,
    conversations: float = 0.0,
) -> Batch:
    """Make one training batch: a grid is drawn first, then as many canvases as `max_patches` and `max_images` allow.

    With probability `conversations` the batch asks read, count and JSON one after the other, in any order. All its
    canvases then have the same number of digits, and a turn has one phrasing, so that no padding separates the turns.
    """
    rows, cols = draw_grid(rng, max_side)
    chained = prompter is not None and rng.random() < conversations
    count = int(rng.integers(1, MAX_DIGITS + 1)) if chained else None
    b = max(1, min(max_images, max_patches // (rows * cols * 4)))
    canvases = []
    for _ in range(b):
        width = draw_side_in(rng, cols) if free_sides else cols * 32
        height = draw_side_in(rng, rows) if free_sides else rows * 32
        canvases.append(
            make_canvas(rng, pool, width, height, count=count, augment=True, min_distractors=min_distractors)
        )
    if chained:
        tasks = [str(t) for t in rng.permutation([t for t in tasks if t != "where"])]
    phrasings = np.stack([rng.integers(0, len(QUESTIONS[t]), 1 if chained else b) for t in tasks], 1)
    return collate(canvases, rows, cols, prompter, tasks, np.broadcast_to(phrasings, (b, len(tasks))), chained=chained)
