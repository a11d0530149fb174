"""The benchmark of experts: all forms compute the same layer, and its command writes what the table shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import experts, mixture
from benchmarks.__main__ import app
from benchmarks.compare.onnx_bytes import bytes_of_products
from benchmarks.expert_forms import FORMS, Shape, open_form, random_weights
from runtime.errors import UsageError


def dense(shape: Shape, weights: dict[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
    """Compute the layer token by token from the float32 weights."""
    rows = []
    for x_D in x_TD:
        logits_E = x_D @ weights["router"]
        chosen = np.argsort(-logits_E)[: shape.top_k]
        share_k = np.exp(logits_E[chosen] - logits_E[chosen].max())
        total_D = np.zeros(shape.hidden, np.float32)
        for expert, share in zip(chosen, share_k / share_k.sum(), strict=True):
            gate, up = np.split(weights["gate_up"][expert] @ x_D, 2)
            total_D += share * (weights["down"][expert] @ (gate / (1 + np.exp(-gate)) * up))
        rows.append(total_D)
    return np.stack(rows)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "QMoE, inputs in float32"])
def test_forms_compute_the_layer(form: str, tmp_path: Path) -> None:
    shape = Shape(num_experts=7, top_k=3, hidden=48, width=32, bits=32, block=16)
    weights = random_weights(shape)
    x_TD = np.random.default_rng(3).standard_normal((9, 48), np.float32)
    (output,) = open_form(form, shape, weights, tmp_path, 1).run(None, {"x": x_TD})
    np.testing.assert_allclose(output, dense(shape, weights, x_TD), atol=1e-6)


def test_bytes_of_a_token() -> None:
    shape = Shape(num_experts=128, top_k=8, hidden=2048, width=768, bits=4, block=128)
    weights = 8 * 3 * 2048 * 768
    assert shape.token_bytes() == weights / 2 + weights / 128 * 4.5


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


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_memory_bytes_per_s", lambda threads: 1e9)
    options = ["--model", "tiny-moe", "--block", "16", "--rounds", "1", "--threads", "1", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, ["experts", *options])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "experts-tiny-moe-4-bits.json").read_text())
    assert list(result["forms"]) == list(FORMS)
    counts = {
        form: {count: len(times["all_s"]) for count, times in each.items()} for form, each in result["forms"].items()
    }
    assert counts["gathered weights"] == {"1": 20, "16": 1}
    assert counts["products of sorted tokens"] == {"1": 20, "16": 1, "128": 1, "512": 1}
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(FORMS)
    median = result["forms"]["gathered weights"]["1"]["median_s"]
    rate = result["token_bytes"] / median
    cells = [cell.strip() for cell in rows[-1].strip("|").split("|")]
    assert cells[1] == f"{1e3 * median:.2f}" and cells[3:5] == ["", ""]
    assert cells[5:] == [f"{rate / 1e9:.1f}", f"{100 * rate / 1e9:.0f}"]


def test_tables_of_the_document() -> None:
    points = {"decode-0-b1": 0.02, "decode-512-b1": 0.025, "prefill-512-b1": 1.024}
    side = {
        "points": {name: {"median_s": seconds} for name, seconds in points.items()},
        "decoder_bytes": 300_000_000,
        "cache_token_bytes": 1e5,
        "cache_bytes": 50_000_000,
        "peak_rss_bytes": 3_300_000_000,
        "load_s": 3.5,
        "export": {"size_bytes": 2_850_000_000},
    }
    compared = {
        "settings": {"threads": 2},
        "ceilings": {"memory_bytes_per_s": 30e9},
        "sides": {"ort-cpu-int4": side},
        "config": {"text_config": {"num_hidden_layers": 4}},
    }
    whole = {"checkpoint_bytes": 100, "disk_bytes": 17, "config": {"text_config": {"num_hidden_layers": 48}}}
    run = {"wall_s": 50.0, "cpu_s": 80.0, "peak_rss_bytes": 1_000_000_000}
    export = {"model": "x", "target": "ort-cpu-int4", "runs": [run], "checkpoint_bytes": 5_000_000_000}
    text = mixture.tables(
        {
            "compare-qwen3-vl-30b-a3b-4-layers": compared,
            "compare-qwen3-vl-30b-a3b": compared | whole,
            "export-x-ort-cpu-int4": export | {"no_weights": False},
            "export-x-ort-cpu-int4-no-weights": export | {"no_weights": True},
            "export-y-ort-cpu-int4": export | {"no_weights": False, "disk_bytes": 500_000_000},
            "export-x-ort-cpu-fp32": {"target": "ort-cpu-fp32"},
        }
    )
    for layers in (4, 48):
        cells = f"| {layers} | ort-cpu-int4 | 50.0 (50 %) | 40.0 (47 %) | 500 | 300 | 3.5 | 2.85 | 0.05 | 3.30 | 0.40 |"
        assert cells in text
    assert "Of the checkpoint's bytes 17 % were written" in text and text.count("were written") == 1
    assert "| x | ort-cpu-int4 | yes | 5.0 | 50.0 | 80.0 | 0.100 | 1.00 |" in text
    assert "| x | ort-cpu-int4 | 10 %, else zeros in holes | 5.0 | 50.0 | 80.0 | 0.100 | 1.00 |" in text
    assert "| x | ort-cpu-int4 | no | 5.0 | 50.0 | 80.0 |  | 1.00 |" in text
    assert "fp32" not in text


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UsageError, match="has no experts"):
        experts.experts("tiny")
