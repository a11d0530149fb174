"""Boxes and points in answers, and their pixels."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.grounding import Box, Point, find_boxes, find_points

pytestmark = pytest.mark.portable

SIZE = (2000, 500)
CAT, DOG = Box("cat", 200, 100, 600, 200), Box("dog", 0, 0, 2000, 500)
CAT_JSON, DOG_JSON = (
    '{"bbox_2d": [100, 200, 300, 400], "label": "cat"}',
    '{"bbox_2d": [0, 0, 1000, 1000], "label": "dog"}',
)


@pytest.mark.parametrize(
    "text",
    [
        f"[{CAT_JSON}, {DOG_JSON}]",
        f"```json\n[\n\t{CAT_JSON},\n\t{DOG_JSON}\n]\n```",
        f"I see {CAT_JSON} and also {DOG_JSON}.",
        f'{{"objects": [{CAT_JSON}, {DOG_JSON}]}}',
        f'[{CAT_JSON}, {DOG_JSON}, {{"bbox_2d": [5, 6, 7',  # cut off by the length
        f'[{CAT_JSON}, {DOG_JSON}, {{"bbox_2d": [5, 6, 7, 8], "label": "a',
        f'{{"broken": {CAT_JSON}, {DOG_JSON}',
        '{"label":"cat","bbox_2d":[100.0,200,300,400]}{"label":"dog","bbox_2d":[[0,0],[1000,1000]]}',
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
        "<|object_ref_start|> dog <|object_ref_end|><|box_start|>(0,0),(1000,1000)<|box_end|>",
        "<ref>cat</ref><box>(100, 200), (300, 400)</box> and <ref>dog</ref><box>[0,0],[1000,1000]</box>",
        f"<ref>cat</ref><box>(100,200),(300,400)</box>, {DOG_JSON}",
    ],
)
def test_boxes_of_every_form(text: str) -> None:
    assert find_boxes(text, SIZE) == (CAT, DOG)
    assert find_points(text, SIZE) == ()


@pytest.mark.parametrize(
    "text",
    [
        '[{"point_2d": [500, 500], "label": "nose"}, {"point_2d": [0, 1000]}]',
        "<ref>nose</ref><point>(500,500)</point> <point>[0,1000]</point>",
        "<|object_ref_start|>nose<|object_ref_end|><|box_start|>(500,500)<|box_end|>\n<|box_start|>(0,1000)<|box_end|>",
    ],
)
def test_points_of_every_form(text: str) -> None:
    assert find_points(text, SIZE) == (Point("nose", 1000, 250), Point("", 0, 500))
    assert find_boxes(text, SIZE) == ()


def test_several_boxes_of_one_name() -> None:
    text = "<ref>cup</ref><box>(0,0),(10,10)</box><box>(20,20),(30,30)</box>, <box>(40,40),(50,50)</box>"
    assert [box.label for box in find_boxes(text, SIZE)] == ["cup", "cup", ""]
    both = find_boxes('{"bbox_2d": [[0, 0, 10, 10], [20, 20, 30, 30]], "label": "cup"}', SIZE)
    assert both == (Box("cup", 0, 0, 20, 5), Box("cup", 40, 10, 60, 15))


def test_an_object_may_hold_a_box_and_a_point_and_text_that_was_read() -> None:
    text = '{"bbox_2d": [0, 0, 10, 10], "point_2d": [5, 5], "text_content": "a \\"}{\\" b"}'
    assert find_boxes(text, SIZE) == (Box('a "}{" b', 0, 0, 20, 5),)
    assert find_points(text, SIZE) == (Point('a "}{" b', 10, 2.5),)


def test_numbers_outside_are_brought_to_the_edge_and_corners_are_ordered() -> None:
    (box,) = find_boxes('{"bbox_2d": [1200, 900, -50, 100]}', SIZE)
    assert box == Box("", 0, 50, 2000, 450)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no boxes here, only [1, 2, 3, 4] and (5,6),(7,8)",
        '{"bbox_2d": [1, 2, 3], "label": "three"}',
        '{"bbox_2d": [1, 2, 3, "4"]}',
        '{"bbox_2d": [1, 2, 3, true]}',
        '{"bbox_2d": [1, 2, 3, NaN]}',
        '{"bbox_2d": [1, 2, 3, Infinity]}',
        '{"bbox_2d": [1, 2, 3, ' + "9" * 400 + "]}",
        '{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}",
        '{"bbox_2d": ' + "[" * 100_000 + "}",
        '{"bbox_2d": {"x": 1}}',
        '{"bbox_2d": null, "label": 5}',
        '{"bbox_2d": []}',
        "<|box_start|>(1,2),(3<|box_end|>",
        "<box>(1,2),(3,4),(5,6)</box>",
    ],
)
def test_what_is_no_box_is_passed_over(text: str) -> None:
    assert find_boxes(text, SIZE) == find_points(text, SIZE) == ()


def test_a_label_that_is_no_text_is_empty() -> None:
    assert find_boxes('{"bbox_2d": [0, 0, 1000, 1000], "label": ["a"]}', SIZE) == (Box("", 0, 0, 2000, 500),)


@pytest.mark.parametrize(
    "piece", ['{\\"', '{"', "{", '{"a":', '"{', "<ref>", "<box>(1,", '{""', '{"\\', "<ref>a</ref>"]
)
def test_a_long_text_of_beginnings_is_read(piece: str) -> None:
    # A search that reads on to the end from each of them takes an hour.
    assert find_boxes(CAT_JSON + piece * 30_000, SIZE) == (CAT,)


sides = st.integers(1, 20_000)


@given(width=sides, height=sides, data=st.data())
def test_boxes_in_pixels_come_back_within_half_a_unit(width: int, height: int, data: st.DataObject) -> None:
    x1, x2 = sorted(data.draw(st.floats(0, width)) for _ in range(2))
    y1, y2 = sorted(data.draw(st.floats(0, height)) for _ in range(2))
    label = data.draw(st.text(max_size=200))
    units = [round(x1 * 1000 / width), round(y1 * 1000 / height), round(x2 * 1000 / width), round(y2 * 1000 / height)]
    text = json.dumps([{"bbox_2d": units, "label": label}], ensure_ascii=data.draw(st.booleans()))
    (box,) = find_boxes(text, (width, height))
    assert box.label == label
    for found, given_, side in ((box.x1, x1, width), (box.x2, x2, width), (box.y1, y1, height), (box.y2, y2, height)):
        assert abs(found - given_) <= 0.5001 * side / 1000
    assert 0 <= box.x1 <= box.x2 <= width and 0 <= box.y1 <= box.y2 <= height


pieces = st.sampled_from(
    [
        *(CAT_JSON, '{"point_2d": [1, 2]}', "{", "}", "[", "]", '"', "\\", ",", "bbox_2d", ":", "1e999", "-", "0"),
        *("<ref>", "</ref>", "<box>", "(1,2)", "</box>", "<|box_start|>", "<|box_end|>", "null", "\ud800", "\x00"),
    ]
)


@given(st.lists(pieces | st.text(max_size=8), max_size=30).map("".join))
@settings(max_examples=300)
def test_no_text_raises_and_every_shape_lies_inside(text: str) -> None:
    for box in find_boxes(text, SIZE):
        assert 0 <= box.x1 <= box.x2 <= SIZE[0] and 0 <= box.y1 <= box.y2 <= SIZE[1]
    for point in find_points(text, SIZE):
        assert 0 <= point.x <= SIZE[0] and 0 <= point.y <= SIZE[1]


@given(st.integers(0, 400), st.integers(1, 10))
def test_a_list_that_is_cut_off_gives_its_whole_items(cut: int, count: int) -> None:
    items = [f'{{"bbox_2d": [{i}, {i}, {i + 1}, {i + 1}], "label": "{i}"}}' for i in range(count)]
    text = ("[" + ", ".join(items) + "]")[:cut]
    whole = [str(i) for i in range(count) if len("[" + ", ".join(items[: i + 1])) <= cut]
    assert [box.label for box in find_boxes(text, SIZE)] == whole


@pytest.mark.parametrize("size", [(0, 5), (5,), (5, 5.5), (True, 5), None, "ab", 7, (-1, 5), (1, 2, 3)])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    for find in (find_boxes, find_points):
        with pytest.raises(UsageError, match="width and height in pixels"):
            find("", size)  # type: ignore[operator]
