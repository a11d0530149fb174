"""Following an engine through its assignments of experts: exactly those that explain it, and never past a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from engines.bundle import Bundle
from helpers.damage import edit_graph
from helpers.engines import build
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.eager import load
from qwen3vl_export.parity.own_reference import OwnReference
from qwen3vl_export.parity.routes import follow
from qwen3vl_export.parity.transformers_reference import FOLLOWED_NOTE
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.routing import Assignment
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

LAYERS, PROMPT, STEPS = 3, 3, 4
TOKENS = PROMPT + STEPS - 1
CHOICES = [(layer, token) for layer in range(LAYERS) for token in range(TOKENS)]


@dataclass(frozen=True)
class Run:
    swapped: frozenset[Assignment]
    tokens: tuple[int, ...] = (0,) * STEPS

    @property
    def gaps(self) -> dict[Assignment, float]:
        return {place: 0.1 + sum(place) for place in CHOICES}


def errors_against(engine: frozenset[Assignment], noise: float = 0.0) -> Callable[[Run], list[NDArray[np.float64]]]:
    """An assignment that differs moves its token in all later layers, and from the layer after on every later token."""

    def errors_of(run: Run) -> list[NDArray[np.float64]]:
        found = [np.full(TOKENS, noise) for _ in range(LAYERS + 1)]
        for layer, token in run.swapped ^ engine:
            for later in range(layer + 1, LAYERS + 1):
                found[later][token] += 4
                if later > layer + 1:
                    found[later][token + 1 :] += 0.5
        return found

    return errors_of


@given(engine=st.frozensets(st.sampled_from(CHOICES)))
def test_exactly_the_assignments_of_the_engine_are_followed(engine: frozenset[Assignment]) -> None:
    found = follow(Run, errors_against(engine, noise=0.2))
    assert found.is_complete and found.num_runs <= 1 + LAYERS
    assert found.output.swapped == engine
    assert found.gaps == {place: Run(engine).gaps[place] for place in engine}


def text_of(assignments: frozenset[Assignment]) -> tuple[int, ...]:
    """Each token depends on all assignments of the token before it and, through these, on the text."""
    tokens: list[int] = []
    for step in range(STEPS):
        position = PROMPT - 1 + step
        there = frozenset(each for each in assignments if each[1] == position)
        tokens.append(hash((there, tuple(tokens))) % 3)
    return tuple(tokens)


@given(seed=st.integers(0, 2**32))
def test_assignments_of_another_text_are_forgotten(seed: int) -> None:
    """The engine's assignments depend on the reference's tokens, which depend on the assignments that are followed."""

    def engine_of(tokens: tuple[int, ...]) -> frozenset[Assignment]:
        def differs(layer: int, token: int) -> bool:
            before = tokens[: max(0, token - PROMPT + 1)]
            return bool(np.random.default_rng([seed, layer, token, *before]).integers(0, 2))

        return frozenset(place for place in CHOICES if differs(*place))

    found = follow(
        lambda swapped: Run(swapped, text_of(swapped)),
        lambda run: errors_against(engine_of(run.tokens))(run),
        runs_per_layer=100,
    )
    assert set(found.gaps) == engine_of(found.output.tokens)


def test_what_no_assignment_explains_ends_it() -> None:
    assert follow(Run, errors_against(frozenset(), noise=0.2)).num_runs == 1
    # One trial a layer that changes nothing, and one run without it.
    found = follow(Run, errors_against(frozenset(), noise=3.0))
    assert (found.gaps, found.num_runs) == ({}, 1 + 2 * LAYERS)
    for noise in (20.0, np.inf):
        found = follow(Run, errors_against(frozenset(), noise=noise))
        assert (found.gaps, found.num_runs, found.is_complete) == ({}, 1, True)
    found = follow(Run, errors_against(frozenset(CHOICES)), runs_per_layer=0)
    assert (found.gaps, found.num_runs, found.is_complete) == ({}, 1, False)


@pytest.fixture(scope="module")
def engines(demo_moe_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("routes")
    names = ("ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int4")
    return {name: build(demo_moe_bundle, name, folder / name) for name in names}


def third_for_second(layer: int) -> Callable[[onnx.GraphProto], int]:
    """Choose the third best expert in place of the second; its weight is right for what was chosen."""

    def change(graph: onnx.GraphProto) -> int:
        nodes = [node for node in graph.node if node.op_type == "TopK"]
        node = nodes[layer]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([3]), "three"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 2]), "first_and_third"))
        node.input[1] = "three"
        at = list(graph.node).index(node) + 1
        for i, name in enumerate(node.output):
            node.output[i] = f"{name}.of_three"
            gather = helper.make_node("Gather", [node.output[i], "first_and_third"], [name], axis=1)
            graph.node.insert(at + i, gather)
        return len(nodes)

    return change


@pytest.mark.parametrize(
    ("target", "layer"),
    [
        *(("ort-cpu-fp32", layer) for layer in range(4)),
        *(("ort-cpu-int4", layer) for layer in (0, 3)),
        *(pytest.param("ort-cpu-int4", layer, marks=pytest.mark.slow) for layer in (1, 2)),
        *(pytest.param("ort-cpu-int8", layer, marks=pytest.mark.slow) for layer in range(4)),
    ],
)
def test_wrong_assignments_of_one_layer_fail_and_are_named(
    target: str, layer: int, engines: dict[str, Path], tmp_path: Path
) -> None:
    """All other checks may pass: what 4 bits hide in the values shows in how far apart the experts are."""
    broken = edit_graph(engines[target], tmp_path / "engine", third_for_second(layer))
    report = verify(broken, "demo-moe", max_new_tokens=1)
    assert not report.passed
    routes = [check for check in report.checks if check.name == "widest gap of routes"]
    assert {check.layer for check in routes if not check.passed} == {layer}
    assert report.notes[-1] == FOLLOWED_NOTE
    if target == "ort-cpu-fp32":
        shares = [check.detail["share"] for check in routes]
        assert len(shares) == 6 and min(shares) > 0.9
        # But for the answers of `generate`, which go their own way, the reference follows to the last digit.
        others = {check.name for check in report.checks if not check.passed and check.layer is None}
        assert others <= {"answer agrees"}


def test_likely_tokens_change_nothing_but_the_work(engines: dict[str, Path]) -> None:
    model = load(Checkpoint.open("demo-moe"))
    reference = OwnReference(model)
    prepared = Qwen3VLModel.from_engine(engines["ort-cpu-fp32"], threads=2).prepare(
        user_message("Read the digits.", [held_out(1).image])
    )
    num_calls = 0

    def count(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    model.register_forward_hook(count)
    run = partial(reference.run, prepared, 6)
    plain = run()
    assert num_calls == 6
    for guess, calls in ((plain.tokens, 1), ([plain.tokens[0] + 1, *plain.tokens[1:]], 7)):
        num_calls = 0
        found = run(likely_tokens=guess)
        assert num_calls == calls
        assert found.tokens == plain.tokens
        np.testing.assert_allclose(found.logits, plain.logits, atol=1e-4)
        np.testing.assert_allclose(found.step_logits, plain.step_logits, atol=1e-4)
        for ours, theirs in zip(found.layers, plain.layers, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert found.routers.layers.keys() == plain.routers.layers.keys()
        for layer, routing in found.routers.layers.items():
            np.testing.assert_array_equal(routing.tokens_per_expert, plain.routers.layers[layer].tokens_per_expert)
