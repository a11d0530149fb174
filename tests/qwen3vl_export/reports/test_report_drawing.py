"""Drawings of rows on an axis: where marks are, and what they say."""

from __future__ import annotations

import pytest

from qwen3vl_export.reports.drawing import Axis, Bar, Interval, Samples, Segment, drawing, legend


def show(value: float) -> str:
    return f"{value:g} u"


def test_an_axis_in_percent() -> None:
    axis = Axis(10.0, 30.0, show)
    assert [axis.at(10.0), axis.at(15.0), axis.at(30.0)] == ["0.000%", "25.000%", "100.000%"]
    assert axis.width(15.0, 20.0) == "25.000%" and axis.width(20.0, 15.0) == "0.000%"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 100.0, [0, 50, 100]),
        (0.0, 40.0, [0, 10, 20, 30, 40]),
        (0.0, 0.003, [0, 0.001, 0.002, 0.003]),
        (9.9, 10.2, [9.9, 10, 10.1, 10.2]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high, show).ticks == pytest.approx(ticks)


@pytest.mark.parametrize("values", [[5.0], [0.0], [-3.0, -3.0]])
def test_one_value_has_an_axis_too(values: list[float]) -> None:
    axis = Axis.of(values, show)
    assert axis.at(values[0]) == "50.000%" and axis.ticks


def test_margins() -> None:
    axis = Axis.of([10.0, 20.0], show)
    assert (axis.low, axis.high) == (9.5, 20.5)
    axis = Axis.of([10.0, 20.0], show, from_zero=True)
    assert (axis.low, axis.high) == (0.0, 20.0)
    assert Axis.of([0.0], show, from_zero=True).high > 0


def test_each_value_is_a_dot() -> None:
    svg = drawing([Samples("a", [10.0, 11.0, 12.0, 13.0, 20.0])], Axis(10.0, 20.0, show), "of a")[0]
    dots = list(svg.iter("circle"))
    assert [dot.get("cx") for dot in dots] == ["0.000%", "10.000%", "20.000%", "30.000%", "100.000%"]
    assert dots[4][0].text == "repetition 5: 20 u" and len({dot.get("cy") for dot in dots[:4]}) == 4
    (box,) = svg.iter("rect")
    assert (box.get("x"), box.get("width")) == ("10.000%", "20.000%")
    assert box[0].text == "median 12 u, quartiles 11 u to 13 u"
    assert svg.get("role") == "img" and svg.get("aria-label") == "of a"


def test_of_very_many_values_some_are_dots() -> None:
    svg = drawing([Samples("a", [float(each) for each in range(1000)])], Axis(0, 1000, show), "")[0]
    assert len(list(svg.iter("circle"))) == 200


def test_segments_ticks_and_the_words_of_rows() -> None:
    rows = [Bar("first", [Segment("x", 0, 1, 0), Segment("y", 1, 4, 1)], ticks=[2.0]), Bar("second", [])]
    svg = drawing(rows, Axis(0, 4, show), "")[0]
    assert [(bar.get("x"), bar.get("width")) for bar in svg.iter("rect")] == [
        ("0.000%", "25.000%"),
        ("25.000%", "75.000%"),
    ]
    assert [bar[0].text for bar in svg.iter("rect")] == ["x: 1 u", "y: 3 u"]
    assert [line.get("x1") for line in svg.iter("line") if line.get("class") == "tick"] == ["50.000%"]
    assert [each.text for each in svg.iter("div")] == ["first", "second"]
    assert [group.get("transform") for group in svg.iter("g")] == ["translate(0 0)", "translate(0 46)"]


def test_intervals_and_a_line_through_all_rows() -> None:
    rows = [Interval("a", 2.0, 1.0, 4.0), Interval("b", 3.0, None, None, series=7)]
    svg = drawing(rows, Axis(0, 4, show), "", mark=1.0)[0]
    assert [dot.get("cx") for dot in svg.iter("circle")] == ["50.000%", "75.000%"]
    first, second = svg.iter("g")
    assert [(line.get("x1"), line.get("x2")) for line in first.iter("line")] == [
        *(("25.000%", "100.000%"), ("25.000%", "25.000%"), ("100.000%", "100.000%"))
    ]
    assert list(second.iter("line")) == [] and second.get("class") == "series-1"
    assert [line.get("x1") for line in svg.iter("line") if line.get("class") == "reference"] == ["25.000%"]


def test_what_colours_stand_for() -> None:
    assert [(item.get("class"), item[1].text) for item in legend(["a", "b"])] == [("series-0", "a"), ("series-1", "b")]
