"""Make the batches of demo-long: pictures by grid, shared by several dialogues whose every answer is to be predicted.

The vision tower runs once on the pictures of a batch, and each dialogue takes its own choice of them in its own order.

Shapes: B dialogues, S tokens of the longest, P patches, E values of a patch, V visual tokens of all pictures,
I pictures of one grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from qwen3vl_export.demo.tasks import QUESTIONS, TASKS, place_of
from runtime.positions import VisualSpan, mrope_positions

NUM_GRIDS = 3
"""Of the canvases of a batch: the tower takes pictures of one grid at once."""
_QUESTIONS = 9


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
        visible_B1SS: Which token (column) a token (row) sees, or None where it sees all before it.
    """

    patches: tuple[tuple[torch.Tensor, int, int], ...]
    dense: DenseLabels
    ids_BS: torch.Tensor | None = None
    targets_BS: torch.Tensor | None = None
    positions_3BS: torch.Tensor | None = None
    rows_BS: torch.Tensor | None = None
    visible_B1SS: torch.Tensor | None = None


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


def collate_dialogues(
    dialogues: Sequence[Dialogue], prompter: Prompter, *, are_independent: bool = False
) -> DialogueBatch:
    """Assemble dialogues; a picture that several of them hold is encoded once.

    Args:
        dialogues: The dialogues.
        prompter: Gives the tokens of texts.
        are_independent: All pictures come with the first turn, and each question is asked as if it were the only one:
            its tokens see the pictures and themselves, at the positions of a first question.
    """
    distinct = {id(picture): picture for dialogue in dialogues for picture in dialogue.pictures}
    ordered, patches = by_grid(list(distinct.values()))
    ends = np.cumsum([num_visual_tokens(picture) for picture in ordered]).tolist()
    first_row = {id(picture): end - num_visual_tokens(picture) for picture, end in zip(ordered, ends, strict=True)}
    encoded = [_encode(dialogue, prompter, first_row, are_independent) for dialogue in dialogues]
    b, s = len(encoded), max(len(each.ids) for each in encoded)
    ids_BS, targets_BS = np.full((b, s), prompter.end[0]), np.full((b, s), IGNORE)
    positions_3BS, rows_BS, owners_BS = np.zeros((3, b, s), np.int64), np.full((b, s), -1), np.full((b, s), -1)
    for i, each in enumerate(encoded):
        n = len(each.ids)
        ids_BS[i, :n], targets_BS[i, :n], rows_BS[i, :n] = each.ids, each.targets, each.rows
        positions_3BS[:, i, :n], owners_BS[i, :n] = each.positions_3S, each.owners
    visible_B1SS = None
    if are_independent:
        owners = torch.from_numpy(owners_BS)[:, None]
        visible_B1SS = (owners[..., None] == owners[..., None, :]) | (owners == 0)[..., None, :]
        visible_B1SS &= torch.ones(s, s, dtype=torch.bool).tril()
    text = map(torch.from_numpy, (ids_BS, targets_BS, positions_3BS, rows_BS))
    return DialogueBatch(patches, dense_labels(ordered), *text, visible_B1SS)


@dataclass
class _Encoded:
    """A dialogue with all answers: what `DialogueBatch` has, and the turn that a token belongs to (0: the pictures)."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    spans: list[VisualSpan] = field(default_factory=list)
    positions_3S: np.ndarray | None = None

    def add(self, tokens: list[int], owner: int) -> None:
        """Add text that is given."""
        self.ids += tokens
        self.targets += [IGNORE] * len(tokens)
        self.rows += [-1] * len(tokens)
        self.owners += [owner] * len(tokens)

    def add_answer(self, tokens: list[int], owner: int) -> None:
        """Add text that is to be predicted."""
        self.targets[-1] = tokens[0]
        self.add(tokens, owner)
        self.targets[-len(tokens) :] = [*tokens[1:], IGNORE]

    def add_picture(self, rows: int, cols: int, first_row: int, token: int) -> None:
        """Add the visual tokens of a picture."""
        self.spans.append(VisualSpan(len(self.ids), (1, rows, cols)))
        self.add([token] * (rows * cols), 0)
        self.rows[-rows * cols :] = range(first_row, first_row + rows * cols)


def _encode(dialogue: Dialogue, prompter: Prompter, first_row: dict[int, int], are_independent: bool) -> _Encoded:
    """Return a dialogue's tokens and where they stand."""
    found = _Encoded()
    labels = iter(dialogue.labels())
    starts = []
    for i, turn in enumerate(dialogue.turns):
        if not i or not are_independent:
            found.add(prompter.encode(("\n" if i else "") + "<|im_start|>user\n"), 0)
        for picture in turn.pictures:
            found.add(prompter.encode(next(labels) + "<|vision_start|>"), 0)
            found.add_picture(*grid_of(picture), first_row[id(picture)], prompter.image)
            found.add(prompter.after, 0)
        starts.append(len(found.ids))
        found.add(prompter.encode(turn.question) + prompter.turn, i + 1)
        found.add_answer(prompter.encode(turn.answer) + prompter.end, i + 1)
    found.positions_3S = mrope_positions(len(found.ids), found.spans).position_ids[:, 0]
    if are_independent:
        for start, end in zip(starts, [*starts[1:], len(found.ids)], strict=True):
            found.positions_3S[:, start:end] -= found.positions_3S[0, start] - found.positions_3S[0, starts[0]]
    return found


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
) -> tuple[list[Dialogue], bool]:
    """Make the dialogues of one batch: all about pages, all about several pictures, or all with a picture a turn.

    Args:
        rng: The only source of chance.
        pool: The digits to draw from.
        length: About the tokens of a dialogue; pages are shorter.
        num_tokens: About the tokens of the batch.
        prompter: Counts the tokens of texts.

    Returns:
        The dialogues, and whether their questions are independent.
    """
    kind = rng.choice(("page", "several", "turns"), p=(0.3, 0.4, 0.3))
    if kind == "page":
        return [_about_page(rng, make_page(rng, pool, augment=True)) for _ in range(max(2, num_tokens // 320))], True
    number = max(1, num_tokens // length)
    if kind == "several":
        most = int(rng.integers(2, 1 + int(np.clip(length // 24, 4, MAX_SEVERAL))))
        mean = float(np.clip(0.7 * length / most - 16, 6, 256))
        canvases = draw_canvases(rng, pool, most if number == 1 else 2 * most, mean)
        return [_about_several(rng, canvases, most) for _ in range(number)], True
    mean = mean_tokens_of_turns(length) if length >= 1024 else float(rng.uniform(6, 40))
    count = min(MAX_PICTURES, max(4, round(length / (mean + 40))))
    canvases = draw_canvases(rng, pool, count if number == 1 else 2 * count, mean)
    return [_turns(rng, canvases, length, prompter) for _ in range(number)], False


def _chosen(rng: np.random.Generator, pictures: Sequence[Picture], count: int) -> list[Picture]:
    return [pictures[i] for i in rng.choice(len(pictures), min(count, len(pictures)), replace=False)]


def _about_page(rng: np.random.Generator, page: Page) -> Dialogue:
    turns = [turn for task in ("lines", *["line"] * 5) if (turn := ask(rng, task, [page]))]
    return Dialogue(_showing(turns, [page]))


def _about_several(rng: np.random.Generator, pictures: Sequence[Picture], most: int) -> Dialogue:
    count = int(rng.integers(max(2, (most + 1) // 2), most + 1))
    seen = _chosen(rng, pictures, count)
    drawn = ("each", *(SEVERAL[int(i)] for i in rng.integers(0, 2, _QUESTIONS - 1)))
    return Dialogue(_showing([turn for task in drawn if (turn := ask(rng, task, seen))], seen))


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
        task = TASKS[int(rng.integers(len(TASKS)))]
        turn = ask(rng, task, seen, int(rng.integers(len(QUESTIONS[task]))))
        assert turn is not None
        turns.append(Turn((picture,), turn.task, turn.question, turn.answer))
        room -= num_visual_tokens(picture) + 16 + len(prompter.encode(turn.question)) + len(turn.answer)
        while rng.random() < 0.5:
            back = ask(rng, ("picture", "which")[int(rng.random() < 0.4)], seen)
            if back is None:
                break
            turns.append(back)
            room -= 16 + len(prompter.encode(back.question))
    return Dialogue(tuple(turns))
