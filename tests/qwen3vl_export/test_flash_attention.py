"""The attention on PyTorch's flash kernel: equal to the eager one, on that kernel alone, or an error."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

from helpers import own_model
from helpers.random_checkpoints import random_model, randomise, tiny_values
from qwen3vl_export import flash_attention
from qwen3vl_export.eager import open_eager
from qwen3vl_export.flash_attention import FlashAttention2, VisionFlashAttention2, use_flash_attention
from qwen3vl_export.modeling import CausalAttention, Qwen3VL, VisionAttention
from runtime.errors import UsageError
from runtime.model_config import ModelConfig

pytestmark = pytest.mark.portable

T = 24
CONFIG = ModelConfig.from_hf(tiny_values())
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest difference of outputs whose standard deviation is about 1; in half precision both round, at other places."""
FLASH, FLASH_BACKWARD = (f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward"))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(eager: Any, flash: Any) -> tuple[Any, Any]:
    """Return a module of each kind with the same random weights."""
    torch.manual_seed(0)
    flash.load_state_dict(randomise(eager).state_dict())
    return eager.eval(), flash.eval()


def decoder_pair() -> tuple[CausalAttention, FlashAttention2]:
    text = CONFIG.text
    assert text.num_heads != text.num_kv_heads and text.head_dim != text.hidden_size // text.num_heads
    return pair(CausalAttention(text), FlashAttention2(text))


def decoder_inputs(num_new: int, past: list[int]) -> tuple[Tensor, ...]:
    text, batch = CONFIG.text, len(past)
    angles = normal(1, batch, num_new, text.head_dim // 2)
    cache = (normal(seed, batch, text.num_kv_heads, T, text.head_dim) for seed in (2, 3))
    return 3 * normal(0, batch, num_new, text.hidden_size), angles.cos(), angles.sin(), *cache, torch.tensor(past)


def vision_inputs() -> tuple[Tensor, ...]:
    vision = CONFIG.vision
    angles = normal(1, 12, vision.head_dim // 2)
    return normal(0, 3, 12, vision.hidden_size), angles.cos(), angles.sin()


def cast(dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in tensors)


def kernels_of(call: Callable[[], object]) -> Counter[str]:
    """Count the kernels of attention that really run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = (event.name for event in profile.events())
    return Counter(name for name in names if name.startswith("aten::_scaled_dot_product"))


CALLS = [(6, [0]), (5, [0, 0, 0]), (4, [9]), (3, [7, 0, 2]), (1, [11]), (1, [5, 17, 0])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_new", "past"), CALLS)
def test_decoder_attention_equals_eager(num_new: int, past: list[int], dtype: torch.dtype) -> None:
    eager, flash = (each.to(dtype) for each in decoder_pair())
    inputs = cast(dtype, decoder_inputs(num_new, past))
    found, expected = flash(*inputs), eager(*inputs)
    assert float(expected[0].detach().float().std()) > 0.3
    torch.testing.assert_close(found[0], expected[0], atol=TOLERANCE[dtype], rtol=0)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(got, want)
    assert kernels_of(lambda: flash(*inputs)) == {FLASH: len(past)}


@pytest.mark.parametrize("num_new", [1, 4])
def test_rows_that_are_not_valid_are_not_read(num_new: int) -> None:
    _, flash = decoder_pair()
    inputs = decoder_inputs(num_new, [3, 8])
    expected = flash(*inputs)[0]
    for half in inputs[3:5]:
        half[0, :, 3:] = half[1, :, 8:] = float("nan")
    assert torch.equal(flash(*inputs)[0], expected) and expected.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_text_without_a_cache_equals_eager(dtype: torch.dtype) -> None:
    eager, flash = (each.to(dtype) for each in decoder_pair())
    inputs = cast(dtype, decoder_inputs(9, [0, 0])[:3])
    packed = torch.ones(9, 9, dtype=torch.bool).tril()
    packed[5:, :5] = False
    outputs = []
    for visible in (None, packed):
        outputs.append(flash.without_cache(*inputs, visible))
        expected = eager.without_cache(*inputs, visible)
        torch.testing.assert_close(outputs[-1], expected, atol=TOLERANCE[dtype], rtol=0)
        assert kernels_of(lambda visible=visible: flash.without_cache(*inputs, visible)) == {FLASH: 1}
    assert float((outputs[0] - outputs[1]).detach().abs().max()) > 0.1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vision_attention_equals_eager(dtype: torch.dtype) -> None:
    kinds = pair(VisionAttention(CONFIG.vision), VisionFlashAttention2(CONFIG.vision))
    eager, flash = (each.to(dtype) for each in kinds)
    inputs = cast(dtype, vision_inputs())
    expected = eager(*inputs)
    assert float(expected.detach().float().std()) > 0.3
    torch.testing.assert_close(flash(*inputs), expected, atol=TOLERANCE[dtype], rtol=0)
    assert kernels_of(lambda: flash(*inputs)) == {FLASH: 1}


@pytest.mark.parametrize(("num_new", "past"), [(6, [0]), (3, [7, 2])])
def test_gradients_are_those_of_eager(num_new: int, past: list[int]) -> None:
    gradients = []
    factors = normal(9, len(past), num_new, CONFIG.text.hidden_size)
    for module in decoder_pair():
        inputs = [each.requires_grad_(each.is_floating_point()) for each in decoder_inputs(num_new, past)]
        (module(*inputs)[0] * factors).sum().backward()
        leaves = [*module.parameters(), *(each for each in inputs if each.requires_grad)]
        gradients.append([leaf.grad for leaf in leaves])
    for i, (found, expected) in enumerate(zip(*gradients, strict=True)):
        is_cache = i >= len(gradients[0]) - 2
        assert float(expected.abs().max()) > 1e-3 or (is_cache and not any(past))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    _, flash = decoder_pair()
    ran = kernels_of(lambda: flash(*decoder_inputs(num_new, past))[0].sum().backward())
    assert ran == {FLASH: len(past), FLASH_BACKWARD: len(past)}


def test_a_wrong_alignment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that begins at the first row of the cache and not after the past: calls without a past stay right."""
    eager, flash = decoder_pair()
    monkeypatch.setattr(flash_attention, "causal_lower_right", causal_upper_left)
    for num_new, past in CALLS:
        inputs = decoder_inputs(num_new, past)
        worst = float((flash(*inputs)[0] - eager(*inputs)[0]).detach().abs().max())
        assert worst > 0.1 if any(past) else worst < TOLERANCE[torch.float32]


def prompts_of(config: ModelConfig) -> dict[str, Tensor]:
    """Two prompts, the second padded on the right; images of 2 × 3 and 4 × 2 tokens in the first."""
    image, merge = config.image_token_id, config.vision.spatial_merge_size
    first = [3, 5, *[image] * 6, 7, *[image] * 8, 11, 13]
    grids = [(1, 2 * merge, 3 * merge), (1, 4 * merge, 2 * merge)]
    return {
        "input_ids": torch.tensor([first, [17, 19, 23] + [0] * (len(first) - 3)]),
        "attention_mask": torch.tensor([[1] * len(first), [1] * 3 + [0] * (len(first) - 3)]),
        "pixel_values": normal(4, sum(h * w for _, h, w in grids), config.vision.patch_elements),
        "image_grid_thw": torch.tensor(grids),
    }


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_a_whole_model_takes_it(shape: str) -> None:
    eager = random_model(tiny_values(shape))
    flash = use_flash_attention(copy.deepcopy(eager))
    assert list(flash.state_dict()) == list(eager.state_dict())
    inputs = prompts_of(eager.config)
    expected = own_model.run(eager, inputs)
    text, vision = eager.config.text.num_layers, eager.config.vision.depth
    assert kernels_of(lambda: own_model.run(flash, inputs)) == {FLASH: 2 * text + 2 * vision}
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        torch.testing.assert_close(own_model.run(flash, inputs)[b, :length], expected[b, :length], atol=2e-4, rtol=0)
    # Token by token after the prompt, and without a cache.
    first = {name: each[:1] if len(each) == 2 and "image" not in name else each for name, each in inputs.items()}
    (tokens, logits), (expected_tokens, expected_logits) = (own_model.greedy(each, first, 5) for each in (flash, eager))
    assert tokens == expected_tokens
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=0)
    found, expected = (own_model.hidden_states(each, first) for each in (flash, eager))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_the_parameters_stay_the_same_objects() -> None:
    model = random_model(tiny_values()).train()
    frozen = model.language_model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    assert use_flash_attention(model) is model and isinstance(model, Qwen3VL)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert not frozen.requires_grad and all(module.training for module in model.modules())
    kinds = Counter(
        type(module) for module in model.modules() if isinstance(module, (CausalAttention, VisionAttention))
    )
    assert kinds == {FlashAttention2: 5, VisionFlashAttention2: 4}


def test_the_demo_answers_with_it() -> None:
    model = open_eager("demo")
    expected = model.logits("Count.")
    use_flash_attention(model.session.model)
    assert abs(model.logits("Count.") - expected).max() < 1e-3


def test_what_the_kernel_does_not_take_is_an_error() -> None:
    eager, flash = decoder_pair()
    inputs = decoder_inputs(3, [0])[:3]
    bias = torch.zeros(3, 3, requires_grad=True)
    eager.without_cache(*inputs, bias)
    with pytest.raises(UsageError, match=r"does not take these inputs: torch\.float32 on cpu") as caught:
        flash.without_cache(*inputs, bias)
    assert "masks without a gradient; on an NVIDIA GPU from SM 8.0 on bfloat16 and float16" in str(caught.value.remedy)
    vision = VisionFlashAttention2(CONFIG.vision)
    for call in (
        lambda: flash.to("meta").without_cache(*(each.to("meta") for each in inputs), None),
        lambda: flash(*(each.to("meta") for each in decoder_inputs(3, [0])[:5]), torch.tensor([0], device="cpu")),
        lambda: vision.to("meta")(*(each.to("meta") for each in vision_inputs())),
    ):
        with pytest.raises(UsageError, match="on meta: there is no kernel"):
            call()


def test_other_errors_of_a_call_stay_what_they_are() -> None:
    flash = decoder_pair()[1].to(torch.bfloat16)
    x, cos, sin = decoder_inputs(3, [0])[:3]
    with pytest.raises(RuntimeError, match="to have the same dtype"):
        flash.without_cache(x.to(torch.bfloat16), cos, sin, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    eager, flash = (each.to("cuda", dtype) for each in decoder_pair())
    for num_new, past in CALLS:
        inputs = tuple(each.cuda() for each in cast(dtype, decoder_inputs(num_new, past)))
        found, expected = flash(*inputs)[0], eager(*inputs)[0]
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
        assert kernels_of(lambda inputs=inputs: flash(*inputs))[FLASH.removesuffix("_for_cpu")] == len(past)
    x, cos, sin = (each.cuda() for each in cast(dtype, decoder_inputs(9, [0])[:3]))
    found, expected = (module.without_cache(x, cos, sin, None) for module in (flash, eager))
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    with pytest.raises(UsageError, match=r"does not take these inputs: torch\.\w+16 on cuda"):
        flash.without_cache(x, cos, sin, torch.ones(9, 9, dtype=torch.bool, device="cuda").tril())
    with pytest.raises(UsageError, match=r"does not take these inputs: torch\.float32 on cuda"):
        flash.float()(*(each.cuda() for each in decoder_inputs(3, [2])))
    kinds = pair(VisionAttention(CONFIG.vision), VisionFlashAttention2(CONFIG.vision))
    inputs = tuple(each.cuda() for each in cast(dtype, vision_inputs()))
    expected, found = (each.to("cuda", dtype)(*inputs) for each in kinds)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
