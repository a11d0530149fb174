"""`--token-scores`: the attention that each visual token gets, from its definition to the prompt of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.bundle import VISION, Bundle
from engines.registry import get
from helpers.engines import build
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import EagerSession, load
from qwen3vl_export.export import export, make_bundle
from qwen3vl_export.parity.reference import OWN
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.request import ExportRequest
from runtime.contract import TOKEN_SCORES, DecoderInputs, VisionInputs
from runtime.errors import BundleError, UsageError
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.sessions.ort_cpu import OrtCpuSession
from runtime.vision_inputs import vision_inputs
from runtime.visual_pruning.choice import choose_visual_tokens
from runtime.visual_pruning.scored import ScoredEmbeds

H, W = 6, 4  # patches


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path) -> Bundle:
    return make_bundle(Checkpoint.open(str(tiny_checkpoint)), token_scores=True)


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("scored") / "engine")


@pytest.fixture(scope="module")
def model(engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(engine, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def torch_session(tiny_checkpoint: Path) -> EagerSession:
    return EagerSession(load(Checkpoint.open(str(tiny_checkpoint))))


def two_segments(model: Qwen3VLModel) -> VisionInputs:
    vision = model.config.vision
    patches = np.random.default_rng(1).normal(size=(2, H * W, vision.patch_elements)).astype(np.float32)
    return vision_inputs(patches, (2, H, W), vision)


def test_scores_are_those_of_their_definition(model: Qwen3VLModel, torch_session: EagerSession) -> None:
    """The mean over the heads of what the mean query of a segment pays to its patches, added up by token."""
    tower, vision = torch_session.model.visual, model.config.vision
    last = tower.blocks[-1]
    seen: list[torch.Tensor] = []
    hook = last.attn.qkv.register_forward_hook(lambda module, given, made: seen.append(made))
    inputs = two_segments(model)
    found = torch_session.scored_vision(inputs)
    hook.remove()
    q_IPNH, k_IPNH, _ = np.split(seen[0].double().numpy().reshape(2, H * W, 3 * vision.num_heads, -1), 3, axis=2)
    products_INP = np.einsum("inh,ipnh->inp", q_IPNH.mean(1), k_IPNH) * vision.head_dim**-0.5
    weights_INP = np.exp(products_INP)
    weights_IP = (weights_INP / weights_INP.sum(-1, keepdims=True)).mean(1)
    expected_V = weights_IP.reshape(-1, vision.patches_per_token).sum(-1)
    np.testing.assert_allclose(found.scores, expected_V, rtol=1e-5)
    np.testing.assert_allclose(found.scores.reshape(2, -1).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found.embeds, torch_session.vision(inputs))


def test_the_graph_gives_the_scores_of_torch(model: Qwen3VLModel, torch_session: EagerSession) -> None:
    inputs = two_segments(model)
    found, expected = (session.scored_vision(inputs) for session in (model.session, torch_session))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(found.embeds, expected.embeds, atol=1e-5)
    np.testing.assert_array_equal(found.embeds, model.session.vision(inputs))


@pytest.mark.parametrize("name", ["ort-cpu-int8", "ort-cpu-int4"])
def test_engines_in_few_bits_have_them(
    bundle: Bundle, torch_session: EagerSession, name: str, tmp_path: Path, model: Qwen3VLModel
) -> None:
    """With ONNX Runtime's kernels and with own ones, which compute q, k and v in one product."""
    inputs = two_segments(model)
    expected = torch_session.scored_vision(inputs)
    for target in (get(name), *get(name).other_kernels):
        with Qwen3VLModel.from_engine(build(bundle, target, tmp_path / target.kernels), threads=1) as few_bits:
            found = few_bits.session.scored_vision(inputs)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0.1)
        np.testing.assert_allclose(found.scores.reshape(2, -1).sum(1), 1, rtol=1e-5)


def test_the_contract_has_the_scores_as_a_second_output(bundle: Bundle, engine: Path, tiny_engine: Path) -> None:
    bundle.check()
    assert [value.name for value in bundle.graphs[VISION].graph.outputs] == ["visual_embeds", TOKEN_SCORES]
    assert Manifest.read(engine).capabilities[TOKEN_SCORES] is True
    assert TOKEN_SCORES not in Manifest.read(tiny_engine).capabilities
    graphs = bundle.copies()
    graphs[VISION].graph.outputs.reverse()
    with pytest.raises(BundleError, match="vision"):
        replace(bundle, graphs=graphs).check()


def test_an_engine_without_them_has_none(tiny_engine: Path) -> None:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        assert model.session.has_token_scores is False


def test_requests_choose_by_the_scores(model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside each other, where images of one grid are one call of the vision tower."""
    images = [np.random.default_rng(seed).integers(0, 256, (256, 192, 3), np.uint8) for seed in range(2)]
    messages = user_message("Which?", images)
    prepared = model.prepare(messages, visual_token_share=0.5)
    seen: list[DecoderInputs] = []
    prefill = OrtCpuSession.prefill

    def watched(session: OrtCpuSession, inputs: DecoderInputs, cache: Any, slot: int = 0) -> Any:
        seen.append(inputs)
        return prefill(session, inputs, cache, slot)

    monkeypatch.setattr(OrtCpuSession, "prefill", watched)
    model.generate(messages, max_new_tokens=1, visual_token_share=0.5)
    expected = []
    for index, image in enumerate(prepared.images):
        encoded = model.session.scored_vision(model.preparation.vision_inputs(image))
        num_kept = prepared.prompt.spans[index].num_tokens
        kept = choose_visual_tokens(encoded.embeds[0], num_kept, encoded.scores)
        assert kept.tolist() != choose_visual_tokens(encoded.embeds[0], num_kept).tolist(), "scores that change nothing"
        expected += (index * prepared.prompt.spans[index].num_rows + kept).tolist()
    rows = np.concatenate([each.visual_rows[0] for each in seen])
    assert rows[rows >= 0].tolist() == expected


def test_verify_compares_the_scores(engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checks() -> list[Any]:
        report = verify(engine, str(tiny_checkpoint), max_new_tokens=2, reference=OWN, visual_token_share=0.5)
        return [check for check in report.checks if check.name == "token_scores" or not check.passed]

    found = checks()
    assert len(found) == 6 and all(check.passed and check.name == "token_scores" for check in found)
    original = OrtCpuSession.scored_vision

    def turned(session: OrtCpuSession, inputs: VisionInputs) -> ScoredEmbeds:
        encoded = original(session, inputs)
        return replace(encoded, scores=np.roll(encoded.scores, 1))

    monkeypatch.setattr(OrtCpuSession, "scored_vision", turned)
    assert next(check.name for check in checks() if not check.passed) == "token_scores"


def test_targets_that_do_not_prune_refuse_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        str(tiny_checkpoint), target="trt-fp16", output=tmp_path / "engine", token_scores=True, compile=False
    )
    with pytest.raises(UsageError, match="--token-scores: trt-fp16 has no use for them"):
        export(request)
