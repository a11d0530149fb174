"""The comparison: what is counted, what the drivers compute, and the tables made of a result."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import synthetic
from benchmarks.__main__ import app
from benchmarks.compare import builds, chart, comparison, sides, tables, workloads
from benchmarks.compare.driver import IMAGE_MODE, SPEED_MODE, Driver, FirstToken, measure, time_call, time_points
from benchmarks.compare.onnx_bytes import bytes_of_products
from benchmarks.compare.sides import Side
from benchmarks.compare.workloads import DECODE, PREFILL, VISION, Point, operations
from runtime.errors import UsageError

CONFIG = synthetic.hf_config("qwen3-vl-2b")


def weights_of(prefix: str) -> int:
    """Count the elements of the matrices below a key of the checkpoint."""
    shapes = synthetic.tensor_shapes(CONFIG)
    return sum(math.prod(s) for key, s in shapes.items() if key.startswith(prefix) and len(s) > 1)


def test_decode_needs_two_operations_for_each_weight_and_visible_key() -> None:
    products = weights_of("model.language_model.layers") + weights_of("model.language_model.embed_tokens")
    attention = 28 * 2 * 16 * 128  # queries with keys, probabilities with values, for each visible position
    for cached, batch in ((0, 1), (512, 1), (4096, 4)):
        expected = 2 * batch * (products + attention * (cached + 1))
        assert operations(Point(DECODE, cached, batch), CONFIG) == expected


def test_a_token_needs_the_operations_of_its_experts_and_of_the_router() -> None:
    config = synthetic.hf_config("qwen3-vl-30b-a3b", layers=4)
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    layer = attention + 2048 * 128 + 8 * 3 * 2048 * 768
    assert operations(Point(DECODE, 0), config) == 2 * (4 * (layer + 2 * 32 * 128) + 2048 * 151936)


def test_prefill_is_decode_after_decode_with_one_head() -> None:
    head = 2 * weights_of("model.language_model.embed_tokens")
    steps = sum(operations(Point(DECODE, cached), CONFIG) - head for cached in range(128))
    assert operations(Point(PREFILL, 128), CONFIG) == steps + head
    assert operations(Point(PREFILL, 128, 4), CONFIG) == 4 * (steps + head)


def test_vision_multiplies_each_patch_or_token_with_its_weights() -> None:
    patches = 784
    per_patch = weights_of("model.visual.patch_embed") + weights_of("model.visual.blocks")
    per_token = weights_of("model.visual.merger") + weights_of("model.visual.deepstack_merger_list")
    attention = 24 * 2 * patches * patches * 1024
    expected = 2 * (patches * per_patch + patches // 4 * per_token + attention)
    assert operations(Point(VISION, patches), CONFIG) == expected


def test_names_of_points_are_unique() -> None:
    assert len({point.name for point in workloads.POINTS}) == len(workloads.POINTS) == 13


@pytest.mark.parametrize(
    ("budget_s", "min_repeats", "max_repeats", "timed"), [(0.0, 3, 9, 3), (60.0, 3, 9, 9), (60.0, 1, 1, 1)]
)
def test_a_call_is_warmed_up_and_repeated(budget_s: float, min_repeats: int, max_repeats: int, timed: int) -> None:
    made: list[int] = []
    found = time_call(lambda: made.append(1), budget_s=budget_s, min_repeats=min_repeats, max_repeats=max_repeats)
    assert (len(made), len(found["all_s"])) == (timed + 1, timed)


class Recorder(Driver):
    """A driver that notes what is prepared and can do no vision."""

    libraries = ()

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def vision(self, height: int, width: int) -> None:
        self.asked.append((VISION, height, width))

    def prefill(self, batch: int, length: int) -> Any:
        self.asked.append((PREFILL, batch, length))
        return lambda: None

    def decode(self, batch: int, past: int) -> Any:
        self.asked.append((DECODE, batch, past))
        return lambda: None

    def first_token(self, image: str, prompt: str) -> FirstToken:
        raise AssertionError

    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        raise AssertionError

    def decoder_bytes(self) -> int:
        raise AssertionError

    def cache_token_bytes(self) -> float:
        raise AssertionError


def test_points_that_a_side_cannot_do_stay_out() -> None:
    driver = Recorder()
    points = [Point(VISION, 3072), Point(PREFILL, 128, 4), Point(DECODE, 512)]
    results = time_points(driver, points, budget_s=0.0, min_repeats=3, max_repeats=9)
    assert driver.asked == [(VISION, 48, 64), (PREFILL, 4, 128), (DECODE, 1, 512)]
    counts = {name: len(values["all_s"]) for name, values in results.items()}
    assert counts == {"prefill-128-b4": 1, "decode-512-b1": 3}  # several long prompts are timed once


def test_divergence_of_known_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.75], [0.1, 0.9]], np.float32)) + 3  # a constant changes no distribution
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    found = comparison.divergence(reference, other)
    assert found["mean_kl"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert found["max_kl"] == pytest.approx(second, rel=1e-5)
    assert (found["top1"], found["positions"]) == (0.0, 2)
    assert comparison.divergence(reference, reference)["mean_kl"] == 0.0


def test_bytes_of_products_are_those_of_weights_read_whole(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    weights = {
        "tied": np.zeros((10, 4), np.float32),  # looked up, and read whole by the head: 160 bytes, once
        "table": np.zeros((100, 4), np.float32),  # only looked up
        "packed": np.zeros((6, 1, 2), np.uint8),  # 12 bytes
        "scales": np.zeros(6, np.float32),  # 24 bytes
        "norm": np.zeros(4, np.float32),  # no product
    }
    nodes = [
        helper.make_node("Gather", ["tied", "ids"], ["x"]),
        helper.make_node("Gather", ["table", "ids"], ["t"]),
        helper.make_node("Add", ["x", "norm"], ["n"]),
        helper.make_node(
            "MatMulNBits", ["n", "packed", "scales"], ["q"], domain="com.microsoft", K=4, N=6, bits=4, block_size=16
        ),
        helper.make_node("Transpose", ["tied"], ["head"]),
        helper.make_node("MatMul", ["n", "head"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "q", "t")]
    graph = helper.make_graph(
        nodes, "g", [ids], outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    save(helper.make_model(graph), tmp_path / "m.onnx")
    assert bytes_of_products(tmp_path / "m.onnx") == 160 + 12 + 24


def test_of_stacked_experts_a_token_reads_those_it_goes_through(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    weights = {
        "router": np.zeros((4, 6), np.float32),  # 96 bytes, read whole
        "gate_up": np.zeros((6, 8, 2), np.uint8),  # 16 bytes an expert
        "scales": np.zeros((6, 8, 1), np.float32),  # 32 bytes an expert
    }
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node("QMoE", ["x", "logits", "gate_up", "scales"], ["y"], domain="com.microsoft", k=2),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers)), tmp_path / "m.onnx")
    assert bytes_of_products(tmp_path / "m.onnx") == 96 + 2 * (16 + 32)


def test_engine_and_pytorch_drivers_agree(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    from PIL import Image

    from benchmarks.compare.drivers import engine, torch_eager

    ours = engine.EngineDriver(tiny_engine, 2, SPEED_MODE)
    theirs = torch_eager.TorchDriver(tiny_checkpoint, 2, SPEED_MODE, "float32")
    ids = [5, 80, 33, 41, 7]
    np.testing.assert_allclose(ours.logits(ids), theirs.logits(ids), atol=2e-3)
    assert ours.decoder_bytes() == pytest.approx(theirs.decoder_bytes(), rel=0.02)  # norms are no products
    assert ours.cache_token_bytes() == theirs.cache_token_bytes()
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(image)
    first, second = (driver.first_token(str(image), "Read.") for driver in (ours, theirs))
    assert second.cache_bytes % ours.cache_token_bytes() == 0
    assert first.cache_bytes == second.cache_bytes > 0  # the token that is answered has no row


def test_driver_process_measures_speed_and_image(tiny_engine: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "image.png")
    request = {
        "driver": "engine",
        "path": str(tiny_engine),
        "options": {"huge_pages": True},
        "threads": 2,
        "budget_s": 0.0,
        "min_repeats": 1,
        "max_repeats": 1,
        "points": [{"phase": PREFILL, "size": 4, "batch": 2}, {"phase": DECODE, "size": 3, "batch": 4}],
        "texts": [[1, 2, 3], [4, 5]],
        "logits": str(tmp_path / "logits.npy"),
        "image": str(tmp_path / "image.png"),
        "prompt": "Read.",
    }
    speed = measure(request | {"mode": SPEED_MODE})
    assert list(speed["points"]) == ["prefill-4-b2", "decode-3-b4"]
    assert np.load(tmp_path / "logits.npy").shape[0] == 5
    assert speed["versions"]["onnxruntime"]
    image = measure(request | {"mode": IMAGE_MODE})
    assert image["has_vision"] and len(image["image"]["all_s"]) == 1
    assert image["peak_rss_bytes"] > image["cache_bytes"] > 0


def test_prompt_has_as_many_tokens_as_fit(tiny_checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    found = comparison.prompt(tiny_checkpoint)
    assert workloads.texts()[0].startswith(found)
    assert 0.7 * workloads.PROMPT_TOKENS <= len(tokenizer.encode(found).ids) <= workloads.PROMPT_TOKENS


def test_a_kept_export_keeps_its_cost_and_is_of_the_same_checkpoint(tmp_path: Path) -> None:
    synthetic.write_checkpoint(tmp_path / "seed 0", "tiny")
    shutil.copytree(tmp_path / "seed 0", tmp_path / "moved")
    write = "import pathlib, sys, time; p = pathlib.Path(sys.argv[2]); p.mkdir(); (p / 'w').write_bytes(b'x' * 7)"
    side = Side("maker", "engine", export=("-c", write, "{checkpoint}", "{output}"))
    folder, first = builds.build(side, tmp_path / "seed 0", tmp_path, keep=True)
    assert first is not None and first["is_of_this_run"] and first["size_bytes"] == 7 and first["wall_s"] > 0
    mark = folder / "mark"
    mark.touch()
    _, second = builds.build(side, tmp_path / "seed 0", tmp_path, keep=True)
    assert second == first | {"is_of_this_run": False} and mark.is_file()
    builds.build(side, tmp_path / "moved", tmp_path, keep=True)
    assert not mark.is_file()
    mark.touch()
    builds.build(side, tmp_path / "moved", tmp_path, keep=False)
    assert not mark.is_file()
    mark.touch()
    synthetic.write_checkpoint(tmp_path / "moved", "tiny", seed=1)
    builds.build(side, tmp_path / "moved", tmp_path, keep=True)
    assert not mark.is_file()
    mark.touch()
    (tmp_path / "maker.json").write_text(json.dumps(first))  # of a version that recorded no checkpoint
    builds.build(side, tmp_path / "moved", tmp_path, keep=True)
    assert not mark.is_file()
    assert builds.build(Side("as is", "engine"), tmp_path, tmp_path, keep=False) == (tmp_path, None)


def test_one_export_serves_both_kinds_of_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    write = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'w').touch(); print('exported')"
    export = ("-c", write, "{output}")
    ours = [
        Side(f"ours{suffix}", "engine", export=export, options={"huge_pages": bool(suffix)}, target="ours")
        for suffix in ("", "-huge-pages")
    ]
    requests = []

    def measured(side: Side, request: dict[str, Any], scratch: Path) -> dict[str, Any]:
        requests.append((side.name, request["mode"], request["path"], request["options"]))
        return {"load_s": {IMAGE_MODE: 9.0, SPEED_MODE: 1.0}[request["mode"]]}

    monkeypatch.setattr(comparison, "run_driver", measured)
    monkeypatch.setattr(comparison, "measured_ceilings", lambda threads, scratch: {})
    for keep, is_new in ((False, True), (True, False)):
        requests.clear()
        found = comparison.compare(tiny_checkpoint, tmp_path, ours, [], comparison.Settings(keep_engines=keep))
        assert requests == [
            (side.name, mode, str(tmp_path / "ours"), side.options)
            for side in ours
            for mode in (IMAGE_MODE, SPEED_MODE)
        ]
        assert not found["failed"] and not found["missing"]
        for name in ("ours", "ours-huge-pages"):
            values = found["sides"][name]
            assert (values["target"], values["load_s"]) == ("ours", 1.0)
            assert values["export"]["is_of_this_run"] == is_new
    assert str(tiny_checkpoint) not in json.dumps(found)


def run_compare(monkeypatch: pytest.MonkeyPatch, side: Side, *options: str) -> Any:
    monkeypatch.setattr(sides, "all_sides", lambda: (side,))
    monkeypatch.setattr(comparison, "measured_ceilings", lambda threads, scratch: made_up_result()["ceilings"])
    return CliRunner().invoke(app, ["compare", "--model", "tiny", "--side", side.name, *options])


def test_a_side_that_fails_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail = "import sys; sys.exit('first\\nno module named abacus')"
    side = Side("peer", "genai", export=("-c", fail, "{checkpoint}"))
    done = run_compare(monkeypatch, side, "--work-dir", str(tmp_path / "work"), "--results", str(tmp_path / "results"))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("exit code 1: no module named abacus")
    assert "- peer: " in (tmp_path / "results" / "compare-tiny.md").read_text()


def test_a_part_does_not_replace_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(comparison, "compare", None)
    done = run_compare(monkeypatch, Side("peer", "genai"), "--work-dir", str(tmp_path))
    assert isinstance(done.exception, UsageError) and "--results" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_sides_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sides, "PEERS", tmp_path)
    found = {side.name: side for side in sides.all_sides()}
    assert {"ort-cpu-fp32", "ort-cpu-int4", sides.REFERENCE, "genai-int4-b128", "openvino-int4"} <= set(found)
    assert not found["ort-cpu-int4"].missing() and found["ort-cpu-int4"].is_ours
    pages = {name: side.options["huge_pages"] for name, side in found.items() if side.target == "ort-cpu-int4"}
    assert pages == {"ort-cpu-int4": False, "ort-cpu-int4-huge-pages": True}
    assert "make compare-setup" in found["genai-int4-b128"].missing()
    (tmp_path / "genai" / "bin").mkdir(parents=True)
    (tmp_path / "genai" / "bin" / "python").symlink_to(sys.executable)
    assert not found["genai-int4-b128"].missing()
    command = found["genai-int4-b128"].export_command(Path("/c"), Path("/o"))
    assert command[0] == str(tmp_path / "genai" / "bin" / "python") and command[-1] == "block_size=128"
    assert not any("{" in part for part in command)
    assert all(
        "benchmarks.compare.drivers" in side.import_command()[2] and side.exporter
        for side in found.values()
        if side.environment
    )


def made_up_result() -> dict[str, Any]:
    points = [Point(VISION, 784), Point(PREFILL, 512), Point(DECODE, 512, 4)]
    seconds = (2.0, 4.0, 0.1)
    side: dict[str, Any] = {
        "target": "ours",
        "is_ours": True,
        "export": {"wall_s": 45.4, "cpu_s": 50.0, "peak_rss_bytes": 1.5e9, "size_bytes": 1.3e9, "is_of_this_run": True},
        "load_s": 1.25,
        "versions": {"runner": "1.2"},
        "points": {p.name: {"median_s": s, "all_s": [s]} for p, s in zip(points, seconds, strict=True)},
        "decoder_bytes": 900_000_000,
        "cache_token_bytes": 50_000.0,
        "image": {"median_s": 21.5, "all_s": [21.0, 21.5, 22.0]},
        "has_vision": True,
        "cache_bytes": 200_000_000,
        "peak_rss_bytes": 1_900_000_000,
        "divergence": {"mean_kl": 0.238, "top1": 0.5},
    }
    blind = side | {
        "target": "",
        "is_ours": False,
        "has_vision": False,
        "points": {points[1].name: {"median_s": 8.0, "all_s": [8.0] * 3}},
    }
    blind["export"] = side["export"] | {"is_of_this_run": False}
    return {
        "model": "qwen3-vl-2b",
        "config": CONFIG,
        "settings": {"threads": 2, "budget_s": 10.0, "min_repeats": 3, "max_repeats": 9},
        "ceilings": {"memory_bytes_per_s": 20e9, "fp32_operations_per_s": 1e11, "int8_operations_per_s": 6e11},
        "points": [{"phase": p.phase, "size": p.size, "batch": p.batch} for p in points],
        "sides": {"ours": side, "blind": blind},
        "missing": {"absent": "not there"},
    }


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "--|" not in line]
    return {row[0]: row[1:] for row in rows}


def test_cost_table() -> None:
    found = cells(tables.costs_table(made_up_result()))
    assert found["ours"] == ["45", "1.5", "1.30", "1.2", "21.50 (3)", "1.70", "0.20", "0.24", "50.0"]
    assert found["blind"][0] == "45 (earlier)" and found["blind"][4] == "–"


def test_report_shows_speeds_shares_and_what_is_missing() -> None:
    result = made_up_result()
    text = tables.render(result)
    speed, share = (cells(part.split("\n\n")[2]) for part in text.split("## ")[2:4])
    assert speed["vision, 784 patches"] == ["1", "2.00", "–"]
    assert speed["prefill 512"] == ["1–3", "128.0", "64.0"]
    assert speed["decode, cache 512, batch 4"] == ["1", "40.0", "–"]
    prefill = 100 * operations(Point(PREFILL, 512), CONFIG) / 4.0 / 6e11
    assert share["prefill 512"] == ["1–3", f"{prefill:.0f}", f"{prefill / 2:.0f}"]
    read = 900e6 + 4 * 512 * 50_000
    assert share["decode, cache 512, batch 4"] == ["1", f"{100 * read / 0.1 / 20e9:.0f}", "–"]
    assert "- absent: not there" in text
    assert "Libraries of the sides: runner 1.2." in text
    json.dumps(result)


def test_bars_are_as_long_as_the_sides_are_fast() -> None:
    result = made_up_result()
    result["points"] = result["points"][1:2]
    drawing = ElementTree.fromstring(chart.draw(result))
    bars = [node for node in drawing if node.tag.endswith("rect")][1:]
    lengths = [float(bar.get("width", "nan")) for bar in bars]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=1e-3)
    assert bars[0].get("fill") != bars[1].get("fill")


def test_synthetic_checkpoints_take_the_image_at_full_size(tmp_path: Path) -> None:
    from benchmarks.compare.command import allow_large_images
    from runtime.image_config import ImageProcessorConfig
    from runtime.image_processor import process_image

    synthetic.write_checkpoint(tmp_path, "tiny", sparse=True)
    allow_large_images(tmp_path)
    config = ImageProcessorConfig.from_dict(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    width, height = workloads.IMAGE_SIZE
    image = process_image(np.zeros((height, width, 3), np.uint8), config)
    assert image.num_visual_tokens == workloads.IMAGE_TOKENS
