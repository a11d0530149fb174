"""Every target that this machine can build and run, held to the same contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.build import check_options
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from engines.registry import all_targets
from engines.target import Target
from helpers import PICTURES
from helpers.command_line import call
from helpers.engines import build
from helpers.random_checkpoints import write_random
from helpers.targets import by_name, with_all_kernels
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.export import app as export_app
from runtime import generation
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.errors import TargetError
from runtime.model import Qwen3VLModel
from runtime.model_config import ModelConfig

TARGETS = [
    target
    for target in with_all_kernels()
    if target.availability().can_build
    and target.availability().can_run
    and (target.check_kernels is None or not target.check_kernels())
]
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": str(PICTURES / "held_out_0.png")},
            {"type": "text", "text": "Read the digits."},
        ],
    }
]

Engines = Callable[[Target], Qwen3VLModel]


@pytest.fixture(scope="module")
def engines(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    opened: dict[str, Qwen3VLModel] = {}

    def model(target: Target) -> Qwen3VLModel:
        name = by_name(target)
        if name not in opened:
            folder = build(demo_bundle, target, tmp_path_factory.mktemp("targets") / name)
            opened[name] = Qwen3VLModel.from_engine(folder, check=True)
        return opened[name]

    return model


def prompt_logits(model: Qwen3VLModel, chunk: int) -> np.ndarray:
    prepared = model.prepare(MESSAGES)
    cache = model.session.new_cache(len(prepared.prompt.input_ids))
    embeds = model.encode_images(prepared.images)
    return generation.prefill(model.session, cache, prepared.decoder_inputs(embeds, all_logits=True), chunk=chunk)


@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_a_held_out_picture_is_read(target: Target, engines: Engines) -> None:
    assert engines(target).generate(MESSAGES).text == "1654"


@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_the_manifest_repeats_the_capability_record(target: Target, engines: Engines) -> None:
    manifest = engines(target).manifest
    assert manifest.target == target.name
    capabilities = {name: value for name, value in manifest.capabilities.items() if name != "kernels"}
    assert capabilities == target.capabilities(manifest.model, BuildOptions())
    assert set(target.libraries) <= set(manifest.versions)


@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_chunks_give_the_logits_of_the_whole_prompt(target: Target, engines: Engines) -> None:
    model = engines(target)
    whole, chunked = prompt_logits(model, 512), prompt_logits(model, 5)
    # Other kernels, and one activation scale for the tokens of a call, may round otherwise, but not change the answer.
    assert np.linalg.norm(whole - chunked) <= 0.1 * np.linalg.norm(whole)
    assert whole[-1].argmax() == chunked[-1].argmax()


@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_a_step_writes_its_own_row_of_the_cache_alone(target: Target, engines: Engines) -> None:
    model = engines(target)
    prepared = model.prepare(MESSAGES)
    length = len(prepared.prompt.input_ids)
    cache = model.session.new_cache(length + 3)
    embeds = model.encode_images(prepared.images)
    logits = generation.prefill(model.session, cache, prepared.decoder_inputs(embeds))
    steps = generation.decode_steps(
        model.session, cache, logits[-1], length, prepared.positions.delta, embeds[:, :1], lambda row: int(row.argmax())
    )
    next(steps)
    before = cache.layer(1)
    next(steps)
    for old, new in zip(before, cache.layer(1), strict=True):
        assert np.array_equal(old[:, :, :length], new[:, :, :length])
        assert np.abs(new[:, :, length]).max() > 0
        assert np.array_equal(old[:, :, length + 1 :], new[:, :, length + 1 :])


def test_a_second_decoder_takes_prompts_however_they_are_cut(engines: Engines) -> None:
    (target,) = (target for target in TARGETS if target.prefill_formats is not None)
    one_graph = next(target for target in TARGETS if target.name == "ort-cpu-int4")
    with_prefill, without = engines(target), engines(one_graph)
    # The vision towers are equal. A chunk of one token takes the second decoder too: chunks depend on what runs beside.
    for chunk in (1, 5, 512):
        assert not np.array_equal(prompt_logits(with_prefill, chunk), prompt_logits(without, chunk))
    tokens, past = np.array([[3, 5, 7]]), np.zeros(1, np.int64)
    call = DecoderInputs.text(tokens, past, no_visual_embeds(with_prefill.config))
    decoded = [each.session.decode(call, each.session.new_cache(8)) for each in (with_prefill, without)]
    assert np.array_equal(*decoded), "answers and drafts run on the first decoder"


@pytest.mark.parametrize("target", [t for t in all_targets() if t.session.startswith("ort_")], ids=lambda t: t.name)
def test_heads_that_the_attention_kernel_does_not_take_are_refused_before_tracing(target: Target) -> None:
    config = Checkpoint.open("demo").config
    for head_dim in (8, 64, 128):
        check_options(target, None, with_heads(config, head_dim))
    for head_dim in (4, 12, 20):
        with pytest.raises(TargetError, match=f"text_config.head_dim is {head_dim}, expected a multiple of 8"):
            check_options(target, None, with_heads(config, head_dim))


def test_the_command_refuses_such_heads_before_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise AssertionError("traced before the target was asked")

    monkeypatch.setattr("qwen3vl_export.tracing.pieces.trace_pieces", trace)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    folder = write_random(tmp_path / "checkpoint", text_config={"head_dim": 12, "rope_parameters": rope})
    code, out, err = call(export_app, str(folder), "--output", str(tmp_path / "engine"))
    assert (code, out) == (TargetError.exit_code, "")
    assert "text_config.head_dim is 12, expected a multiple of 8" in err


def with_heads(config: ModelConfig, head_dim: int) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, head_dim=head_dim))
