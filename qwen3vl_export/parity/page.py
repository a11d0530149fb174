"""A comparison as a page: the verdict, where errors are by layer and kind of token, the worst tokens, the pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from qwen3vl_export.parity.details import CaseDetails, ErrorRow, Kind, Picture, WorstToken
from qwen3vl_export.parity.report import HEADERS, Check, Report
from qwen3vl_export.reports.elements import element
from qwen3vl_export.reports.environment import Environment
from qwen3vl_export.reports.page import Card, Cell, Page, Section, Tone, facts, figure, folded, grid, paragraph, table

_MOST_TOKENS = 16
_MOST_PICTURE_BYTES = 1_200_000
"""Of JPEG files; in the page they take a third more."""
_MAGNIFIED = 2
"""At most so many pixels of the screen for one of a picture."""
_MOST_OPACITY = 0.5
"""Of an error's colour over a picture, which stays to be seen."""
_DECADES = 2
"""How far below its limit an error gets no colour, in powers of ten."""
_NO_VERDICT = "Two different prompts: nothing after their inputs could be compared."


def page_of(report: Report, details: Sequence[CaseDetails], environment: Environment) -> Page:
    """Return the page.

    Args:
        report: What was compared.
        details: What was seen of each case.
        environment: What it was compared on.
    """
    failed = [check for check in report.checks if not check.passed]
    sections = [
        *([Section("Where it departs", list(_departure(report, failed)))] if failed else []),
        Section("Errors by layer and kind of token", list(_heat_maps(details))),
        Section("Worst tokens", list(_worst_tokens(details))),
        Section("What the vision tower saw", list(_pictures(details))),
        Section("All comparisons", list(_checks(report))),
        Section("Environment", [facts([("reference", report.reference), *environment.rows()])]),
    ]
    tone = Tone.GOOD if report.passed else Tone.BAD
    return Page(f"Accuracy of {report.target}", _lead(report, failed), list(_cards(report, failed)), sections, tone)


def _lead(report: Report, failed: Sequence[Check]) -> str:
    judged = sum(check.limit is not None for check in report.checks)
    compared = f"{report.verdict}. It was compared with {report.reference}, on {_num_cases(report)} prompts"
    if not failed:
        return f"{compared}; all {judged} comparisons are within the tolerances of {report.precision}."
    first = failed[0]
    return (
        f"{compared}; {len(failed)} of {judged} comparisons exceed the tolerances of {report.precision}, first the "
        f"{first.title} of the prompt “{first.case}”: {_limited(first)}."
    )


def _num_cases(report: Report) -> int:
    return len({check.case for check in report.checks})


def _limited(check: Check) -> str:
    """Return a value beside its limit."""
    _, _, value, limit, _, _ = check.row
    return f"{value}, limit {limit}"


def _cards(report: Report, failed: Sequence[Check]) -> Iterator[Card]:
    judged = sum(check.limit is not None for check in report.checks)
    tone = Tone.BAD if failed else Tone.GOOD
    yield Card("Comparisons within tolerance", f"{judged - len(failed)} of {judged}", tone=tone)
    for label, names in (
        ("Largest error of a layer", ("keys", "values")),
        ("Largest error of logits", ("prompt logits", "greedy logits")),
        ("Least share of equal tokens", ("prompt tokens agree", "greedy tokens agree", "answer agrees")),
    ):
        found = [check for check in report.checks if check.name in names]
        if found:
            worst = min(found, key=_excess_key)
            yield Card(label, worst.row[2], f"{worst.row[3]}; {worst.title}, {worst.case}", _tone(worst))


def _excess_key(check: Check) -> float:
    """Return a key that is least for the worst check of one kind."""
    value = check.value if check.is_minimum else -check.value
    return -math.inf if math.isnan(value) else value


def _tone(check: Check) -> Tone:
    return Tone.GOOD if check.passed else Tone.BAD


def _departure(report: Report, failed: Sequence[Check]) -> Iterator[Element]:
    """Yield the first failed comparison of each prompt: what follows is often its consequence."""
    yield paragraph("The first comparison of each prompt that exceeds its limit, in the order of computation.")
    firsts: dict[str, Check] = {}
    for check in failed:
        firsts.setdefault(check.case, check)
    rows = [
        [check.case, Cell(check.title, Tone.BAD), check.row[2], check.row[3], check.row[5]] for check in firsts.values()
    ]
    headers = [*HEADERS[:4], HEADERS[5]]
    yield table(headers, rows, caption=f"First departures from {report.reference}", numbers=HEADERS[2:3])


def _heat_maps(details: Sequence[CaseDetails]) -> Iterator[Element]:
    compared = [each for each in details if each.rows]
    if not compared:
        yield paragraph(_NO_VERDICT)
        return
    yield paragraph(
        "Relative errors: the norm of the difference over the norm of the reference, of logits the largest difference "
        "over max(1, their standard deviation). A darker ground is nearer to the limit, none is a hundredth of it or "
        "less. An error beyond the limit is bold: the limits hold for the whole tensor of a prompt, so an error of one "
        "kind of token may exceed it where the tensor does not."
    )
    yield _heat_map(list(_largest(compared)), "The largest of all prompts")
    for each in compared:
        said = ", ".join(f"{count} {kind}" for kind, count in each.counts.items())
        yield folded(f"{each.case}: {said}", _heat_map([(row, each.case) for row in each.rows], each.case))
    if left := [each.case for each in details if not each.rows]:
        yield paragraph(f"Not compared, since their prompts are others than the reference's: {', '.join(left)}.")


def _largest(details: Sequence[CaseDetails]) -> Iterator[tuple[ErrorRow, str]]:
    """Yield the rows of all cases in order, with the largest value of each kind, and the case of the largest."""
    longest = max((each.rows for each in details), key=len)
    for name in (row.name for row in longest):
        rows = [(row, each.case) for each in details for row in each.rows if row.name == name]
        values: dict[Kind, float] = {}
        for row, _ in rows:
            for kind, value in row.values.items():
                values[kind] = max(value, values.get(kind, 0.0))
        _, case = max(rows, key=lambda pair: max(pair[0].values.values()))
        yield ErrorRow(name, rows[0][0].limit, values), case


def _heat_map(rows: Sequence[tuple[ErrorRow, str]], caption: str) -> Element:
    kinds = [kind for kind in Kind if any(kind in row.values for row, _ in rows)]
    cells = [[row.name, *(_heat(row, kind, case) for kind in kinds), f"{row.limit:g}"] for row, case in rows]
    return table(["tensor", *kinds, "limit"], cells, caption=caption, numbers=[*kinds, "limit"])


def _heat(row: ErrorRow, kind: Kind, case: str) -> Cell | str:
    value = row.values.get(kind)
    if value is None:
        return ""
    title = f"{row.name}, {kind}: {value:.4g}, {value / row.limit:.3g} of the limit; largest in “{case}”"
    text = element("b" if value > row.limit else "span", _number(value), title=title)
    return Cell(text, heat=_share(value, row.limit))


def _share(value: float, limit: float) -> float:
    """Return how much of the colour an error gets."""
    if value <= 0:
        return 0.0
    return 1.0 if not math.isfinite(value) else min(1.0, max(0.0, 1 + math.log10(value / limit) / _DECADES))


def _number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "not finite"


def _worst_tokens(details: Sequence[CaseDetails]) -> Iterator[Element]:
    found = [(each.case, token) for each in details for token in each.worst]
    if not found:
        yield paragraph(_NO_VERDICT)
        return
    yield paragraph(
        "Tokens after which the logits differ most; those where the engine prefers another next token than the "
        "reference, near-ties aside, come first. Logits stand in brackets."
    )
    found.sort(key=lambda pair: (not pair[1].is_other, -pair[1].max_abs))
    headers = ["prompt", "position", "token", "logits differ by", "KL, nats", "reference", "engine"]
    rows = [_token_row(case, token) for case, token in found[:_MOST_TOKENS]]
    others = sum(token.is_other for _, token in found[:_MOST_TOKENS])
    caption = f"{len(rows)} tokens of all prompts; after {others} of them, near-ties aside, the engine prefers another"
    yield table(headers, rows, caption=caption, numbers=("position", "logits differ by", "KL, nats"))


def _token_row(case: str, token: WorstToken) -> list[Cell | str | Element]:
    words = element(
        "code", _visible(token.before), element("mark", _visible(token.text)), _visible(token.after), class_="context"
    )
    expected, found = (_likely(each) for each in (token.expected, token.found))
    tone = Tone.BAD if token.is_other else Tone.PLAIN
    numbers = [_number(token.max_abs), _number(token.kl)]
    return [case, str(token.position), words, *numbers, expected, Cell(found, tone)]


def _visible(text: str) -> str:
    """Return text in which line breaks are seen."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def _likely(tokens: Sequence[tuple[str, float]]) -> Element:
    if not tokens:
        return element("span", "not finite")
    items = (element("li", element("code", _visible(text)), f" ({logit:.3f})") for text, logit in tokens)
    return element("ol", *items)


def _pictures(details: Sequence[CaseDetails]) -> Iterator[Element]:
    """Yield each picture once, with the largest errors of all prompts that show it."""
    found: dict[bytes, tuple[Picture, list[str], float]] = {}
    for each in details:
        for picture in each.pictures:
            name = f"{each.case}: {picture.name}"
            if picture.digest in found:
                known, names, limit = found[picture.digest]
                worse = max((known, picture), key=lambda one: max(one.errors, default=-1.0))
                found[picture.digest] = worse, [*names, name], limit
            else:
                found[picture.digest] = picture, [name], each.visual_limit
    yield paragraph(
        "Resized as the model gets them; of a video, the first frame of each temporal patch. A square is a visual "
        "token, and darker the nearer its error, over all levels, is to the limit. Each tells its error on hovering."
    )
    shown, num_bytes = [], 0
    for picture, names, limit in found.values():
        num_bytes += len(picture.jpeg)
        if num_bytes > _MOST_PICTURE_BYTES:
            break
        shown.append(_figure(picture, names, limit))
    yield grid(*shown)
    if len(shown) < len(found):
        yield paragraph(f"{len(found) - len(shown)} pictures more are left out, so that the page stays small.")


def _figure(picture: Picture, names: Sequence[str], limit: float) -> Element:
    width, height = picture.size
    source = f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"
    parts = [element("image", href=source, width=width, height=height)]
    num_rows, num_columns = picture.grid
    high, wide = height / num_rows, width / num_columns
    for index in range(num_rows * num_columns):
        row, column = divmod(index, num_columns)
        title, share = f"row {row + 1}, column {column + 1}", 0.0
        if picture.errors:
            title += f": {_number(picture.errors[index])}"
            share = _share(picture.errors[index], limit)
        square = element("rect", element("title", title), x=wide * column, y=high * row, width=wide, height=high)
        square.attrib["fill-opacity"] = f"{_MOST_OPACITY * share:.2f}"
        parts.append(square)
    label = f"{names[0]}, with the error of each visual token"
    seen = element("svg", *parts, role="img", aria_label=label, viewBox=f"0 0 {width} {height}", class_="seen")
    seen.attrib["style"] = f"max-width: {_MAGNIFIED * width}px"
    caption = f"{width} x {height} pixels, {num_rows} x {num_columns} tokens"
    if picture.errors:
        caption += f", largest error {_number(max(picture.errors))} (limit {limit:g})"
    return figure(seen, f"{'; '.join(names)}. {caption}.")


def _checks(report: Report) -> Iterator[Element]:
    yield from map(paragraph, report.remarks)
    rows: list[list[Cell | str]] = [
        [*check.row[:4], Cell(check.row[4], _tone(check) if check.limit is not None else Tone.PLAIN), check.row[5]]
        for check in report.shown()
    ]
    headers = [header or "verdict" for header in HEADERS]
    caption = "Of the layers within their limits only the worst; “more” has further measures."
    yield folded(f"{len(rows)} rows", table(headers, rows, caption=caption, numbers=HEADERS[2:3]))
