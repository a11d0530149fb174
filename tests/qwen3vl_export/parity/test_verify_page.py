"""The page of `verify --html`: what it says of right and of broken engines, its size, how a browser takes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import command_line
from helpers.browser import axe_script, opened_browser, opened_page
from qwen3vl_export.cli.run import app
from qwen3vl_export.parity.details import CaseDetails, Compared, ErrorRow, Kind, Picture, WorstToken, details_of
from qwen3vl_export.parity.page import page_of
from qwen3vl_export.parity.report import Check, Report
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.reports.environment import Environment
from qwen3vl_export.reports.page import MAX_BYTES, Page, Tone
from runtime.errors import ParityError, UsageError
from runtime.model import Qwen3VLModel

HOSTILE = "<script>alert(1)</script>"
STEPS = 3
LIMITS = {
    "visual_embeds_relative": 1e-4,
    "cache_relative": 1e-4,
    "logits_scaled": 1e-3,
    "near_tie_gap": 1e-3,
}
ENVIRONMENT = Environment("Abacus", ("avx2",), "avx2", 2, None, 10**9, (), "Linux 1", {"python": "3"}, 0.5)


@dataclass
class Parsed(HTMLParser):
    """What a file asks for, and its tables as texts, by caption."""

    addresses: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._rows: list[list[str]] = []
        self._caption: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag == "table":
            self._rows, self._caption = [], None
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption or ""], self._rows = self._rows, []

    def handle_data(self, data: str) -> None:
        if self.lasttag == "caption" and self._caption is None:
            self._caption = data
        elif self._rows and self._rows[-1]:
            self._rows[-1][-1] += data

    @classmethod
    def of(cls, text: str) -> Parsed:
        parsed = cls()
        parsed.feed(text)
        return parsed

    def heat(self, caption: str) -> dict[str, dict[str, float]]:
        """Return the numbers of a heat map: of each tensor, by kind."""
        head, *rows = self.tables[caption]
        return {
            row[0]: {name: float(cell) for name, cell in zip(head[1:], row[1:], strict=True) if cell} for row in rows
        }


def compared(engine: Path, checkpoint: Path) -> tuple[Report, list[CaseDetails]]:
    details: list[CaseDetails] = []
    report = verify(engine, str(checkpoint), max_new_tokens=STEPS, reference="own", on_details=details.append)
    return report, details


@pytest.fixture(scope="module")
def right(tiny_engine: Path, tiny_checkpoint: Path) -> tuple[Report, list[CaseDetails]]:
    return compared(tiny_engine, tiny_checkpoint)


def test_what_is_seen_of_each_prompt(right: tuple[Report, list[CaseDetails]], tiny_engine: Path) -> None:
    report, details = right
    model = Qwen3VLModel.from_engine(tiny_engine)
    num_layers, levels = model.config.text.num_layers, len(model.config.vision.deepstack_layers)
    assert [each.case for each in details] == list(dict.fromkeys(check.case for check in report.checks))
    kinds = [set(each.counts) - {Kind.TEXT, Kind.ANSWER} for each in details]
    assert kinds == [set(), {Kind.IMAGE}, {Kind.IMAGE}, {Kind.IMAGE}, {Kind.VIDEO}, {Kind.IMAGE, Kind.VIDEO}]
    for each, seen in zip(details, kinds, strict=True):
        assert each.counts[Kind.ANSWER] == STEPS
        assert len(each.rows) == (levels + 1 if seen else 0) + 2 * num_layers + 1
        for row in each.rows:
            assert set(row.values) == (seen if "vision" in row.name else seen | {Kind.TEXT, Kind.ANSWER})
            assert max(row.values.values()) < row.limit
        assert sum(len(picture.errors) for picture in each.pictures) == sum(each.counts[kind] for kind in seen)
        assert all(math.prod(picture.grid) == len(picture.errors) for picture in each.pictures)
        gaps = [(not token.is_other, -token.max_abs) for token in each.worst]
        assert gaps == sorted(gaps) and not any(token.is_other for token in each.worst)
        assert all(token.expected[0][0] == token.found[0][0] for token in each.worst)
    (picture,) = details[1].pictures
    with Image.open(BytesIO(picture.jpeg)) as image:
        assert image.size == picture.size == tuple(32 * tokens for tokens in reversed(picture.grid))


def test_the_page_of_a_right_engine(right: tuple[Report, list[CaseDetails]]) -> None:
    report, details = right
    page = page_of(report, details, ENVIRONMENT)
    assert page.tone is Tone.GOOD and "passed" in page.lead and report.reference in page.lead
    assert [each.title for each in page.sections] == [
        *("Errors by layer and kind of token", "Worst tokens", "What the vision tower saw"),
        *("All comparisons", "Environment"),
    ]
    parsed = Parsed.of(page.render())
    assert {address.partition(",")[0] for address in parsed.addresses} == {"data:", "data:image/jpeg;base64"}
    assert "script" not in parsed.tags
    # Three images and 3 + 6 temporal patches of two videos, each once, though four prompts show them.
    assert parsed.tags.count("image") == len({each.digest for one in details for each in one.pictures}) == 9
    heat = parsed.heat("The largest of all prompts")
    for row in details[-1].rows:
        for kind, value in row.values.items():
            assert heat[row.name][kind] >= float(f"{value:.2g}") * 0.99
    assert heat["logits"]["limit"] == 1e-3


def test_the_page_shows_where_an_engine_departs(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Qwen3VLModel.encode_images

    def without_deepstack(model: Qwen3VLModel, images: Any) -> Any:
        embeds = original(model, images).copy()
        embeds[1:] = 0
        return embeds

    monkeypatch.setattr(Qwen3VLModel, "encode_images", without_deepstack)
    report, details = compared(tiny_engine, tiny_checkpoint)
    page = page_of(report, details, ENVIRONMENT)
    assert page.tone is Tone.BAD and "FAILED" in page.lead
    assert "first the visual_embeds level 1 of the prompt “one image”: 1, limit ≤ 0.0001." in page.lead
    parsed = Parsed.of(page.render())
    firsts = [(row[0], row[1]) for row in parsed.tables[f"First departures from {report.reference}"][1:]]
    assert firsts == [(each.case, "visual_embeds level 1") for each in details if each.pictures]
    heat = parsed.heat("The largest of all prompts")
    assert heat["vision, DeepStack 1"][Kind.IMAGE] == heat["vision, DeepStack 1"][Kind.VIDEO] == 1
    assert heat["vision, embeddings"][Kind.IMAGE] < 1e-4
    assert max(heat["layer 0, keys"].values()) <= 1e-4 < min(heat["layer 1, keys"][kind] for kind in ("image", "video"))
    assert max(each for picture in details[1].pictures for each in picture.errors) > 1e-4


class Segmentless:
    """A prompt of a text alone."""

    inputs = ()

    class prompt:
        input_ids = (1, 2, 3)
        spans = ()


class Letters:
    def token_bytes(self, token_id: int) -> bytes:
        return b"abcdefgh"[token_id : token_id + 1]


def seen_of(found: np.ndarray, expected: np.ndarray, tokens: Sequence[int] = (4,)) -> CaseDetails:
    layer = np.ones((1, 1, len(expected), 2), np.float32)
    both = Compared(None, ([(layer, 2 * layer)], [(layer, layer)]), (found, expected), tokens)
    return details_of("text", Segmentless(), both, LIMITS, tokenizer=Letters(), settings=None)  # type: ignore[arg-type]


def test_worst_tokens_of_known_logits() -> None:
    expected = np.zeros((3, 4), np.float32)
    expected[:, 1] = 5
    found = expected.copy()
    found[0, 2] += 0.5  # differs, same choice
    found[1, 3] = 6  # another choice
    seen = seen_of(found, expected)
    assert [(token.position, token.is_other) for token in seen.worst] == [(1, True), (0, False), (2, False)]
    worst = seen.worst[0]
    assert (worst.before, worst.text, worst.after, worst.max_abs) == ("b", "c", "de", 6.0)
    assert worst.expected[0] == ("b", 5.0) and worst.found[:2] == (("d", 6.0), ("b", 5.0))
    shifted = np.exp(expected[1] - 6), np.exp(found[1] - 6)
    p, q = (each / each.sum() for each in shifted)
    assert worst.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
    assert [row.name for row in seen.rows] == ["layer 0, keys", "layer 0, values", "logits"]
    assert seen.rows[0].values == {Kind.TEXT: 0.0} and seen.rows[1].values == {Kind.TEXT: 1.0}
    scale = float(np.std(expected))
    assert seen.rows[2].values == {Kind.TEXT: pytest.approx(6 / scale)}


def test_values_that_are_not_finite() -> None:
    expected = np.zeros((3, 4), np.float32)
    found = expected.copy()
    found[2] = np.nan
    seen = seen_of(found, expected)
    assert seen.worst[0].position == 2 and seen.worst[0].is_other and seen.worst[0].found == ()
    assert (seen.worst[0].max_abs, seen.rows[2].values[Kind.TEXT]) == (math.inf, math.inf)
    checks = (Check("text", "prompt logits", math.inf, 1e-3),)
    text = page_of(Report("t", "c", "fp32", checks, reference="r"), [seen], ENVIRONMENT).render()
    assert text.count("not finite") >= 4 and "first the prompt logits of the prompt “text”: inf, limit ≤ 0.001" in text


def test_other_prompts_than_the_references() -> None:
    seen = CaseDetails("video", {Kind.TEXT: 3}, (), (), (), 1e-4)
    checks = (Check("video", "token ids differ from processor", 1, 0),)
    text = page_of(Report("t", "c", "fp32", checks, reference="r"), [seen], ENVIRONMENT).render()
    assert text.count("Two different prompts") == 2 and "token ids differ from processor" in text


def largest_page() -> Page:
    """Layers of the largest model, all of them failed, and pictures that take more room than there is."""
    names = [f"layer {layer}, {name}" for layer in range(94) for name in ("keys", "values")]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=88)
    details, checks = [], []
    for number in range(6):
        case = f"case {number} {HOSTILE}"
        rows = tuple(
            ErrorRow(name, 1e-4, {kind: 10.0 ** -(index % 8) for kind in Kind}) for index, name in enumerate(names)
        )
        likely = tuple((HOSTILE, 1.5) for _ in range(3))
        token = WorstToken(7, Kind.TEXT, f"before{HOSTILE}\n", HOSTILE, "\x1b[31mafter", 1.0, 0.5, likely, likely, True)
        pictures = tuple(
            Picture(HOSTILE, file.getvalue(), (256, 256), (8, 8), (1e-5,) * 64, bytes([number, index]))
            for index in range(9)
        )
        details.append(CaseDetails(case, dict.fromkeys(Kind, 9), rows, (token,) * 8, pictures, 1e-4))
        checks += [Check(case, "keys", 1.0, 1e-4, layer=layer, detail={"max_abs": 1.0}) for layer in range(2 * 94)]
    report = Report(f"target {HOSTILE}", "checkpoint", "fp32", tuple(checks), (HOSTILE,), reference="r")
    return page_of(report, details, ENVIRONMENT)


def test_the_largest_page_stays_small_and_escapes_what_it_quotes() -> None:
    text = largest_page().render()
    assert len(text.encode()) < MAX_BYTES
    assert "\x1b" not in text and "pictures more are left out" in text
    assert "script" not in Parsed.of(text).tags


def test_a_browser_reads_it(tmp_path: Path, right: tuple[Report, list[CaseDetails]]) -> None:
    report, details = right
    checks = (*report.checks, Check("text", HOSTILE, 2.0, 1.0))
    file = tmp_path / "verify.html"
    broken = Report(report.target, HOSTILE, report.precision, checks, reference=report.reference)
    page_of(broken, details, ENVIRONMENT).write(file)
    widths = "[...document.querySelectorAll('svg image')].map((each) => each.getBoundingClientRect().width)"
    with opened_browser() as browser:
        for scheme, width in (("light", 400), ("light", 1400), ("dark", 400), ("dark", 1400)):
            with opened_page(browser, file.as_uri(), color_scheme=scheme, bypass_csp=True) as opened:
                opened.set_viewport_size({"width": width, "height": 900})
                assert opened.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll"
                loaded = opened.evaluate(widths)
                assert len(loaded) == 9 and all(64 <= each <= width for each in loaded)
                if width == 400:
                    opened.evaluate(axe_script())
                    found = opened.evaluate("axe.run()")["violations"]
                    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []


def test_the_command_writes_it(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    options = ("--checkpoint", str(tiny_checkpoint), "--reference", "own", "--max-new-tokens", "2", "--html", str(file))
    code, output, said = command_line.call(app, "verify", str(tiny_engine), *options)
    assert code == 0, said
    assert output.strip().endswith("passed") and "Accuracy of ort-cpu-fp32" in file.read_text(encoding="utf-8")


def test_the_first_departure_is_that_of_the_block_that_comes_first(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the first block is in all levels; level 0 is that of the last block."""
    original = Qwen3VLModel.encode_images
    monkeypatch.setattr(Qwen3VLModel, "encode_images", lambda model, images: 2 * original(model, images))
    report, details = compared(tiny_engine, tiny_checkpoint)
    page = page_of(report, details, ENVIRONMENT)
    assert "first the visual_embeds level 1 of the prompt “one image”: 1, limit ≤ 0.0001." in page.lead


@pytest.mark.parametrize("option", ["--tasks", "--bisect", "--ranges"])
def test_other_comparisons_have_no_page(tiny_engine: Path, option: str) -> None:
    engine = () if option == "--ranges" else (str(tiny_engine),)
    code, _, said = command_line.call(app, "verify", *engine, "--checkpoint", "demo", option, "--html", "x.html")
    assert code == UsageError.exit_code and "leave --tasks, --bisect and --ranges out" in said


def test_a_page_is_named_as_one(tiny_engine: Path) -> None:
    code, _, said = command_line.call(app, "verify", str(tiny_engine), "--checkpoint", "nowhere", "--html", "x.svg")
    assert code == UsageError.exit_code and "--html 'x.svg': a page is an .html file" in said


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / "file" / "report.html")
    code, _, said = command_line.call(app, "verify", str(tiny_engine), "--checkpoint", "nowhere", "--html", file)
    assert code == UsageError.exit_code != ParityError.exit_code and "is a file" in said
