"""Make the batches of demo-long: pictures by grid, shared by several dialogues whose every answer is to be predicted.

The vision tower runs once on the pictures of a batch, and each dialogue takes its own choice of them in its own order.

Shapes: B dialogues, S tokens of the longest, P patches, E values of a patch, V visual tokens of all pictures,
I pictures of one grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from demo_training.batches import IGNORE, NO_DIGIT, Prompter, cell_of, draw_side_in, patchify, to_pixels
from qwen3vl_export.demo.data import MAX_SIDE, MIN_SIDE, Canvas, Digits, make_canvas
from qwen3vl_export.demo.long_tasks import (
    MAX_PICTURES,
    MAX_SEVERAL,
    SEVERAL,
    Dialogue,
    Picture,
    Turn,
    ask,
    grid_of,
    mean_tokens_of_turns,
    num_visual_tokens,
)
from qwen3vl_export.demo.pages import Page, make_page
from qwen3vl_export.demo.tasks import TASKS, place_of
from runtime.positions import VisualSpan, mrope_positions

NUM_GRIDS = 3
"""Of the canvases of a batch: the tower takes pictures of one grid at once."""
_QUESTIONS = 5


@dataclass(frozen=True)
class DenseLabels:
    """What the throw-away heads must say of each visual token, [V] each; `IGNORE` where there is nothing to say.

    Attributes:
        classes: Digit whose centre lies in the token's cell, or `NO_DIGIT`.
        ranks: Place of that digit in a canvas's reading order.
        places: Its third of the canvas (index in `PLACES`).
        lines: Its line on a page.
        columns: Its place in that line.
    """

    classes: torch.Tensor
    ranks: torch.Tensor
    places: torch.Tensor
    lines: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class DialogueBatch:
    """One step's data.

    Attributes:
        patches: The pictures of each grid, [I, P, E], and its rows and columns of visual tokens.
        dense: Labels of the visual tokens, in the order of `patches`.
        ids_BS: Tokens, padded at the end, or None for a batch without questions.
        targets_BS: The token that position s must predict, `IGNORE` elsewhere.
        positions_3BS: mRoPE positions.
        rows_BS: Which visual token stands at a position, -1 for text.
    """

    patches: tuple[tuple[torch.Tensor, int, int], ...]
    dense: DenseLabels
    ids_BS: torch.Tensor | None = None
    targets_BS: torch.Tensor | None = None
    positions_3BS: torch.Tensor | None = None
    rows_BS: torch.Tensor | None = None


def dense_labels(pictures: Sequence[Picture]) -> DenseLabels:
    """Label the visual tokens of pictures, one picture after the other."""
    parts = []
    for picture in pictures:
        rows, cols = grid_of(picture)
        labels_5V = np.full((5, rows * cols), IGNORE)
        labels_5V[0] = NO_DIGIT
        cells = cell_of(picture, rows, cols)
        for rank, (digit, cell) in enumerate(zip(picture.digits, cells, strict=True)):
            labels_5V[0, cell] = digit.label
            if isinstance(picture, Canvas):
                labels_5V[1:3, cell] = rank, place_of(*digit.centre, *picture.image.size)
        if isinstance(picture, Page):
            where = ((i, j) for i, line in enumerate(picture.lines) for j in range(len(line)))
            for cell, (line, column) in zip(cells, where, strict=True):
                labels_5V[3:, cell] = line, column
        parts.append(labels_5V)
    return DenseLabels(*torch.from_numpy(np.concatenate(parts, 1)))


def by_grid(pictures: Sequence[Picture]) -> tuple[list[Picture], tuple[tuple[torch.Tensor, int, int], ...]]:
    """Return the pictures in the order of their grids, and the patches of each grid."""
    ordered = sorted(pictures, key=grid_of)
    patches = []
    for (rows, cols), group in groupby(ordered, key=grid_of):
        pixels = np.stack([to_pixels(picture, rows, cols) for picture in group])
        patches.append((patchify(pixels), rows, cols))
    return ordered, tuple(patches)


def vision_batch(pictures: Sequence[Picture]) -> DialogueBatch:
    """Return a batch without questions."""
    ordered, patches = by_grid(pictures)
    return DialogueBatch(patches, dense_labels(ordered))


def collate_dialogues(dialogues: Sequence[Dialogue], prompter: Prompter) -> DialogueBatch:
    """Assemble dialogues; a picture that several of them hold is encoded once."""
    distinct = {id(picture): picture for dialogue in dialogues for picture in dialogue.pictures}
    ordered, patches = by_grid(list(distinct.values()))
    ends = np.cumsum([num_visual_tokens(picture) for picture in ordered]).tolist()
    first_row = {id(picture): end - num_visual_tokens(picture) for picture, end in zip(ordered, ends, strict=True)}
    encoded = [_encode(dialogue, prompter, first_row) for dialogue in dialogues]
    b, s = len(encoded), max(len(ids) for ids, *_ in encoded)
    ids_BS, targets_BS = np.full((b, s), prompter.end[0]), np.full((b, s), IGNORE)
    positions_3BS, rows_BS = np.zeros((3, b, s), np.int64), np.full((b, s), -1)
    for i, (ids, targets, positions_3S, rows) in enumerate(encoded):
        n = len(ids)
        ids_BS[i, :n], targets_BS[i, :n], positions_3BS[:, i, :n], rows_BS[i, :n] = ids, targets, positions_3S, rows
    text = map(torch.from_numpy, (ids_BS, targets_BS, positions_3BS, rows_BS))
    return DialogueBatch(patches, dense_labels(ordered), *text)


def _encode(
    dialogue: Dialogue, prompter: Prompter, first_row: dict[int, int]
) -> tuple[list[int], list[int], np.ndarray, list[int]]:
    """Return ids, targets, positions [3, S] and visual rows of a dialogue with all answers."""
    ids: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    spans = []
    labels = iter(dialogue.labels())

    def add(tokens: list[int], *, is_answer: bool = False) -> None:
        if is_answer:
            targets[-1] = tokens[0]
        ids.extend(tokens)
        targets.extend([*tokens[1:], IGNORE] if is_answer else [IGNORE] * len(tokens))
        rows.extend([-1] * len(tokens))

    for i, turn in enumerate(dialogue.turns):
        add(prompter.encode(("\n" if i else "") + "<|im_start|>user\n"))
        for picture in turn.pictures:
            add(prompter.encode(next(labels) + "<|vision_start|>"))
            height, width = grid_of(picture)
            spans.append(VisualSpan(len(ids), (1, height, width)))
            rows_of_picture = range(first_row[id(picture)], first_row[id(picture)] + height * width)
            ids.extend([prompter.image] * len(rows_of_picture))
            targets.extend([IGNORE] * len(rows_of_picture))
            rows.extend(rows_of_picture)
            add(prompter.after)
        add(prompter.encode(turn.question) + prompter.turn)
        add(prompter.encode(turn.answer) + prompter.end, is_answer=True)
    return ids, targets, mrope_positions(len(ids), spans).position_ids[:, 0], rows


def draw_canvases(rng: np.random.Generator, pool: Digits, count: int, mean_tokens: float) -> list[Picture]:
    """Make training canvases of at most `NUM_GRIDS` grids, of about so many visual tokens."""
    side = mean_tokens**0.5
    low, high = (int(np.clip(round(factor * side), MIN_SIDE // 32, MAX_SIDE // 32)) for factor in (0.7, 1.3))
    canvases: list[Picture] = []
    for share in np.array_split(np.arange(count), NUM_GRIDS):
        rows, cols = rng.integers(low, high + 1, 2).tolist()
        for _ in share:
            width, height = draw_side_in(rng, cols), draw_side_in(rng, rows)
            canvases.append(make_canvas(rng, pool, width, height, augment=True))
    return canvases


def training_dialogues(
    rng: np.random.Generator, pool: Digits, *, length: int, num_tokens: int, prompter: Prompter
) -> list[Dialogue]:
    """Make the dialogues of one batch: all about pages, all about several pictures, or all with a picture a turn.

    Args:
        rng: The only source of chance.
        pool: The digits to draw from.
        length: About the tokens of a dialogue; pages are shorter.
        num_tokens: About the tokens of the batch.
        prompter: Counts the tokens of texts.
    """
    kind = rng.choice(("page", "several", "turns"), p=(0.25, 0.4, 0.35))
    if kind == "page":
        count = max(2, num_tokens // 256)
        return [_about_page(rng, make_page(rng, pool, augment=True)) for _ in range(count)]
    number = max(1, num_tokens // length)
    if kind == "several":
        most = int(rng.integers(2, 1 + int(np.clip(length // 24, 4, MAX_SEVERAL))))
        mean = float(np.clip(0.7 * length / most - 16, 6, 256))
        canvases = draw_canvases(rng, pool, most if number == 1 else 2 * most, mean)
        return [_about_several(rng, canvases, most) for _ in range(number)]
    mean = mean_tokens_of_turns(length) if length >= 1024 else float(rng.uniform(6, 40))
    count = min(MAX_PICTURES, max(4, round(length / (mean + 40))))
    canvases = draw_canvases(rng, pool, count if number == 1 else 2 * count, mean)
    return [_turns(rng, canvases, length, prompter) for _ in range(number)]


def _chosen(rng: np.random.Generator, pictures: Sequence[Picture], count: int) -> list[Picture]:
    return [pictures[i] for i in rng.choice(len(pictures), min(count, len(pictures)), replace=False)]


def _about_page(rng: np.random.Generator, page: Page) -> Dialogue:
    tasks = ["lines", *["line"] * 3]
    asked = (ask(rng, tasks[i], [page], None) for i in rng.permutation(len(tasks)))
    return Dialogue(_showing([turn for turn in asked if turn], [page]))


def _about_several(rng: np.random.Generator, pictures: Sequence[Picture], most: int) -> Dialogue:
    count = int(rng.integers(max(2, (most + 1) // 2), most + 1))
    if rng.random() < 0.25:
        count = min(count, 4)  # so that "total" is asked often enough
    while True:
        seen = _chosen(rng, pictures, count)
        drawn = (SEVERAL[int(i)] for i in rng.choice(3, _QUESTIONS, p=(0.5, 0.3, 0.2)))
        turns = [turn for turn in (ask(rng, task, seen, None) for task in drawn) if turn]
        if turns:
            return Dialogue(_showing(turns, seen))


def _showing(turns: list[Turn], pictures: Sequence[Picture]) -> tuple[Turn, ...]:
    first = turns[0]
    return (Turn(tuple(pictures), first.task, first.question, first.answer), *turns[1:])


def _turns(rng: np.random.Generator, pictures: Sequence[Picture], length: int, prompter: Prompter) -> Dialogue:
    """Show a picture a turn and ask about it, and about earlier ones in turns between."""
    turns: list[Turn] = []
    seen: list[Picture] = []
    waiting: Iterator[Picture] = iter(_chosen(rng, pictures, len(pictures)))
    room = length
    while room > 0 and (picture := next(waiting, None)) is not None and len(seen) < MAX_PICTURES:
        seen.append(picture)
        turn = ask(rng, TASKS[int(rng.integers(len(TASKS)))], seen, None)
        assert turn is not None
        turns.append(Turn((picture,), turn.task, turn.question, turn.answer))
        room -= num_visual_tokens(picture) + 16 + len(prompter.encode(turn.question)) + len(turn.answer)
        while rng.random() < 0.5:
            back = ask(rng, ("picture", "which")[int(rng.random() < 0.3)], seen, None)
            if back is None:
                break
            turns.append(back)
            room -= 16 + len(prompter.encode(back.question))
    return Dialogue(tuple(turns))
