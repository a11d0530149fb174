"""Our definition of the model without transformers: keys, calls with and without a cache, loading, gradients."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import configs
from engines.weight_shapes import weight_shapes
from helpers import own_model
from helpers.damage import rewrite
from helpers.moe_checkpoints import write_experts
from helpers.random_checkpoints import random_model, tiny_values
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.demo import IMAGES
from qwen3vl_export.eager import DTYPES, load, open_eager
from qwen3vl_export.modeling import LanguageModel, Qwen3VL
from runtime.errors import CheckpointError, UsageError
from runtime.generation import prefill
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.model_config import ModelConfig

pytestmark = pytest.mark.portable

SHAPES = ["tiny", "tiny-moe"]


def model_of(shape: str, **changes: Any) -> Qwen3VL:
    return random_model(tiny_values(shape, **changes))


def inputs_of(model: Qwen3VL, *prompts: list[int | tuple[int, int]]) -> dict[str, Tensor]:
    """Make a batch, padded on the right: a number is so many random text tokens, a pair the merged grid of an image."""
    rng, config, merge = np.random.default_rng(0), model.config, model.config.vision.spatial_merge_size
    rows, grids = [], []
    for prompt in prompts:
        tokens: list[int] = []
        for piece in prompt:
            if isinstance(piece, int):
                tokens += rng.integers(0, 300, piece).tolist()
            else:
                tokens += [config.image_token_id] * (piece[0] * piece[1])
                grids.append((1, piece[0] * merge, piece[1] * merge))
        rows.append(tokens)
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    if grids:
        shape = sum(h * w for _, h, w in grids), config.vision.patch_elements
        inputs["pixel_values"] = torch.from_numpy(rng.uniform(-1, 1, shape)).float()
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


PROMPT: list[int | tuple[int, int]] = [3, (2, 3), 2, (4, 2), 5]


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_keys_and_shapes_are_those_of_the_shipped_checkpoints(name: str) -> None:
    checkpoint = Checkpoint.open(name)
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in Qwen3VL(checkpoint.config).state_dict().items()}
    assert found.pop(HEAD_KEY) == found[EMBEDDING_KEY]  # tied
    assert found == weight_shapes(checkpoint.config)
    stored = {key: entry.shape for key, entry in checkpoint.entries.items()}
    assert set(stored) == set(found)
    turned = {key for key in found if stored[key] != found[key]}
    assert all(".mlp.experts." in key and sorted(stored[key]) == sorted(found[key]) for key in turned)


@pytest.mark.parametrize("shape", configs.names("models"))
def test_keys_and_shapes_of_every_size(shape: str) -> None:
    config = ModelConfig.from_hf({"model_type": "qwen3_vl", **configs.load(f"models/{shape}")})
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in Qwen3VL(config).state_dict().items()}
    if config.text.tie_word_embeddings:
        assert found.pop(HEAD_KEY) == found[EMBEDDING_KEY]
    assert found == weight_shapes(config)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [[4, 1, 9], [1] * 5], ids=["chunks", "prefill and steps"])
def test_in_pieces_equals_the_whole(shape: str, sizes: list[int]) -> None:
    model = model_of(shape)
    inputs = inputs_of(model, PROMPT)
    ids, positions, rows, embeds = own_model.decoder_arguments(model, inputs)
    expected = own_model.run(model, inputs)
    length, start, found = ids.shape[1], 0, []
    cache = model.new_cache(length + 4)
    for size in [length - sum(sizes), *sizes]:
        part = slice(start, start + size)
        every = torch.arange(size)[None]
        with torch.no_grad():
            logits, cache = model(
                ids[:, part], positions[..., part], rows[:, part], embeds, torch.tensor([start]), every, cache
            )
        found.append(logits)
        start += size
    assert start == length and float(expected.std()) > 0.5
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_with_padding_equals_its_prompts_alone(shape: str) -> None:
    model = model_of(shape)
    prompts = [PROMPT, [4], [1, (3, 3), 6]]
    batch = inputs_of(model, *prompts)
    found, start = own_model.run(model, batch), 0
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {"input_ids": batch["input_ids"][i : i + 1, :length]}
        grids = [grid for grid, row in zip(batch["image_grid_thw"].tolist(), (0, 0, 2), strict=True) if row == i]
        if grids:
            num_patches = sum(h * w for _, h, w in grids)
            alone["pixel_values"] = batch["pixel_values"][start : start + num_patches]
            alone["image_grid_thw"] = torch.tensor(grids)
            start += num_patches
        torch.testing.assert_close(found[i, :length], own_model.run(model, alone)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_cache_equals_with_one(shape: str) -> None:
    model = model_of(shape)
    inputs = inputs_of(model, PROMPT)
    with torch.no_grad():
        found = model.lm_head(own_model.hidden_states(model, inputs))
    torch.testing.assert_close(found, own_model.run(model, inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_of_the_callers_own_packs_two_texts(shape: str) -> None:
    """Two texts in one sequence that do not see each other are the two texts alone."""
    model = model_of(shape)
    texts = [inputs_of(model, [7]), inputs_of(model, [2, (2, 2), 3])]
    alone = [own_model.hidden_states(model, each) for each in texts]
    (first, first_positions, first_rows, _), (second, second_positions, second_rows, embeds) = (
        own_model.decoder_arguments(model, each) for each in texts
    )
    ids = torch.cat([first, second], 1)
    positions = torch.cat([first_positions, second_positions], 2)
    rows = torch.cat([first_rows, second_rows], 1)
    text_of = torch.tensor([0] * 7 + [1] * 9)
    visible = (text_of[:, None] == text_of) & torch.ones(16, 16, dtype=torch.bool).tril()

    def run(**options: Any) -> Tensor:
        with torch.no_grad():
            hidden, presents = model.language_model(ids, positions, rows, embeds, **options)
            assert presents == []
            return model.language_model.norm(hidden)

    torch.testing.assert_close(run(visible=visible), torch.cat(alone, 1), atol=1e-4, rtol=0)
    assert float((run()[:, 7:] - alone[1]).abs().max()) > 0.01
    # Broadcast over batch and heads, too.
    torch.testing.assert_close(run(visible=visible[None, None]), run(visible=visible), atol=0, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_gets_a_gradient(shape: str) -> None:
    model = model_of(shape).train()
    prompts = inputs_of(model, [30, (2, 3), 2, (4, 2), 40])
    ids, positions, rows, _ = own_model.decoder_arguments(model, prompts)
    embeds = torch.cat(own_model.visual_levels(model, prompts["pixel_values"], prompts["image_grid_thw"], grad=True), 1)
    length = ids.shape[1]
    every, past = torch.arange(length)[None], torch.tensor([0])
    logits, _ = model(ids, positions, rows, embeds, past, every, model.new_cache(length))
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("shape", SHAPES)
def test_while_exporting_operators_are_single_nodes(shape: str) -> None:
    """torch.export sees the operators, not what they are made of; its program computes what the eager model does."""
    model = model_of(shape)
    inputs = inputs_of(model, PROMPT)
    length = inputs["input_ids"].shape[1]
    arguments = (*own_model.decoder_arguments(model, inputs), torch.tensor([0]), torch.arange(length)[None])
    cache = model.new_cache(length)
    with torch.no_grad():
        program = torch.export.export(model, (*arguments, cache))
    counts = Counter(str(node.target) for node in program.graph.nodes if "qwen3vl" in str(node.target))
    layers, sparse = 5, 4 if shape == "tiny-moe" else 0
    assert counts == Counter(
        {
            "qwen3vl.rms_norm.default": 2 * layers + 1,
            "qwen3vl.causal_attention.default": layers,
            **({"qwen3vl.mixture_of_experts.default": sparse} if sparse else {}),
        }
    )
    assert not any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        logits, presents = program.module()(*arguments, cache)
    torch.testing.assert_close(logits, own_model.run(model, inputs), atol=1e-4, rtol=0)
    assert len(presents) == layers


def test_unsorted_levels_come_in_the_order_of_the_blocks() -> None:
    sorted_, unsorted = (
        model_of("tiny", vision_config={"deepstack_visual_indexes": order}) for order in ([0, 2], [2, 0])
    )
    weights = dict(sorted_.state_dict())
    for key in [key for key in weights if ".deepstack_merger_list.0." in key]:
        other = key.replace("_list.0.", "_list.1.")
        weights[key], weights[other] = weights[other], weights[key]
    unsorted.load_state_dict(weights)
    inputs = inputs_of(sorted_, PROMPT)
    assert torch.equal(own_model.run(sorted_, inputs), own_model.run(unsorted, inputs))


def test_initialize_is_the_start_of_a_training() -> None:
    torch.manual_seed(0)
    model = Qwen3VL(ModelConfig.from_hf(tiny_values("tiny-moe"))).initialize(std=0.05)
    for name, parameter in model.state_dict().items():
        if parameter.ndim > 1:
            assert float(parameter.mean().abs()) < 0.01 and 0.045 < float(parameter.std()) < 0.055, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_has_the_type_of_the_weights(dtype: str) -> None:
    model = model_of("tiny").to(DTYPES[dtype])
    cache = model.new_cache(9, batch=2)
    assert len(cache) == 5
    for each in (half for pair in cache for half in pair):
        assert each.dtype == DTYPES[dtype] and each.shape == (2, 2, 9, 32) and not each.any()
    logits, presents = model(
        torch.zeros(2, 3, dtype=torch.int64),
        torch.arange(3).expand(3, 2, 3),
        torch.full((2, 3), -1),
        torch.zeros(3, 1, 48, dtype=DTYPES[dtype]),
        torch.tensor([0, 4]),
        torch.tensor([[2], [0]]),
        cache,
    )
    assert logits.dtype == torch.float32 and logits.shape == (2, 1, 480)
    assert all(half.dtype == DTYPES[dtype] for pair in presents for half in pair)
    assert not any(half.any() for pair in cache for half in pair)


def test_a_mask_beside_a_cache_is_our_own_bug() -> None:
    model = model_of("tiny")
    arguments = own_model.decoder_arguments(model, inputs_of(model, [3]))
    assert isinstance(model.language_model, LanguageModel)
    with pytest.raises(AssertionError, match="past_lengths"):
        model.language_model(
            *arguments, past_lengths=torch.tensor([0]), cache=model.new_cache(3), visible=torch.ones(3, 3) > 0
        )


def questions(*indices: int) -> list[tuple[Any, str]]:
    truth = json.loads((IMAGES / "truth.json").read_text())
    return [(user_message(truth[i]["question"], [IMAGES / truth[i]["file"]]), truth[i]["answer"]) for i in indices]


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_shipped_pictures_are_answered(name: str) -> None:
    model = open_eager(name)
    assert model.manifest.capabilities["precision"] == "float32"
    for messages, answer in questions(0, 1, 2):
        result = model.generate(messages)
        assert (result.text, result.finish_reason) == (answer, "eos")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_the_bytes(dtype: str) -> None:
    model = open_eager("demo", dtype=dtype)
    assert model.manifest.capabilities == {"precision": dtype, "cache_dtype": dtype, "device": "cpu"}
    cache = model.session.new_cache(10)
    assert cache.num_bytes * 2 == open_eager("demo").session.new_cache(10).num_bytes == 4 * 4 * 2 * 2 * 10 * 64
    ((messages, answer),) = questions(0)
    assert model.generate(messages).text == answer


@pytest.mark.parametrize(("name", "engine"), [("demo", "demo_engine"), ("demo-moe", "demo_moe_engine")])
def test_logits_equal_those_of_the_engine(name: str, engine: str, request: pytest.FixtureRequest) -> None:
    eager = open_eager(name)
    built = Qwen3VLModel.from_engine(request.getfixturevalue(engine), threads=2)
    for messages, _ in questions(0, 3):
        found, expected = eager.logits(messages), built.logits(messages)
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
        assert (found.argmax(-1) == expected.argmax(-1)).all() and expected.std() > 1


def test_cache_of_the_session_is_the_engines(demo_engine: Path) -> None:
    eager, built = open_eager("demo"), Qwen3VLModel.from_engine(demo_engine, threads=2)
    ((messages, _),) = questions(0)
    caches = []
    for model in (eager, built):
        prepared = model.prepare(messages)
        ids, embeds = prepared.prompt.input_ids, model.encode_images(prepared.images)
        cache = model.session.new_cache(len(ids) + 5)
        prefill(model.session, cache, prepared.decoder_inputs(embeds), chunk=7)
        caches.append([half[:, :, : len(ids)] for i in range(4) for half in cache.layer(i)])
        assert cache.capacity == len(ids) + 5
    for found, expected in zip(*caches, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        ({"dtype": "int8"}, "dtype 'int8'", "float32, bfloat16, float16"),
        ({"dtype": "torch.float16"}, "dtype 'torch.float16'", "float32, bfloat16, float16"),
        ({"device": "tpu9"}, "device 'tpu9'", "give 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99'", "give 'cpu'"),
    ],
)
def test_types_and_devices_that_are_not_there(options: dict[str, str], words: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        open_eager("demo", **options)
    assert caught.value.remedy is not None and remedy in caught.value.remedy


KEY = "model.language_model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY} is missing"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].T.copy()}), rf"{KEY} has shape \[48, 128\], .* \[128, 48\]"),
        (lambda tensors: tensors.update({"model.visual.extra": tensors[KEY]}), "1 keys belong to no part"),
    ],
    ids=["missing", "other shape", "left over"],
)
def test_weights_that_do_not_fit(tiny_checkpoint: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(Checkpoint.open(str(folder)))
    assert caught.value.remedy


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_experts(tmp_path / "checkpoint")
    key = "model.language_model.layers.4.mlp.experts.down_proj"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key][:-1]}))
    with pytest.raises(CheckpointError, match="down_proj") as caught:
        load(Checkpoint.open(str(folder)))
    assert caught.value.remedy


def test_a_folder_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        open_eager("no such folder")
    assert caught.value.remedy
