"""Following an engine's choices of experts: only near ties, only where that explains the engine, never a real fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from test_moe_parity import edit_graph

import configs
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT_MOE
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.near_ties import follow
from qwen3vl_export.parity.reference import Reference
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.routing import Choice
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

LAYERS, PROMPT, STEPS = 3, 3, 4
TOKENS = PROMPT + STEPS - 1
CHOICES = [(layer, token) for layer in range(LAYERS) for token in range(TOKENS)]


@dataclass(frozen=True)
class Run:
    swapped: frozenset[Choice]
    near_ties: dict[Choice, float]
    tokens: tuple[int, ...] = (0,) * STEPS


def errors_against(engine: frozenset[Choice], noise: float = 0.0) -> Callable[[Run], list[NDArray[np.float64]]]:
    """A choice that differs moves its token in all later layers, and from the layer behind on every later token."""

    def errors_of(run: Run) -> list[NDArray[np.float64]]:
        found = [np.full(TOKENS, noise) for _ in range(LAYERS + 1)]
        for layer, token in run.swapped ^ engine:
            for later in range(layer + 1, LAYERS + 1):
                found[later][token] += 10
                if later > layer + 1:
                    found[later][token + 1 :] += 1
        return found

    return errors_of


@given(engine=st.frozensets(st.sampled_from(CHOICES)), near=st.frozensets(st.sampled_from(CHOICES)))
def test_exactly_the_near_ties_that_the_engine_chose_otherwise_are_followed(
    engine: frozenset[Choice], near: frozenset[Choice]
) -> None:
    ties = {place: 0.1 + place[0] for place in near}
    found = follow(lambda swapped: Run(swapped, ties), errors_against(engine))
    assert set(found.gaps) == engine & near
    assert found.output.swapped == engine & near
    assert all(found.gaps[place] == ties[place] for place in found.gaps)


def text_of(choices: frozenset[Choice]) -> tuple[int, ...]:
    """Each token depends on all choices of the token before it and, through these, on the text."""
    tokens: list[int] = []
    for step in range(STEPS):
        position = PROMPT - 1 + step
        there = frozenset(choice for choice in choices if choice[1] == position)
        tokens.append(hash((there, tuple(tokens))) % 3)
    return tuple(tokens)


@given(seed=st.integers(0, 2**32), data=st.data())
def test_choices_of_another_text_are_forgotten(seed: int, data: st.DataObject) -> None:
    """The engine's choices depend on the reference's tokens, which depend on the choices that are followed."""

    def engine_of(tokens: tuple[int, ...]) -> frozenset[Choice]:
        def differs(layer: int, token: int) -> bool:
            before = tokens[: max(0, token - PROMPT + 1)]
            return bool(np.random.default_rng([seed, layer, token, *before]).integers(0, 2))

        return frozenset(place for place in CHOICES if differs(*place))

    near = data.draw(st.frozensets(st.sampled_from(CHOICES)))
    found = follow(
        lambda swapped: Run(swapped, dict.fromkeys(near, 0.5), text_of(swapped)),
        lambda run: errors_against(engine_of(run.tokens))(run),
    )
    assert set(found.gaps) == engine_of(found.output.tokens) & near


def test_small_errors_are_not_looked_into() -> None:
    ties = dict.fromkeys(CHOICES, 0.0)
    runs = []

    def run(swapped: frozenset[Choice]) -> Run:
        runs.append(swapped)
        return Run(swapped, ties)

    assert follow(run, errors_against(frozenset(), noise=0.2)).gaps == {}
    assert runs == [frozenset()]
    # Errors that no choice explains end it, too, with no choice changed.
    assert follow(run, errors_against(frozenset(), noise=np.inf)).gaps == {}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("near")
    names = ("ort-cpu-fp32", "ort-cpu-int8")
    return {name: build(make_bundle(Checkpoint.open("demo-moe")), name, folder / name) for name in names}


def next_best_in_one_layer(graph: onnx.GraphProto) -> int:
    """In layer 1 the second expert of each token is the third best; its weights are right for what was chosen."""
    nodes = [node for node in graph.node if node.op_type == "TopK"]
    node = nodes[1]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([3]), "three"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 2]), "first_and_third"))
    node.input[1] = "three"
    at = list(graph.node).index(node) + 1
    for i, name in enumerate(node.output):
        node.output[i] = f"{name}.of_three"
        gather = helper.make_node("Gather", [node.output[i], "first_and_third"], [name], axis=1)
        graph.node.insert(at + i, gather)
    return len(nodes)


@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_a_wrong_choice_fails_and_only_a_wider_gap_would_excuse_it(
    target: str, engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = edit_graph(engines[target], tmp_path / "engine", next_best_in_one_layer)
    report = verify(broken, "demo-moe", max_new_tokens=4)
    assert not report.passed
    first = next(check for check in report.checks if not check.passed)
    assert (first.case, first.name, first.layer) == ("text", "keys", 2)
    tolerances = configs.load("tolerances")
    tolerances[target.removeprefix("ort-cpu-")]["router_gap"] = np.inf
    monkeypatch.setattr(configs, "load", lambda name: tolerances)
    report = verify(broken, "demo-moe", max_new_tokens=4)
    failed = {check.name for check in report.checks if not check.passed}
    # `generate` is compared with the answers of a model that chooses as it should.
    assert failed <= {"answer agrees"}
    followed = [check for check in report.checks if check.name == "choices of routers followed"]
    num_tokens = sum(layer["tokens"] for layer in report.routers.to_dict()["layers"] if layer["layer"] == 1)
    assert num_tokens - 40 < sum(check.value for check in followed) <= num_tokens + 60


def test_likely_tokens_change_nothing_but_the_work(engines: dict[str, Path]) -> None:
    reference = Reference(CHECKPOINT_MOE)
    model = Qwen3VLModel.from_engine(engines["ort-cpu-fp32"], threads=2)
    prepared = model.prepare(user_message("Read the digits.", [held_out(1).image]))
    pixels, grids = ([getattr(image, name) for image in prepared.images] for name in ("pixel_values", "grid_thw"))
    num_calls = 0

    def count(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    reference._model.register_forward_hook(count)
    run = partial(reference.run, prepared.prompt.input_ids, pixels, grids, 6, near_gap=0.5)
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
