"""The demo's canvases: deterministic, disjoint halves, within bounds, with an unambiguous reading order."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from qwen3vl_export.demo import IMAGES, data
from qwen3vl_export.demo.distractors import KINDS
from qwen3vl_export.demo.tasks import PLACES, QUESTIONS, TASKS, answer, place_of, question

INDICES = range(60)


@pytest.fixture(scope="module")
def canvases() -> list[data.Canvas]:
    return [data.held_out_canvas(i) for i in INDICES]


def test_split_is_committed_disjoint_stratified_and_complete() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    split = json.loads(data.SPLIT_FILE.read_text())
    classes = load_digits().target
    halves = train_test_split(np.arange(len(classes)), test_size=0.2, stratify=classes, random_state=0)
    assert split == {name: sorted(half.tolist()) for name, half in zip(("train", "held_out"), halves, strict=True)}
    train, held_out = set(split["train"]), set(split["held_out"])
    assert not train & held_out
    assert train | held_out == set(range(1797))
    assert len(held_out) == 360
    target = load_digits().target
    counts = np.bincount(target[sorted(held_out)], minlength=10)
    np.testing.assert_allclose(counts, np.bincount(target) * 0.2, atol=1.0)


def test_canvas_depends_on_seed_and_index_only(canvases: list[data.Canvas]) -> None:
    for index in (5, 0, 17):
        again = data.held_out_canvas(index)
        assert again.image.tobytes() == canvases[index].image.tobytes()
        assert again.digits == canvases[index].digits
        assert again.asked == canvases[index].asked
    assert canvases[0].image.tobytes() != canvases[1].image.tobytes()
    other_seed = data.canvas_at(data.HELD_OUT_SEED + 1, 0, "held_out")
    assert other_seed.image.tobytes() != canvases[0].image.tobytes()


def test_first_canvas_is_the_one_that_was_measured(canvases: list[data.Canvas]) -> None:
    # A change of the generator would silently make the accuracy table one of other pictures.
    truth = [(c.image.size, c.labels) for c in canvases[:3]]
    assert truth == FROZEN


def test_held_out_canvases_hold_held_out_digits_only(canvases: list[data.Canvas]) -> None:
    held_out = set(json.loads(data.SPLIT_FILE.read_text())["held_out"])
    assert {d.source for c in canvases for d in c.digits} <= held_out


def test_bounds(canvases: list[data.Canvas]) -> None:
    for canvas in canvases:
        width, height = canvas.image.size
        assert 64 <= width <= 512 and 64 <= height <= 512
        assert 1 <= len(canvas.digits) <= 4
        assert len(canvas.distractors) >= 2
        assert {kind for kind, _ in canvas.distractors} <= {*KINDS, "under"}
        for digit in canvas.digits:
            x0, y0, x1, y1 = digit.box
            assert x1 - x0 == y1 - y0
            assert 24 <= x1 - x0 <= 64
            assert x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height
    sizes = {c.image.size for c in canvases}
    assert any(w % 32 or h % 32 for w, h in sizes)
    assert {len(c.digits) for c in canvases} == {1, 2, 3, 4}


def test_digits_keep_apart_and_read_in_rows(canvases: list[data.Canvas]) -> None:
    for canvas in canvases:
        boxes = [d.box for d in canvas.digits]
        for before, after in itertools.pairwise(boxes):
            same_row = after[0] >= before[2] + data.GAP and (
                abs(before[1] + before[3] - after[1] - after[3]) / 2 <= 2 * data.ROW_JITTER + 1
            )
            next_row = after[1] >= before[3] + data.GAP
            assert same_row or next_row, (before, after)
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                apart_x = max(a[0], b[0]) - min(a[2], b[2])
                apart_y = max(a[1], b[1]) - min(a[3], b[3])
                assert max(apart_x, apart_y) >= data.GAP


def test_distractors_do_not_cover_digits(canvases: list[data.Canvas]) -> None:
    for canvas in canvases:
        for kind, (x0, y0, x1, y1) in canvas.distractors:
            if kind == "under":
                continue
            for digit in canvas.digits:
                a, b, c, d = digit.box
                assert x1 < a or c < x0 or y1 < b or d < y0


def test_digit_contrasts_with_its_background() -> None:
    pool = data.load_half("train")
    rng = np.random.default_rng(3)
    for _ in range(30):
        image = np.asarray(data.make_canvas(rng, pool, 64, 64, count=1).image.convert("L"), dtype=float)
        assert image.max() - image.min() >= 0.3 * 255 * 0.5


def test_asked_digit_occurs_once_and_is_clear_of_the_lines(canvases: list[data.Canvas]) -> None:
    for canvas in canvases:
        digit = canvas.digits[canvas.asked]
        assert canvas.labels.count(digit.label) == 1
        for at, side in zip(digit.centre, canvas.image.size, strict=True):
            assert min(abs(at - side / 3), abs(at - 2 * side / 3)) >= data.place_margin(side)


def test_held_out_example_states_the_truth(canvases: list[data.Canvas]) -> None:
    for index in INDICES:
        example, canvas = data.held_out(index), canvases[index]
        assert list(example.tasks) == list(TASKS)
        assert example.tasks["read"] == ("Read the digits.", "".join(map(str, canvas.labels)))
        assert example.tasks["count"] == ("How many digits are there?", str(len(canvas.labels)))
        where, place = example.tasks["where"]
        assert where == f"Where is the {canvas.labels[canvas.asked]}?"
        assert place == PLACES[canvas.place]
        prompt, reply = example.tasks["json"]
        assert prompt == "Answer as JSON."
        assert json.loads(reply) == {"digits": canvas.labels, "count": len(canvas.labels)}
    with pytest.raises(IndexError):
        data.held_out(data.HELD_OUT_COUNT)


def test_places_divide_the_canvas_into_thirds() -> None:
    grid = [place_of(x, y, 90, 300) for y in (10, 150, 290) for x in (10, 45, 80)]
    assert grid == list(range(9))
    assert PLACES[0] == "top left" and PLACES[4] == "center" and PLACES[8] == "bottom right"


def test_answers() -> None:
    assert answer("read", [3, 1, 7], 0) == "317"
    assert answer("count", [3, 1, 7], 0) == "3"
    assert answer("where", [3, 1, 7], 2) == "top right"
    assert answer("json", [3, 1, 7], 0) == '{"digits":[3,1,7],"count":3}'
    assert question("where", 7) == "Where is the 7?"
    assert all(len(QUESTIONS[t]) >= 3 for t in TASKS)


def test_shipped_pictures_are_the_held_out_canvases() -> None:
    from PIL import Image

    truth = json.loads((IMAGES / "truth.json").read_text())
    assert {entry["task"] for entry in truth} == set(TASKS)
    for entry in truth:
        example = data.held_out(entry["index"])
        with Image.open(IMAGES / entry["file"]) as image:
            assert image.tobytes() == example.image.tobytes()
        assert (entry["question"], entry["answer"]) == example.tasks[entry["task"]]
    assert len({entry["file"] for entry in truth}) >= 6


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 512), (512, 64), (101, 77)])
def test_four_digits_fit_on_every_canvas(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes = data.layout(width, height, 4, rng)
        assert len(boxes) == 4
        assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in boxes)


FROZEN = [((70, 105), [1, 6, 5, 4]), ((173, 119), [8, 3]), ((219, 173), [7, 7, 4])]
