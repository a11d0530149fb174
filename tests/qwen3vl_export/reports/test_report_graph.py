"""The graph of an engine by pieces: what is counted, how it is drawn, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest

from engines.bundle import Bundle
from helpers import command_line
from helpers.browser import axe_script, opened_browser, opened_page
from helpers.engines import build
from qwen3vl_export.cli.run import app
from qwen3vl_export.reports.graph import graph_page, graph_svg, size, write_graph
from qwen3vl_export.reports.page import MAX_BYTES
from qwen3vl_export.reports.pieces import EngineGraph, check_readable, read_graph
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel

SVG = "{http://www.w3.org/2000/svg}"


def graph_of(engine: Path) -> EngineGraph:
    return read_graph(engine, Manifest.read(engine))


@pytest.fixture(scope="module")
def dense(demo_engine: Path) -> EngineGraph:
    return graph_of(demo_engine)


@pytest.fixture(scope="module")
def mixed(demo_moe_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> EngineGraph:
    return graph_of(build(demo_moe_bundle, "ort-cpu-int4", tmp_path_factory.mktemp("mixed") / "engine"))


def test_pieces_hold_all_weights_once(dense: EngineGraph, demo_engine: Path) -> None:
    model = onnx.load(demo_engine / "decoder.onnx", load_external_data=False)
    named = [each for each in model.graph.initializer if each.name.startswith("model.language_model.layers.3.mlp.")]
    expected = sum(4 * math.prod(each.dims) for each in named if each.data_type == onnx.TensorProto.FLOAT)
    (part,) = (part for part in dense.layers[-1].parts if part.name == "MLP")
    assert part.num_bytes == {"float32": expected} and part.formats == ["float32"]
    total = sum(piece.total for piece in dense.pieces)
    assert 0.98 * dense.manifest.weight_bytes < total <= dense.manifest.weight_bytes


def test_like_layers_are_one_up_to_where_levels_are_taken(dense: EngineGraph) -> None:
    model = dense.manifest.model
    assert model.vision.deepstack_layers == (1, 2) and (model.vision.depth, model.text.num_layers) == (4, 4)
    assert [piece.title for piece in dense.pieces] == [
        *("patch embedding", "blocks 0 to 1", "block 2", "block 3", "merger", "DeepStack mergers 0 to 1"),
        *("token embedding", "layers 0 to 1", "layers 2 to 3", "head, on the table of tokens"),
    ]
    assert [part.name for part in dense.layers[0].parts] == ["MLP", "attention", "norms"]
    assert dense.layers[0].total == 2 * sum(part.total for part in dense.layers[0].parts)


def test_the_cache_is_that_of_the_runtime(dense: EngineGraph, demo_engine: Path) -> None:
    with Qwen3VLModel.from_engine(demo_engine) as model:
        stats = model.generate("Hi", max_new_tokens=1).stats
    assert stats.peak_cache_bytes % dense.cache_bytes_per_token == 0
    text = dense.manifest.model.text
    assert dense.cache_bytes_per_token == 2 * 4 * text.num_layers * text.num_kv_heads * text.head_dim


def test_formats_of_experts_and_of_packed_weights(mixed: EngineGraph) -> None:
    """Of the demo's experts, those of the first layers are in 8 bits, and the table of tokens is in 4."""
    formats = [{part.name: part.formats[0] for part in piece.parts} for piece in mixed.layers]
    assert [each["experts"] for each in formats] == ["int8", "int4"]
    assert all(each["router"] == each["norms"] == "float32" for each in formats)
    assert mixed.embedding.parts[0].formats[0] == "int4" and mixed.embedding.title == "token embedding"


@pytest.mark.parametrize("which", ["dense", "mixed"])
def test_the_drawing(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    graph = request.getfixturevalue(which)
    write_graph(graph, tmp_path / "graph.svg")
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    assert root.tag == f"{SVG}svg" and (tmp_path / "graph.svg").stat().st_size < MAX_BYTES
    words = [each.text for each in root.iter(f"{SVG}text")]
    for piece in graph.pieces:
        assert words.count(piece.title) == 1
    present = {name for piece in graph.pieces for part in piece.parts for name in part.num_bytes}
    assert present <= set(words) and "other" not in words
    hidden = graph.manifest.model.text.hidden_size
    assert words.count(f"[B, S, {hidden}]") == len(graph.layers) + 1 and f"[3, V, {hidden}]" in words
    assert words.count(f"[P, {graph.manifest.model.vision.hidden_size}]") == len(graph.blocks) + 1
    boxes = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "box"]
    assert len(boxes) == len(graph.pieces) + 1
    corners = [tuple(float(each.get(name, "0")) for name in ("x", "y", "width", "height")) for each in boxes]
    for (x0, y0, w0, h0), (x1, y1, w1, h1) in itertools.combinations(corners, 2):
        assert x0 + w0 <= x1 or x1 + w1 <= x0 or y0 + h0 <= y1 or y1 + h1 <= y0, "no box lies on another"
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in corners)


def test_names_of_a_checkpoint_stay_texts(dense: EngineGraph, tmp_path: Path) -> None:
    source = {**dense.manifest.source, "name": "<script>alert(1)</script>"}
    graph = dataclasses.replace(dense, manifest=dataclasses.replace(dense.manifest, source=source))
    graph = dataclasses.replace(graph, others=("<script>.onnx",))
    assert "<script" not in graph_page(graph).render()
    assert "<script" not in ElementTree.tostring(graph_svg(graph), encoding="unicode")


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_command_draws_it(demo_engine: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"graph.{ending}"
    code, output, said = command_line.call(app, "inspect", str(demo_engine), "--graph", str(file))
    assert code == 0, said
    assert "check      passed" in output and "layers 2 to 3" in file.read_text(encoding="utf-8")


def test_what_cannot_be_drawn(demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, said = command_line.call(app, "inspect", str(demo_engine), "--graph", str(tmp_path / "graph.png"))
    assert code == UsageError.exit_code and ".svg or a .html" in said
    manifest = Manifest.read(demo_engine)
    plans = {name.replace(".onnx", ".plan"): record for name, record in manifest.files.items()}
    with pytest.raises(UsageError, match="compiled plans"):
        check_readable(dataclasses.replace(manifest, files=plans))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(UsageError, match="'onnx'"):
        check_readable(manifest)


def test_sizes() -> None:
    assert [size(each) for each in (0, 999, 1536, 13_200_000, 4_300_000_000)] == [
        *("0 B", "999 B", "1.54 kB", "13.2 MB", "4.3 GB")
    ]


def test_a_browser_reads_it(mixed: EngineGraph, tmp_path: Path) -> None:
    file = tmp_path / "graph.html"
    graph_page(mixed).write(file)
    with opened_browser() as browser:
        for scheme, width in (("light", 1400), ("dark", 400)):
            with opened_page(browser, file.as_uri(), color_scheme=scheme, bypass_csp=True) as opened:
                opened.set_viewport_size({"width": width, "height": 900})
                assert opened.evaluate("document.documentElement.scrollWidth") <= width, (
                    "the graph scrolls in its place"
                )
                assert opened.evaluate("document.querySelector('svg').getBoundingClientRect().width") >= 960
                opened.evaluate(axe_script())
                found = opened.evaluate("axe.run()")["violations"]
                assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []
