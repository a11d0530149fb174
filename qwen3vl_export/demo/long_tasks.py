"""State the further tasks of demo-long: several pictures, pages of digits, and conversations up to 4096 tokens.

A dialogue is a list of turns; each brings any number of pictures, asks one question and has one right answer. If there
is more than one picture, each has its number before it, as `add_vision_id` of Qwen's chat template writes it. Asked
about what was shown last, the four tasks of `qwen3vl_export.demo.tasks` keep their questions.

    for prompt in held_out_prompts("earlier", 100, max_tokens=2048):
        answer = model.generate(prompt.messages, do_sample=False, max_new_tokens=MAX_NEW_TOKENS).text
        is_right = answer.strip() == prompt.answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from qwen3vl_export.demo import tasks
from qwen3vl_export.demo.data import MAX_SIDE, MIN_SIDE, Canvas, Digits, load_half, make_canvas
from qwen3vl_export.demo.pages import Page, make_page
from runtime.messages import user_message

Picture = Canvas | Page

SEVERAL = ("picture", "which", "each")
"""One message with several pictures."""
PAGE = ("lines", "line")
"""One message with a page."""
CONVERSATION = ("latest", "earlier")
"""A picture a turn; the last question is about the latest picture, or about an earlier one."""
LONG_TASKS = (*SEVERAL, *PAGE, *CONVERSATION)
QUESTIONS: dict[str, str] = {
    "picture": "Read picture {number}.",
    "which": "Which picture has the {digit}?",
    "each": "How many digits are in each picture?",
    "lines": "Read all lines.",
    "line": "Read line {number}.",
}
MAX_NEW_TOKENS = 48
"""The longest answer, a full page, has 41 tokens and the end token."""
MAX_PICTURES = 24
MAX_SEVERAL = 16
MAX_TOKENS = 4096
HELD_OUT_SEED = 20261127
_TURN_TOKENS = 40
"""About what a turn has beside its visual tokens."""


@dataclass(frozen=True)
class Turn:
    """New pictures, the question and its one right answer."""

    pictures: tuple[Picture, ...]
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """Turns in order."""

    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures of all turns."""
        return tuple(picture for turn in self.turns for picture in turn.pictures)

    def labels(self) -> list[str]:
        """Return what stands before each picture: its number, or nothing before an only one."""
        count = len(self.pictures)
        return [f"Picture {i + 1}: " for i in range(count)] if count > 1 else [""]

    def messages(self) -> list[dict[str, Any]]:
        """Return the turns as messages, without the last answer."""
        messages, labels = [], iter(self.labels())
        for i, turn in enumerate(self.turns):
            if i:
                messages.append({"role": "assistant", "content": self.turns[i - 1].answer})
            (message,) = user_message(turn.question)
            parts = []
            for picture in turn.pictures:
                label = next(labels)
                parts += [{"type": "text", "text": label}] if label else []
                parts.append({"type": "image", "image": picture.image})
            message["content"] = parts + message["content"]
            messages.append(message)
        return messages

    def num_tokens(self, count: Callable[[str], int]) -> int:
        """Return the tokens of the prompt `messages`; `count` counts those of a text without pictures."""
        text = "".join(
            ("\n" if i else "") + f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
            for i, turn in enumerate(self.turns)
        )
        answers = "".join(f"{turn.answer}<|im_end|>" for turn in self.turns[:-1])
        labels = "".join(f"{label}<|vision_start|><|vision_end|>" for label in self.labels())
        return count(text) + count(answers) + count(labels) + sum(map(num_visual_tokens, self.pictures))


@dataclass(frozen=True)
class LongPrompt:
    """A held-out prompt: messages, their last question's true answer, and how many tokens they have."""

    index: int
    task: str
    messages: list[dict[str, Any]]
    answer: str
    num_tokens: int
    num_pictures: int


def grid_of(picture: Picture) -> tuple[int, int]:
    """Return the visual tokens per column and per row."""
    width, height = picture.image.size
    return round(height / 32), round(width / 32)


def num_visual_tokens(picture: Picture) -> int:
    """Return how many visual tokens a picture has."""
    rows, cols = grid_of(picture)
    return rows * cols


def ask(rng: np.random.Generator, task: str, seen: Sequence[Picture], phrasing: int = 0) -> Turn | None:
    """Ask a task of what was seen, or return None if these pictures do not allow it.

    Args:
        rng: Chooses what is asked for.
        task: One of `LONG_TASKS` or of the demo's `TASKS`; the latter, and those of pages, are about the last picture.
        seen: The pictures so far, at least one.
        phrasing: Which of the demo's phrasings.
    """
    last = seen[-1]
    if task in tasks.TASKS:
        if not isinstance(last, Canvas):
            return None
        text = tasks.question(task, last.digits[last.asked].label, phrasing)
        return Turn((), task, text, tasks.answer(task, last.labels, last.place))
    text = QUESTIONS[task]
    if task in PAGE:
        if not isinstance(last, Page):
            return None
        if task == "lines":
            return Turn((), task, text, " ".join(last.line(i + 1) for i in range(len(last.lines))))
        number = int(rng.integers(len(last.lines))) + 1
        return Turn((), task, text.format(number=number), last.line(number))
    canvases = [(i + 1, picture) for i, picture in enumerate(seen) if isinstance(picture, Canvas)]
    if len(seen) < 2 or not canvases:
        return None
    if task == "picture":
        number, picture = canvases[int(rng.integers(len(canvases)))]
        return Turn((), task, text.format(number=number), tasks.answer("read", picture.labels, 0))
    if task == "which":
        found = {digit: [i + 1 for i, picture in enumerate(seen) if digit in picture.labels] for digit in range(10)}
        single = [(digit, numbers[0]) for digit, numbers in found.items() if len(numbers) == 1]
        if not single:
            return None
        digit, number = single[int(rng.integers(len(single)))]
        return Turn((), task, text.format(digit=digit), str(number))
    assert task == "each", task
    return Turn((), task, text, " ".join(str(len(picture.labels)) for picture in seen))


def held_out_prompts(task: str, count: int, *, max_tokens: int = 1024, start: int = 0) -> Iterator[LongPrompt]:
    """Make prompts `start` to `start + count - 1` of a task, of held-out digits in canonical phrasing.

    Args:
        task: One of `LONG_TASKS`. "picture", "which" and "each" have 2 to `MAX_SEVERAL` pictures, as many as fit, and
            the conversations are filled with turns. A page has at most 256 visual tokens whatever the limit.
        count: How many.
        max_tokens: Most tokens of the prompt with `MAX_NEW_TOKENS` of an answer; 256 to `MAX_TOKENS`.
        start: The first prompt's index.

    Raises:
        ValueError: There is no such task, or the limit is out of its range.
    """
    for index, dialogue in enumerate(held_out_dialogues(task, count, max_tokens=max_tokens, start=start), start):
        answer, size = dialogue.turns[-1].answer, dialogue.num_tokens(_count)
        yield LongPrompt(index, task, dialogue.messages(), answer, size, len(dialogue.pictures))


def held_out_dialogues(
    task: str,
    count: int,
    *,
    max_tokens: int = 1024,
    start: int = 0,
    half: str = "held_out",
    seed: int = HELD_OUT_SEED,
) -> Iterator[Dialogue]:
    """Make the dialogues of `held_out_prompts`, or others of another half of the digits and another seed."""
    if task not in LONG_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(LONG_TASKS)}")
    if not 256 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens={max_tokens}: expected 256 to {MAX_TOKENS}")
    pool, room = load_half(half), max_tokens - MAX_NEW_TOKENS
    for index in range(start, start + count):
        rng = np.random.default_rng([seed, LONG_TASKS.index(task), max_tokens, index])
        dialogue = None
        while dialogue is None or dialogue.num_tokens(_count) > room:
            dialogue = _draw(rng, task, pool, room)
        yield dialogue


def draw_canvas(rng: np.random.Generator, pool: Digits, mean_tokens: float, *, augment: bool = False) -> Canvas:
    """Make a canvas of about so many visual tokens: sides between 0.7 and 1.3 times a square's, within the limits."""
    side = 32 * mean_tokens**0.5
    low, high = (int(np.clip(factor * side, MIN_SIDE, MAX_SIDE)) for factor in (0.7, 1.3))
    width, height = rng.integers(low, high + 1, 2).tolist()
    return make_canvas(rng, pool, width, height, augment=augment)


def mean_tokens_of_turns(num_tokens: int) -> float:
    """Return the visual tokens of a picture if about 16 turns of one picture shall have `num_tokens`."""
    return max(6.0, num_tokens / 16 - _TURN_TOKENS)


def _draw(rng: np.random.Generator, task: str, pool: Digits, room: int) -> Dialogue | None:
    """Make a dialogue that ends in the task, or None where the draw does not allow it."""
    if task in PAGE:
        page = make_page(rng, pool)
        turn = ask(rng, task, [page])
        return None if turn is None else Dialogue((_with(turn, page),))
    if task in SEVERAL:
        number = int(rng.integers(2, MAX_SEVERAL + 1))
        pictures = [draw_canvas(rng, pool, min(256.0, max(6.0, 0.85 * room / number - 16))) for _ in range(number)]
        turn = ask(rng, task, pictures)
        return None if turn is None else Dialogue((_with(turn, *pictures),))
    return _conversation(rng, task, pool, room)


def _conversation(rng: np.random.Generator, task: str, pool: Digits, room: int) -> Dialogue | None:
    """Fill the room with turns that count or locate, so that no answer before the last tells what is to be read."""
    mean = mean_tokens_of_turns(room)
    turns: list[Turn] = []
    seen: list[Picture] = []
    while len(seen) < MAX_PICTURES:
        picture = draw_canvas(rng, pool, mean)
        shown = [*seen, picture]
        last = ask(rng, "read", shown) if task == "latest" else ask(rng, "picture", seen) if len(seen) > 1 else None
        if last is not None:
            ending = Dialogue((*turns, _with(last, picture) if task == "latest" else last))
            following = ending.num_tokens(_count) + num_visual_tokens(picture) + _TURN_TOKENS
            if following > room:
                return ending
        turn = ask(rng, ("count", "where")[int(rng.integers(2))], shown)
        assert turn is not None
        turns.append(_with(turn, picture))
        seen = shown
    return None


def _with(turn: Turn, *pictures: Picture) -> Turn:
    return Turn(pictures, turn.task, turn.question, turn.answer)


@lru_cache(maxsize=4096)
def _count(text: str) -> int:
    return len(_tokenizer().encode(text))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from qwen3vl_export.demo import CHECKPOINT
    from runtime.tokenizer import Tokenizer

    return Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes())
