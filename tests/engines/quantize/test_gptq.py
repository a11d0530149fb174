"""Calibrated quantisation: GPTQ against the paper's own formulation, the sliced run, the data, the manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo_training.prompts import training_prompts
from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, VISION, Bundle
from engines.lower import lower
from engines.quantize.blockwise import QuantizedBlocks, quantize_blocks
from engines.quantize.calibration import Rounding, calibrate, record_prompts
from engines.quantize.calibration_data import CalibrationPrompt, read_prompts
from engines.quantize.gptq import InputMetric, factorize, quantize_rows
from engines.quantize.slices import cut
from helpers.bundles import decoder_target
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity.metrics import kl_divergence
from runtime.errors import Qwen3VLError, UsageError
from runtime.model import Qwen3VLModel

RNG = np.random.default_rng(11)
TARGET = decoder_target(4, 128)


def gram_of_correlated_inputs(num_columns: int) -> np.ndarray:
    mixed = RNG.standard_normal((4 * num_columns, num_columns)) @ RNG.standard_normal((num_columns, num_columns))
    return (mixed.T @ mixed).astype(np.float32)


def decreasing(gram: np.ndarray) -> np.ndarray:
    """Sort the columns, so that the order of rounding is that of the columns."""
    order = np.argsort(-np.diagonal(gram))
    return gram[np.ix_(order, order)]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def plain(weights: np.ndarray, bits: int, block: int) -> QuantizedBlocks:
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % block)))
    return quantize_blocks(padded.reshape(-1, block), bits)


def cost(weights: np.ndarray, quantized: QuantizedBlocks, gram: np.ndarray) -> float:
    """tr((W - Q) H (W - Q)ᵀ)."""
    errors = (weights - quantized.dequantize().reshape(len(weights), -1)[:, : weights.shape[1]]).astype(np.float64)
    return float(np.einsum("nk,kl,nl->", errors, gram, errors))


def paper_gptq(weights: np.ndarray, gram: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Algorithm 1 without its batching: codes [N, K], by updates of all later columns with rows of H⁻¹'s factor."""
    damped = gram.astype(np.float64) / np.diagonal(gram).mean() + 0.01 * np.eye(len(gram))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    w, codes = weights.astype(np.float64), np.empty(weights.shape, np.uint8)
    for k in range(weights.shape[1]):
        if k % block == 0:
            part = np.s_[k : k + block]
            importance = (1 / np.diagonal(upper)[part] ** 2).astype(np.float32)
            found = quantize_blocks(w[:, part].astype(np.float32), bits, importance_G=importance / importance.mean())
        steps = np.rint(w[:, k] / found.scales) + found.zero_points
        codes[:, k] = np.clip(steps, 0, (1 << bits) - 1)
        error = (w[:, k] - (codes[:, k].astype(float) - found.zero_points) * found.scales) / upper[k, k]
        w[:, k:] -= np.outer(error, upper[k, k:])
    return codes


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (8, 32)])
def test_the_codes_are_those_of_the_paper(bits: int, block: int) -> None:
    weights, gram = normal(24, 192), decreasing(gram_of_correlated_inputs(192))
    codes = quantize_rows(weights, factorize(gram, block), bits).codes.reshape(24, 192)
    expected = paper_gptq(weights, gram, bits, block)
    assert (expected != plain(weights, bits, block).codes.reshape(24, 192)).mean() > 0.2
    # A near-tie that float32 rounds the other way changes what follows in its row, the more often the finer the steps.
    assert (codes == expected).all(1).mean() >= 0.5


@pytest.mark.parametrize("num_columns", [256, 96, 160])
@pytest.mark.parametrize("block", [32, 128])
def test_correlated_inputs_cost_less(num_columns: int, block: int) -> None:
    weights, gram = normal(64, num_columns), gram_of_correlated_inputs(num_columns)
    quantized = quantize_rows(weights, factorize(gram, block), 4)
    assert cost(weights, quantized, gram) < 0.6 * cost(weights, plain(weights, 4, block), gram)


def test_calibration_on_shuffled_channels_is_worse_than_none() -> None:
    weights, gram = normal(64, 256), gram_of_correlated_inputs(256)
    order = RNG.permutation(256)
    shuffled = quantize_rows(weights, factorize(gram[np.ix_(order, order)], 64), 4)
    assert cost(weights, shuffled, gram) > cost(weights, plain(weights, 4, 64), gram)


@pytest.mark.parametrize("gram", [np.eye(160), np.zeros((160, 160))])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_without_correlation_give_the_plain_search(gram: np.ndarray, bits: int) -> None:
    weights = normal(40, 160)
    found = quantize_rows(weights, factorize(gram.astype(np.float32), 32), bits)
    expected = plain(weights, bits, 32)
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.scales, expected.scales)
    assert np.array_equal(found.zero_points, expected.zero_points)


def test_padding_stands_for_zero_and_a_dead_column_is_rounded() -> None:
    weights, gram = normal(16, 96), gram_of_correlated_inputs(96)
    gram[5], gram[:, 5] = 0, 0
    stands_for = quantize_rows(weights, factorize(gram, 128), 4).dequantize()
    assert not stands_for[:, 96:].any()
    assert np.abs(stands_for[:, 5] - weights[:, 5]).max() < 0.5


@pytest.fixture(scope="module")
def demo(demo_bundle: Bundle) -> Bundle:
    return demo_bundle


def build(
    demo: Bundle, folder: Path, prompts: list[CalibrationPrompt] | None, rounding: Rounding = quantize_rows
) -> Path:
    work = folder / "work"
    work.mkdir(parents=True)
    if prompts is not None:
        demo = calibrate(demo, TARGET, prompts, work, rounding=rounding).applied_to(demo)
    build_engine(demo, TARGET, folder / "engine")
    return folder / "engine"


def question(index: int) -> list[dict[str, object]]:
    text, _ = held_out(index).tasks["read"]
    return [
        {"role": "user", "content": [{"type": "image", "image": held_out(index).image}, {"type": "text", "text": text}]}
    ]


@dataclass(frozen=True)
class Outcome:
    """Mean KL to float32 on held-out canvases, and what the manifest says of the calibration."""

    divergence: float
    record: dict[str, object] | None


@pytest.fixture(scope="module")
def outcomes(demo: Bundle, demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    def shuffled(weights: np.ndarray, metric: InputMetric, bits: int) -> QuantizedBlocks:
        order = np.random.default_rng(0).permutation(weights.shape[1])
        gram = (metric.factor_KK @ metric.factor_KK.T)[np.ix_(order, order)]
        return quantize_rows(weights, factorize(gram, metric.block), bits)

    reference = Qwen3VLModel.from_engine(demo_engine)
    expected = [reference.logits(question(index)) for index in range(6)]
    prompts = training_prompts(12)
    result = {}
    for name, chosen, rounding in (
        ("plain", None, quantize_rows),
        ("calibrated", prompts, quantize_rows),
        ("shuffled", prompts, shuffled),
    ):
        model = Qwen3VLModel.from_engine(build(demo, tmp_path_factory.mktemp(name), chosen, rounding))
        found = [model.logits(question(index)) for index in range(6)]
        divergence = np.mean([kl_divergence(f, e).mean() for f, e in zip(found, expected, strict=True)])
        result[name] = Outcome(float(divergence), model.manifest.source.get("calibration"))
    return result


def test_calibration_brings_the_demo_closer_to_float32(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["calibrated"].divergence < 0.5 * outcomes["plain"].divergence


def test_the_demo_on_shuffled_channels_is_further_away(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["shuffled"].divergence > outcomes["plain"].divergence


def test_the_manifest_records_the_calibration(outcomes: dict[str, Outcome], demo: Bundle, tmp_path: Path) -> None:
    assert outcomes["plain"].record is None
    of_twelve = record_prompts(demo, training_prompts(12))
    of_eleven = record_prompts(demo, training_prompts(11))
    num_tokens = sum(sample["input_ids"].size for sample in of_twelve.prompts)
    expected = {"method": "gptq", "prompts": 12, "tokens": num_tokens, "sha256": of_twelve.sha256}
    assert outcomes["calibrated"].record == outcomes["shuffled"].record == expected
    assert len(of_eleven.sha256) == 64 and of_eleven.sha256 != of_twelve.sha256


@pytest.mark.parametrize("max_bytes", [200_000, 1 << 30])
def test_a_sliced_run_computes_what_the_engine_computes(
    max_bytes: int, demo: Bundle, demo_engine: Path, tmp_path: Path
) -> None:
    prompt = CalibrationPrompt("here", question(3))
    fp32 = registry.get("ort-cpu-fp32")
    record = record_prompts(demo, [prompt])
    samples = {VISION: record.images[0], DECODER: record.prompts[0]}
    for name in (VISION, DECODER):
        graph = lower(demo.graphs[name].clone(), fp32, demo.config, ()).graph
        parts = list(cut(graph, {}, graph.outputs[:1], max_bytes))
        assert (len(parts) > 4) == (max_bytes == 200_000)
        for part in parts:
            part.open(samples[name], tmp_path).advance(samples[name])
        assert list(samples[name]) == [graph.outputs[0].name]
        if name == VISION:
            samples[DECODER]["visual_embeds"] = samples[name]["visual_embeds"]
    model = Qwen3VLModel.from_engine(demo_engine)
    np.testing.assert_allclose(samples[DECODER]["logits"][0], model.logits(prompt.messages), atol=2e-4)


def test_a_target_without_blocks_and_an_empty_set_are_refused(demo: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ort-cpu-fp32 stores no weights in blocks"):
        calibrate(demo, registry.get("ort-cpu-fp32"), training_prompts(1), tmp_path)
    with pytest.raises(UsageError, match="the calibration set is empty"):
        calibrate(demo, TARGET, [], tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['[{"role": "user", "content": "' + "a b " * 4000 + '"}]'], ":1: this prompt has .* tokens, at most 4096"),
        (['[{"role": "user", "content": "a"}]', '[{"role": "nobody", "content": "a"}]'], ":2: .*unknown role"),
        (
            [
                '[{"role": "user", "content": "a"}]',
                '[{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]',
            ],
            ":2: .*no.png",
        ),
        (['[{"role": "user", "content": "' + "a b " * 1000 + '"}]'] * 30, "the calibration set up to here has"),
    ],
)
def test_a_prompt_that_cannot_be_taken_is_named(lines: list[str], message: str, demo: Bundle, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    (tmp_path / "work").mkdir()
    with pytest.raises(Qwen3VLError, match=rf"set\.jsonl{message}" if message[0] == ":" else message):
        calibrate(demo, TARGET, read_prompts(tmp_path), tmp_path / "work")


def test_conversations_and_questions_are_read_from_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("What is this?\n\nWhere?\n")
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "b"},
    ]
    (tmp_path / "set.jsonl").write_text(json.dumps({"messages": conversation}) + "\n\n" + json.dumps(conversation))
    prompts = read_prompts(tmp_path)
    assert [Path(prompt.place).name for prompt in prompts] == [
        "set.jsonl:1",
        "set.jsonl:3",
        "prompts.txt:1",
        "prompts.txt:3",
        "prompts.txt:1",
    ]
    assert prompts[0].messages == prompts[1].messages
    assert prompts[0].messages[0]["content"][0]["image"] == str(tmp_path / "b.png")
    assert prompts[0].messages[1] == conversation[1]
    asked = [tuple(part.get("image", part.get("text")) for part in p.messages[0]["content"]) for p in prompts[2:]]
    images = [str(tmp_path / name) for name in ("a.jpg", "b.png", "c.png")]
    assert asked == list(zip(images, ["What is this?", "Where?", "What is this?"], strict=True))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the calibration set is empty"),
        ({"set.jsonl": "\n"}, "the calibration set is empty"),
        ({"prompts.txt": "\n"}, r"prompts\.txt: empty"),
        ({"a.png": ""}, r"images without prompts\.txt"),
        ({"set.jsonl": '[]\n[{"role"'}, r"set\.jsonl:2: not readable as JSON"),
        ({"set.jsonl": '{"text": "a"}'}, r"set\.jsonl:1: expected a list of messages"),
        ({"set.jsonl": '["a"]'}, r"set\.jsonl:1: expected a list of messages"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, contents in files.items():
        (tmp_path / name).write_text(contents)
    with pytest.raises(UsageError, match=message):
        read_prompts(tmp_path)
    with pytest.raises(UsageError, match="no such folder of calibration prompts"):
        read_prompts(tmp_path / "missing")
