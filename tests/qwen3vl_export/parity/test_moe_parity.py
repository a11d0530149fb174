"""A random mixture of experts against transformers, in every layout of its weights; sabotage; routers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, Bundle
from helpers.command_line import call
from helpers.damage import edit_graph
from helpers.moe_checkpoints import Arrays, as_in_the_graph, as_on_the_hub, one_by_one, rewritten, write_experts
from qwen3vl_export.assembly import build_decoder
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.run import app
from qwen3vl_export.eager import load
from qwen3vl_export.export import make_bundle
from qwen3vl_export.modeling import LayerCache, MixtureOfExperts, Qwen3VL
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.routing import Assignment, RouterStatistics, watched_routers
from qwen3vl_export.tracing.pieces import Pieces, trace_pieces
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.errors import CheckpointError, EngineError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

GATE_UP = "mlp.experts.gate_up_proj"


def picture(width: int, height: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("tiny-moe") / "checkpoint", layout=as_in_the_graph)


@pytest.fixture(scope="module")
def pieces(folder: Path) -> Pieces:
    return trace_pieces(Checkpoint.open(str(folder)).config)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return make_bundle(Checkpoint.open(str(folder)))


def build(bundle: Bundle, output: Path) -> Path:
    build_engine(bundle, registry.get("ort-cpu-fp32"), output)
    return output


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(bundle, tmp_path_factory.mktemp("tiny-moe-engine") / "engine")


@pytest.mark.parametrize("layout", [as_on_the_hub, one_by_one])
def test_layouts_give_the_same_decoder(
    folder: Path, pieces: Pieces, bundle: Bundle, tmp_path: Path, layout: Callable[[Arrays], Arrays]
) -> None:
    checkpoint = Checkpoint.open(str(rewritten(folder, tmp_path / "checkpoint", layout)))
    decoder = build_decoder(pieces, checkpoint)
    assert checkpoint.used_keys == {*checkpoint.entries}
    expected = bundle.graphs[DECODER].graph.initializers
    assert set(decoder.graph.initializers) == set(expected)
    for name, value in decoder.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), expected[name].const_value.numpy())


def test_engine_agrees_with_transformers(engine: Path, folder: Path) -> None:
    report = verify(engine, str(folder))
    assert report.passed, report.render()
    assert {check.case for check in report.checks} >= {"text", "one image", "three images", "small chunks"}
    assert {check.detail["tokens"] for check in report.checks if check.name == "answer agrees"} == {64}


def test_a_batch_equals_its_sequences_alone(engine: Path) -> None:
    """Right-padded prompts of different lengths, then steps at different positions: a token's experts are its own."""
    session = Qwen3VLModel.from_engine(engine, threads=2).session
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, length) for length in (9, 4, 6)]
    steps = rng.integers(0, 300, (3, 5))

    def run(chosen: list[int]) -> np.ndarray[Any, Any]:
        lengths = np.array([len(prompts[i]) for i in chosen])
        width = int(lengths.max())
        ids = np.stack([np.pad(prompts[i], (0, width - len(prompts[i]))) for i in chosen])
        cache = session.new_cache(width + steps.shape[1], len(chosen))
        embeds = np.zeros((3, 1, 48), np.float32)

        def call(ids_BS: np.ndarray[Any, Any], past: np.ndarray[Any, Any], last: np.ndarray[Any, Any]) -> Any:
            return session.decode(DecoderInputs.text(ids_BS, past, embeds, logits_positions=last[:, None]), cache)

        logits = [call(ids, np.zeros_like(lengths), lengths - 1)]
        for step in range(steps.shape[1]):
            logits.append(call(steps[chosen, step : step + 1], lengths + step, np.zeros_like(lengths)))
        return np.concatenate(logits, 1)

    together = run([0, 1, 2])
    for i in range(3):
        np.testing.assert_allclose(together[i], run([i])[0], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1


def test_the_bundle_runs_unlowered(bundle: Bundle, engine: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path)
    onnx.checker.check_model(str(tmp_path / "decoder.onnx"), full_check=True)
    session = ort.InferenceSession(str(tmp_path / "decoder.onnx"))
    model = Qwen3VLModel.from_engine(engine, threads=2)
    prepared = model.prepare(user_message("Count the digits."))
    ids, text = prepared.prompt.input_ids, model.config.text
    empty = np.zeros((1, text.num_kv_heads, len(ids), text.head_dim), np.float32)
    feeds = prepared.decoder_inputs(no_visual_embeds(model.config), all_logits=True).arrays()
    feeds |= {f"past_key_values.{i}.{kind}": empty for i in range(text.num_layers) for kind in ("key", "value")}
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits[0], model.logits(user_message("Count the digits.")), atol=1e-4)


def test_a_weight_that_is_no_number_stops_the_export(
    folder: Path, pieces: Pieces, bundle: Bundle, tmp_path: Path
) -> None:
    def damage(tensors: Arrays) -> Arrays:
        key = f"model.language_model.layers.4.{GATE_UP}"
        value = tensors[key].copy()
        value[6, 3, 2] = np.nan
        return as_on_the_hub({**tensors, key: value})

    broken = Checkpoint.open(str(rewritten(folder, tmp_path / "checkpoint", damage)))
    for target in ("ort-cpu-fp32", "ort-cpu-int4"):
        graphs = {**bundle.graphs, DECODER: build_decoder(pieces, broken)}
        with pytest.raises(CheckpointError, match=r"layers\.4\.mlp\.experts\.6\.gate_up_proj: nan at row 2, column 3"):
            build_engine(dataclasses.replace(bundle, graphs=graphs), registry.get(target), tmp_path / "engine")
        assert not (tmp_path / "engine").exists()


# Sabotage of the checkpoint that the engine is built from, and of the engine's graph.


def gate_and_up_swapped(tensors: Arrays) -> Arrays:
    return {
        key: np.roll(value, value.shape[1] // 2, axis=1) if key.endswith(GATE_UP) else value
        for key, value in tensors.items()
    }


def experts_permuted(tensors: Arrays) -> Arrays:
    return {key: np.roll(value, 1, axis=0) if ".experts." in key else value for key, value in tensors.items()}


def renormalisation_off(graph: onnx.GraphProto) -> int:
    """The router's own probabilities, of all experts, weigh the outputs."""
    nodes = [node for node in graph.node if node.op_type == "MoE"]
    producers = {name: node for node in graph.node for name in node.output}
    for node in nodes:
        masked = producers[node.input[1]]
        assert masked.op_type == "ScatterElements"
        node.input[1] = producers[masked.input[2]].input[0]
        (attribute,) = (a for a in node.attribute if a.name == "normalize_routing_weights")
        attribute.i = 0
    return len(nodes)


def router_in_half(graph: onnx.GraphProto) -> int:
    """The logits are rounded to float16 before the softmax."""
    nodes = [node for node in graph.node if node.op_type == "Softmax"]
    producers = {name: node for node in graph.node for name in node.output}
    for node in nodes:
        product = producers[node.input[0]]
        name = product.output[0]
        product.output[0] = f"{name}.exact"
        casts = [
            helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT),
        ]
        at = list(graph.node).index(product) + 1
        for i, cast in enumerate(casts):
            graph.node.insert(at + i, cast)
    return len(nodes)


def first_failure(engine: Path, folder: Path) -> tuple[str, str, int | None, float]:
    report = verify(engine, str(folder), max_new_tokens=4)
    check = next(check for check in report.checks if not check.passed)
    assert check.limit is not None
    return check.case, check.name, check.layer, check.value / check.limit


@pytest.mark.parametrize("sabotage", [gate_and_up_swapped, pytest.param(experts_permuted, marks=pytest.mark.slow)])
def test_verify_notices_wrong_weights(
    sabotage: Callable[[Arrays], Arrays], folder: Path, pieces: Pieces, bundle: Bundle, tmp_path: Path
) -> None:
    broken = Checkpoint.open(str(rewritten(folder, tmp_path / "checkpoint", sabotage)))
    graphs = {**bundle.graphs, DECODER: build_decoder(pieces, broken)}
    engine = build(dataclasses.replace(bundle, graphs=graphs), tmp_path / "engine")
    *place, margin = first_failure(engine, folder)
    assert place == ["text", "keys", 1]
    assert margin > 5


# Half of the router's bits are lost a little at a time: the first layer after it is still within the limit.
@pytest.mark.parametrize(
    ("sabotage", "layer", "least"),
    [(renormalisation_off, 1, 5), pytest.param(router_in_half, 2, 1, marks=pytest.mark.slow)],
)
def test_verify_notices_a_wrong_router(
    sabotage: Callable[[onnx.GraphProto], int], layer: int, least: float, engine: Path, folder: Path, tmp_path: Path
) -> None:
    edited = edit_graph(engine, tmp_path / "engine", sabotage)
    *place, margin = first_failure(edited, folder)
    assert place == ["text", "keys", layer]
    assert margin > least


@pytest.mark.parametrize("last_wins", [False, True])
def test_verify_reports_ties(
    last_wins: bool, folder: Path, pieces: Pieces, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts 1 and 4 always tie. PyTorch may take either: where that is the last, the reference follows the engine."""
    import torch

    def tied(tensors: Arrays) -> Arrays:
        changed = {key: value.copy() for key, value in tensors.items()}
        for key, value in changed.items():
            if key.endswith("mlp.gate.weight"):
                value[[1, 4]] = 0  # equal rows may be summed in different orders
        return changed

    def stable_topk(values: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert dim == -1
        found, where = torch.sort(values.flip(-1) if last_wins else values, dim=-1, descending=True, stable=True)
        return found[..., :k], (values.shape[-1] - 1 - where if last_wins else where)[..., :k]

    checkpoint = rewritten(folder, tmp_path / "checkpoint", tied)
    graphs = {**bundle.graphs, DECODER: build_decoder(pieces, Checkpoint.open(str(checkpoint)))}
    engine = build(dataclasses.replace(bundle, graphs=graphs), tmp_path / "engine")
    monkeypatch.setattr(torch, "topk", stable_topk)
    code, out, err = call(
        app, "verify", str(engine), "--checkpoint", str(checkpoint), "--max-new-tokens", "2", "--json"
    )
    assert out, err
    report = json.loads(out)
    assert (code, report["passed"]) == (0, True)
    followed = [check for check in report["checks"] if check["name"] == "widest gap of routes"]
    # A tie may be between the experts 1 and 4, of which PyTorch took the wrong one.
    assert len(followed) >= 4 if last_wins else not followed
    assert all(check["value"] == 0 for check in followed)
    routers = report["routers"]
    assert [layer["layer"] for layer in routers["layers"]] == [0, 1, 2, 4]
    assert sum(layer["ties"] for layer in routers["layers"]) > 20
    num_tokens = sum(check["detail"]["tokens"] for check in report["checks"] if check["name"] == "prompt tokens agree")
    # The last greedy token of a case is chosen and not run.
    assert {layer["tokens"] for layer in routers["layers"]} == {num_tokens + 6 * (2 - 1)}
    assert "Of tied experts an engine takes the lower index" in routers["notes"][-1]


def poisoned(op_type: str, index: int) -> Callable[[onnx.GraphProto], int]:
    """Multiply what one node of a kind gives by NaN, and what the others give by 1."""

    def change(graph: onnx.GraphProto) -> int:
        nodes = [node for node in graph.node if node.op_type == op_type]
        for i, node in enumerate(nodes):
            name = node.output[0]
            node.output[0] = f"{name}.fine"
            factor = "nan" if i == index else "one"
            at = list(graph.node).index(node) + 1
            graph.node.insert(at, helper.make_node("Mul", [f"{name}.fine", factor], [name]))
        for name, value in (("nan", np.nan), ("one", 1.0)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
        return len(nodes)

    return change


def test_an_expert_that_gives_no_number_stops_generation(engine: Path, tmp_path: Path) -> None:
    broken = edit_graph(engine, tmp_path / "engine", poisoned("MoE", 2))
    with pytest.raises(EngineError, match="logits that are not finite"):
        Qwen3VLModel.from_engine(broken, threads=2).generate(user_message("Count."), max_new_tokens=2)


@pytest.mark.parametrize(
    ("is_dense", "change", "graph", "place"),
    [
        # Layer 3 has no experts: of the four nodes, those of layers 2 and 4. DeepStack levels are of blocks 0 and 2.
        (False, poisoned("MoE", 2), "decoder.onnx", "text: .* in the keys of layer 3, .* up to the values of layer 2,"),
        (False, poisoned("MoE", 3), "decoder.onnx", "text: .* in the logits of the prompt, .* the values of layer 4,"),
        (True, poisoned("GroupQueryAttention", 1), "decoder.onnx", "text: .* in the keys of layer 2, .* of layer 1,"),
        (
            True,
            poisoned("MultiHeadAttention", 1),
            "vision.onnx",
            "one image: .* in visual_embeds level 2, .* 1, are",
        ),
    ],
)
def test_verify_names_the_layer_behind_which_values_are_no_numbers(
    is_dense: bool,
    change: Callable[[onnx.GraphProto], int],
    graph: str,
    place: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    engine, checkpoint = (
        request.getfixturevalue(name)
        for name in (("tiny_engine", "tiny_checkpoint") if is_dense else ("engine", "folder"))
    )
    report = verify(edit_graph(engine, tmp_path / "engine", change, graph), str(checkpoint), max_new_tokens=2)
    assert not report.passed
    assert re.match(place, report.notes[0]), report.notes
    assert report.notes[0] in report.render() and report.notes[0] in json.dumps(report.to_dict(), allow_nan=False)
    answers = [check for check in report.checks if check.name == "answer agrees"]
    # Every case is compared to its end; text alone takes nothing of the vision tower.
    assert [check.passed for check in answers] == [graph == "vision.onnx", *5 * [False]]
    assert "not finite" in answers[-1].detail["error"]


def test_router_statistics_of_known_logits() -> None:
    statistics = RouterStatistics()
    # Decided; a tie for the second place; a tie among those chosen, which changes nothing.
    logits = np.array([[3, 1, 0, 2], [5, 2, 2, 0], [4, 4, 1, 0.5]], np.float32)
    statistics.add(2, logits, 2)
    routing = statistics.layers[2]
    assert routing.tokens_per_expert.tolist() == [3, 2, 0, 1]
    assert (routing.num_tokens, routing.num_ties, routing.smallest_gap) == (3, 1, 1.0)
    # Less sharp, and all through the same experts: the other layer stays the worst, for its tie.
    statistics.add(5, np.array([[1, 0.5, 0, 0]] * 3, np.float32), 2)
    assert statistics.render() == [
        "routers of PyTorch, 2 layers: 3 tokens, 0 to 3 an expert, 3 of 8 experts unused, 1 ties, smallest gap 0.5",
        "worst is layer 2: 0 to 3 an expert, 1 of 4 experts unused, 1 ties, smallest gap 1",
        "Of tied experts an engine takes the lower index, PyTorch any: after a tie they may differ.",
    ]
    first, _ = statistics.to_dict()["layers"]
    counts = {"tokens": 3, "tokens_per_expert": [3, 2, 0, 1], "fewest": 0, "most": 3, "unused": 1}
    assert first == {"layer": 2, **counts, "ties": 1, "smallest_gap": 1.0}
    everyone = RouterStatistics()
    everyone.add(0, logits, 4)
    assert everyone.layers[0].num_ties == 0 and len(everyone.render()) == 2
    assert everyone.to_dict()["layers"][0]["smallest_gap"] is None
    assert RouterStatistics().render() == []


def logits_of(
    model: Qwen3VL, ids: torch.Tensor, cache: list[LayerCache], past: int = 0
) -> tuple[Any, list[LayerCache]]:
    """Run text tokens [S] after `past` cached ones; return logits [S, vocab] and the cache."""
    num, config = len(ids), model.config
    places = torch.arange(num)
    embeds = torch.zeros(config.num_visual_levels, 1, config.text.hidden_size)
    with torch.no_grad():
        logits, cache = model(
            ids[None],
            (places + past).expand(3, 1, num),
            torch.full((1, num), -1),
            embeds,
            torch.tensor([past]),
            places[None],
            cache,
        )
    return logits[0], cache


def test_routers_are_watched(folder: Path) -> None:
    model = load(Checkpoint.open(str(folder)))
    for layer in model.language_model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.gate.weight.data[[1, 4]] = 0  # which always tie; other equal rows may be summed in other orders
    with watched_routers(model, 40) as watched:
        logits_of(model, torch.arange(40), model.new_cache(40))
    layers = watched.statistics.layers
    assert list(layers) == [0, 1, 2, 4]  # layer 3 is dense
    for routing in layers.values():
        assert routing.num_tokens == 40
        assert routing.tokens_per_expert.sum() == 120
    assert 0 < sum(routing.num_ties for routing in layers.values()) < 160
    assert sum(gap == 0 for gap in watched.gaps.values()) == sum(routing.num_ties for routing in layers.values())


def test_an_assignment_can_be_swapped(folder: Path) -> None:
    """A router that rejects the next best expert is a swap of every assignment."""
    model, ids = load(Checkpoint.open(str(folder))), torch.arange(40)
    mlp = model.language_model.layers[2].mlp
    assert isinstance(mlp, MixtureOfExperts)

    def run(swapped: frozenset[Assignment]) -> Any:
        with watched_routers(model, 30, swapped=swapped) as watched:
            first, cache = logits_of(model, ids[:30], model.new_cache(40))
            steps, _ = logits_of(model, ids[30:], cache, 30)
        assert set(watched.gaps) == {(layer, t) for layer in (0, 1, 2, 4) for t in range(40)}
        return torch.cat([first, steps]).numpy()

    def chosen_without_the_last(router: Any, inputs: Any, _: Any) -> Any:
        (logits_TE,) = inputs
        order_TE = logits_TE.argsort(-1, descending=True)
        expert_Tk = torch.cat([order_TE[:, : router.top_k - 1], order_TE[:, router.top_k : router.top_k + 1]], -1)
        probabilities_Tk = logits_TE.softmax(-1).gather(-1, expert_Tk)
        return probabilities_Tk / probabilities_Tk.sum(-1, keepdim=True), expert_Tk

    plain, swapped = run(frozenset()), run(frozenset((2, t) for t in range(40)))
    last = run(frozenset({(4, 35)}))
    assert [t for t in range(40) if np.abs(last[t] - plain[t]).max() > 1e-4] == [35]
    handle = mlp.router.register_forward_hook(chosen_without_the_last)
    try:
        expected, _ = logits_of(model, ids, model.new_cache(40))
    finally:
        handle.remove()
    np.testing.assert_allclose(swapped, expected.numpy(), atol=1e-5)
    assert np.abs(swapped - plain).max() > 0.01
