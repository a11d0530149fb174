"""Mixtures of experts of other shapes than the shipped one's, from checkpoint to `verify`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import registry
from engines.build import build_engine
from engines.build_options import BuildOptions
from helpers.moe_checkpoints import Arrays, as_in_the_graph, as_on_the_hub, rewritten, write_experts
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.tracing import pieces
from runtime.errors import BundleError, CheckpointError

OPTIONS = BuildOptions(max_context=256, prefill_chunk=256)


def lowered(checkpoint: Path, target: str, folder: Path) -> Path:
    chosen = registry.get(target)
    options = OPTIONS if chosen.compile is not None else None
    build_engine(make_bundle(Checkpoint.open(str(checkpoint))), chosen, folder, runnable=False, options=options)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Checkpoints of many experts, of which as many are chosen as in the published sizes; these have 128."""
    folder = tmp_path_factory.mktemp("many")

    def of(num_experts: int) -> Path:
        checkpoint = folder / str(num_experts)
        if not checkpoint.exists():
            write_experts(checkpoint, num_experts=num_experts, num_experts_per_tok=8)
        return checkpoint

    return of


@pytest.mark.parametrize(
    ("num_experts", "target"),
    [
        (32, "ort-cpu-fp32"),
        pytest.param(128, "ort-cpu-fp32", marks=pytest.mark.slow),
        pytest.param(128, "trt-rtx-fp16", marks=pytest.mark.slow),
    ],
)
def test_eight_of_many_experts(num_experts: int, target: str, many: Callable[[int], Path], tmp_path: Path) -> None:
    checkpoint = many(num_experts)
    report = verify(lowered(checkpoint, target, tmp_path / "engine"), str(checkpoint), max_new_tokens=2)
    assert report.passed, report.render()
    assert all(len(routing.tokens_per_expert) == num_experts for routing in report.routers.layers.values())
    followed = [check.value for check in report.checks if check.name == "widest gap of routes"]
    assert bool(followed) == (target == "trt-rtx-fp16")


def test_a_square_matrix_on_the_hub_is_compared_as_it_is_read(tmp_path: Path) -> None:
    """transformers takes it for its own layout, so it is no reference for its own reading."""
    saved = write_experts(tmp_path / "saved", layout=as_in_the_graph, hidden_size=48, moe_intermediate_size=24)
    hub = rewritten(saved, tmp_path / "hub", as_on_the_hub)
    engine = lowered(saved, "ort-cpu-fp32", tmp_path / "engine")
    for checkpoint in (saved, hub):
        report = verify(engine, str(checkpoint), max_new_tokens=1)
        assert report.passed, report.render()


KEY = "model.language_model.layers.4.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("target", "value", "place"),
    [
        # A row of up, which takes turns with gate's in the engine.
        (
            "ort-cpu-int4",
            1e25,
            r"layers\.4\.mlp\.experts\.5\.gate_up_proj: \S+ at row 30, column 2: no number",
        ),
        ("trt-fp16", 1e6, r"layers\.4\.mlp\.experts\.5\.gate_up_proj: 1000000\.0 is no finite number in float16"),
    ],
)
def test_a_weight_that_a_type_does_not_hold_names_the_expert(
    target: str, value: float, place: str, tmp_path: Path
) -> None:
    def damage(tensors: Arrays) -> Arrays:
        changed = tensors[KEY].copy()
        changed[5, 30, 2] = value
        return {**tensors, KEY: changed}

    saved = write_experts(tmp_path / "saved", layout=as_in_the_graph)
    broken = rewritten(saved, tmp_path / "broken", damage)
    with pytest.raises(BundleError, match=place):
        lowered(broken, target, tmp_path / "engine")


def test_a_dense_layer_where_experts_should_be_is_said_before_tracing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = write_experts(tmp_path / "saved")
    config = (saved / "config.json").read_text()
    changed = re.sub(r'"mlp_only_layers": \[[^\]]*\]', '"mlp_only_layers": []', config)
    assert changed != config
    (saved / "config.json").write_text(changed)
    monkeypatch.setattr(pieces, "trace_pieces", None)
    with pytest.raises(CheckpointError, match=r"saved: model\.language_model\.layers\.3\.mlp is a dense network"):
        make_bundle(Checkpoint.open(str(saved)))


def test_two_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    saved = write_experts(tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    config["text_config"] |= {"num_experts": 7, "num_local_experts": 9}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"num_experts is 7, num_local_experts 9, expected one number"):
        Checkpoint.open(str(saved)).config  # noqa: B018
