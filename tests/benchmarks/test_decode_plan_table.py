"""The table of decode plans: what is compiled once is kept, and bytes of weights are those of the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from benchmarks import decode_plan
from benchmarks.decode_plan_report import MODELS, TARGETS
from benchmarks.kernel_usage import Usage
from engines import registry
from engines.bundle import DECODER, Bundle
from engines.decode_plan.compile import Code, Job, triton_version
from engines.decode_plan.graph import read_decoder
from engines.kernels import candidates
from engines.kernels.launch import GPUS
from engines.lower import lower


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, demo_bundle: Bundle) -> list[int]:
    """Stands for the compiler; the numbers of kernels that it was asked for."""
    asked: list[int] = []

    def compile_all(jobs: Sequence[Job]) -> dict[Job, Code]:
        codes = {job: Code("kernel", 2048, "12.9", b"0123456789", 0.5) for job in jobs}
        asked.append(len(codes))
        return codes

    monkeypatch.setattr(decode_plan, "compile_all", compile_all)
    monkeypatch.setattr(decode_plan, "plan_problem", lambda: "")
    monkeypatch.setattr(decode_plan, "usage_of", lambda code: Usage("kernel", 90, len(code), 8, 1024))
    monkeypatch.setattr(decode_plan, "make_bundle", lambda checkpoint: demo_bundle)
    return asked


def run(folder: Path, *gpus: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows and the table after a run for one model and target."""
    decode_plan.decode_plan(["qwen3-vl-2b"], ["ort-cuda-fp16"], list(gpus), folder)
    rows = json.loads((folder / "decode-plan.json").read_text())["plans"]
    return rows, (folder / "decode-plan.md").read_text()


def test_what_was_compiled_is_kept(
    compiled: list[int], tmp_path: Path, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, table = run(tmp_path, "9.0")
    (kernels,) = compiled
    assert len(rows) == 1 and kernels > 9
    text = demo_bundle.config.text
    last = candidates.launches(text.vocab_size, 1, GPUS[90])
    assert rows[0].pop("weight_bytes") > 0 and "embed" in rows[0].pop("spilling_kernels")
    assert rows[0] == {
        **{"model": "qwen3-vl-2b", "target": "ort-cuda-fp16", "sm": 90, "kernels": kernels},
        **{
            "source": decode_plan.launches_digest(),
            "triton": triton_version(),
            "launches": 5 * text.num_layers + 2 + len(last),
        },
        **{"compile_s": kernels / 2, "code_bytes": 10 * kernels},
        **{"most_registers": 10, "most_stack_bytes": 8, "most_shared_bytes": 2048},
    }
    assert table.count("not compiled yet") == len(MODELS) * len(TARGETS) * len(GPUS) - 1
    assert "have changed" not in table

    rows, _ = run(tmp_path, "8.0", "9.0")
    assert [row["sm"] for row in rows] == [90, 80] and len(compiled) == 2

    monkeypatch.setattr(decode_plan, "launches_digest", lambda: "of other kernels")
    rows, table = run(tmp_path, "8.0")
    assert len(compiled) == 3 and [row["sm"] for row in rows] == [90, 80]
    assert "| 9.0\\* |" in table and "| 8.0 |" in table and "have changed" in table


@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-int4", "ort-cuda-fp8"])
def test_a_step_reads_the_weights_of_the_file(target: str, demo_bundle: Bundle) -> None:
    found = registry.get(target)
    model = lower(demo_bundle.graphs[DECODER].clone(), found, demo_bundle.config, found.passes(found.formats))
    products = [node for node in model.graph if node.op_type.startswith(("FusedMatMul", "MatMul"))]
    expected = sum(stored.const_value.nbytes for node in products for stored in node.inputs[1:])
    assert decode_plan.weight_bytes(read_decoder(model, demo_bundle.config)) == expected


def test_of_experts_a_step_reads_the_chosen(demo_moe_bundle: Bundle) -> None:
    found, config = registry.get("ort-cuda-int4"), demo_moe_bundle.config
    assert config.text.experts is not None
    model = lower(demo_moe_bundle.graphs[DECODER].clone(), found, config, found.passes(found.formats))

    def stored(kinds: tuple[str, ...]) -> int:
        nodes: list[ir.Node] = [node for node in model.graph if node.op_type.startswith(kinds)]
        values = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
        return sum(value.const_value.nbytes for value in values)

    chosen = stored(("QMoE",)) * config.text.experts.top_k // config.text.experts.num_experts
    found_bytes = decode_plan.weight_bytes(read_decoder(model, config))
    assert found_bytes == stored(("FusedMatMul", "MatMul")) + chosen
