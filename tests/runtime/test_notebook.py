"""What a notebook shows of a model, an answer and a report of `verify`."""

from __future__ import annotations

import base64
import gc
import io
import pickle
import re
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3vl_export.parity.report import Check, Report
from runtime.answer import Generation
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.picture_source import PictureSource
from runtime.tools.call import ToolCall

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>'
SAID = '[{"bbox_2d": [100, 250, 500, 1000], "label": "LABEL"}, {"point_2d": [500, 500], "label": "lid"}]'


class Tags(HTMLParser):
    """The elements of a text, with their attributes, and all of its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (200, 100), (250, 10, 10)).save(path)
    return path


def asked(model: Qwen3VLModel, source: object, text: str = SAID) -> Generation:
    return replace(model.generate(user_message("Where?", [source], []), max_new_tokens=1), text=text)


def test_an_answer_is_shown_on_its_image(model: Qwen3VLModel, picture: Path) -> None:
    shown = Tags(asked(model, str(picture))._repr_html_())
    (svg,), (box,), (point,), (image,) = (shown.of(tag) for tag in ("svg", "rect", "circle", "image"))
    assert svg["viewbox"] == "0 0 200 100"
    assert [box[name] for name in ("x", "y", "width", "height")] == ["20.0", "25.0", "80.0", "75.0"]
    assert (point["cx"], point["cy"]) == ("100.0", "50.0")
    head, data = str(image["href"]).split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert found.size == (200, 100) and np.abs(np.asarray(found)[50, 50].astype(int) - (250, 10, 10)).max() < 8
    assert SAID in shown.words and "1 tokens, eos" in shown.words


def test_large_images_are_made_small(model: Qwen3VLModel) -> None:
    large = Image.effect_noise((2000, 1000), 90).convert("RGB")
    text = asked(model, large)._repr_html_()
    assert len(text) < 400_000
    (image,) = Tags(text).of("image")
    with Image.open(io.BytesIO(base64.b64decode(str(image["href"]).split(",")[1]))) as found:
        assert found.size == (640, 320)
    assert Tags(text).of("svg")[0]["width"] == "640"


@pytest.mark.parametrize("where", ["text", "label", "reasoning", "call", "choice"])
def test_an_answer_cannot_bring_elements(model: Qwen3VLModel, picture: Path, where: str) -> None:
    answer = asked(model, str(picture))
    call = ToolCall("call_0", HOSTILE, {}, HOSTILE, HOSTILE)
    label = SAID.replace("LABEL", HOSTILE.replace('"', "'"))
    changed = {
        "text": {"text": HOSTILE},
        "label": {"text": label},
        "reasoning": {"reasoning": HOSTILE},
        "call": {"tool_calls": (call,)},
        "choice": {"choices": (replace(answer, text=HOSTILE),) * 2},
    }[where]
    shown = Tags(replace(answer, **changed)._repr_html_())
    assert "alert" in shown.words and not shown.of("script") and not shown.of("img")
    assert not any(name.startswith("on") for _, attributes in shown.found for name in attributes)


def test_an_image_that_is_gone_is_a_frame(model: Qwen3VLModel, picture: Path) -> None:
    answer = asked(model, str(picture))
    picture.unlink()
    shown = Tags(answer._repr_html_())
    assert not shown.of("image") and len(shown.of("rect")) == 2 and "picture.png" in shown.words
    Image.new("RGB", (40, 100)).save(picture)
    assert "it has changed since" in answer._repr_html_()
    assert "svg" not in replace(answer, text="none", sources=())._repr_html_()


def test_an_answer_does_not_keep_pixels(model: Qwen3VLModel, picture: Path) -> None:
    held = Image.open(picture).convert("RGB")
    answer, there = asked(model, held), weakref.ref(held)
    assert "<image" in answer._repr_html_()
    del held
    gc.collect()
    assert there() is None and "it is not kept with the answer" in answer._repr_html_()
    assert "it is not kept" in asked(model, picture.read_bytes())._repr_html_()


def test_sources_in_a_pickle(picture: Path) -> None:
    for source in (picture, f"file://{picture}"):
        again = pickle.loads(pickle.dumps(PictureSource(source)))
        np.testing.assert_array_equal(again.load(), PictureSource(str(picture)).load())
    array = np.zeros((4, 5, 3), np.uint8)
    assert PictureSource(array).load() is not None
    assert pickle.loads(pickle.dumps(PictureSource(array))).load() is None
    for other in (b"bytes", "data:image/png;base64,AAAA", 7, None):
        assert PictureSource(other).load() is None


def test_lines_of_a_prompt(model: Qwen3VLModel, picture: Path, demo_engine: Path) -> None:
    answer = asked(model, str(picture), "a\nb\x1b[31m" + "c" * 1000)
    assert re.fullmatch(r"Generation\('a\\nb\\x1b\[31mc+ \[…\] c+', finish_reason='eos', tokens=1\)", repr(answer))
    assert repr(replace(answer, text="7", reasoning="so", choices=(answer, answer))) == (
        "Generation('7', finish_reason='eos', tokens=1, reasoning=2, choices=2)"
    )
    table = Tags(model._repr_html_())
    assert len(table.of("tr")) == 8 and str(demo_engine) in table.words and "ort-cpu-fp32" in table.words


def test_a_report() -> None:
    checks = (Check(HOSTILE, "keys", 2.0, 1.0, layer=3), Check("text", "values", 0.5, 1.0, layer=1))
    report = Report("target", HOSTILE, "fp32", checks, (HOSTILE,), reference="judge")
    assert repr(report).startswith("Report('target against <script>") and repr(report).endswith(", checks=2)")
    shown = Tags(report._repr_html_())
    assert not shown.of("script") and len(shown.of("tr")) == 3 and shown.words.count(HOSTILE) == 3
    assert "FAILED" in shown.words and "keys of layer 3" in shown.words and "values of layer 1 (worst)" in shown.words
