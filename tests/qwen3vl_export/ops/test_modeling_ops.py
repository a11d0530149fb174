"""The operators in plain torch: equal to their references, to their forms in a trace, in every type, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3vl_export.ops import causal_attention, mixture_of_experts, rms_norm, vision_attention

pytestmark = pytest.mark.portable

N, K, H, T = 6, 2, 16, 20
E, D, WIDTH = 7, 24, 20
Arguments = tuple[Any, ...]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Largest difference from float64 on the same rounded inputs, in standard deviations; measured: a third of it."""


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def causal_arguments(num_new: int, past: list[int]) -> Arguments:
    rng, batch = np.random.default_rng(num_new), len(past)
    angles = normal(rng, batch, num_new, H // 2)
    return (
        normal(rng, batch, num_new, N * H),
        normal(rng, batch, num_new, K * H),
        normal(rng, batch, num_new, K * H),
        *(normal(rng, H) for _ in range(2)),
        *(angles.cos(), angles.sin()),
        *(normal(rng, batch, K, T, H) for _ in range(2)),
        torch.tensor(past),
        *(0.2, 1e-6),
    )


def vision_arguments(num_segments: int = 3, num_patches: int = 12) -> Arguments:
    rng = np.random.default_rng(num_patches)
    angles = normal(rng, num_patches, 10)
    inputs = (normal(rng, num_segments, num_patches, 2 * 20) for _ in range(3))
    return (*inputs, angles.cos(), angles.sin(), 2, 0.3)


def experts_arguments(batch: int, num_new: int, top_k: int) -> Arguments:
    rng = np.random.default_rng(top_k)
    weights = (normal(rng, E, D), normal(rng, E, 2 * WIDTH, D), normal(rng, E, D, WIDTH))
    return (normal(rng, batch, num_new, D), *weights, top_k)


def norm_arguments() -> Arguments:
    rng = np.random.default_rng(0)
    return (normal(rng, 2, 5, D) * 3, normal(rng, D), 1e-6)


def norm_reference(x: Any, weight: Any, epsilon: float) -> Any:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def causal_reference(*arguments: Any) -> Any:
    *tensors, scale, epsilon = arguments
    return causal_attention.reference(*tensors, scale=scale, epsilon=epsilon)


def vision_reference(*arguments: Any) -> Any:
    *tensors, num_heads, scale = arguments
    return vision_attention.reference(*tensors, num_heads=num_heads, scale=scale)


def experts_reference(*arguments: Any) -> Any:
    *tensors, top_k = arguments
    return mixture_of_experts.reference(*tensors, top_k=top_k)


# The operator, the arguments of a call, and its reference.
CASES: dict[str, tuple[Any, Callable[[], Arguments], Callable[..., Any]]] = {
    "norm": (rms_norm, norm_arguments, norm_reference),
    "causal, prefill": (causal_attention, lambda: causal_arguments(5, [0]), causal_reference),
    "causal, chunk after ragged pasts": (causal_attention, lambda: causal_arguments(3, [7, 0, 2]), causal_reference),
    "causal, step": (causal_attention, lambda: causal_arguments(1, [11, 4]), causal_reference),
    "causal, full cache": (causal_attention, lambda: causal_arguments(4, [T - 4]), causal_reference),
    "vision": (vision_attention, vision_arguments, vision_reference),
    "vision, one segment": (vision_attention, lambda: vision_arguments(1, 4), vision_reference),
    "experts, one of them": (mixture_of_experts, lambda: experts_arguments(1, 1, 1), experts_reference),
    "experts": (mixture_of_experts, lambda: experts_arguments(2, 9, 3), experts_reference),
    "experts, all of them": (mixture_of_experts, lambda: experts_arguments(3, 1, E), experts_reference),
}


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_plain_form_equals_the_reference_and_keeps_the_type(name: str, dtype: torch.dtype) -> None:
    op, make, reference = CASES[name]
    arguments = cast(make(), dtype)
    if op is mixture_of_experts:
        # A router in half precision may choose other experts than one in float64: its logits are made the same.
        arguments = (arguments[0], torch.round(arguments[1] * 4) / 4, *arguments[2:])
        arguments = (torch.round(arguments[0] * 4) / 4, *arguments[1:])
    found = as_tuple(op.plain(*arguments))
    arrays = [a.double().numpy() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    expected = as_tuple(reference(*(a.numpy() if torch.is_tensor(a) else a for a in arrays)))
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        difference = np.abs(got.double().numpy() - want).max()
        assert difference <= TOLERANCE[dtype] * max(1.0, want.std()), difference


@pytest.mark.parametrize("name", CASES)
def test_operator_of_a_trace_equals_the_plain_form(name: str) -> None:
    op, make, _ = CASES[name]
    arguments = make()
    torch.library.opcheck(op.OP, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    for got, want in zip(as_tuple(op.OP(*arguments)), as_tuple(op.plain(*arguments)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_no_output_aliases_an_input_or_writes_to_one(name: str) -> None:
    op, make, _ = CASES[name]
    arguments, before = make(), make()
    outputs = as_tuple(op.plain(*arguments))
    inputs = {a.untyped_storage().data_ptr() for a in arguments if torch.is_tensor(a)}
    found = [each.untyped_storage().data_ptr() for each in outputs]
    assert inputs.isdisjoint(found) and len(set(found)) == len(found)
    for after, was in zip(arguments, before, strict=True):
        assert torch.equal(after, was) if torch.is_tensor(after) else after == was


def test_chunks_equal_the_whole() -> None:
    q, k, v, q_norm, k_norm, cos, sin, key, value, past, *scalars = causal_arguments(7, [2, 9])

    def run(start: int, stop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = [each[:, start:stop] for each in (q, k, v)]
        tables = [each[:, start:stop] for each in (cos, sin)]
        return causal_attention.plain(*part, q_norm, k_norm, *tables, key, value, past + start, *scalars)

    whole, *presents = run(0, 7, key, value)
    pieces = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out, key, value = run(start, stop, key, value)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=0)
    for got, want in zip((key, value), presents, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_rows_of_the_cache_outside_of_the_new_ones_are_kept() -> None:
    arguments = causal_arguments(3, [7, 0])
    for present, past in zip(causal_attention.plain(*arguments)[1:], arguments[7:9], strict=True):
        for b, start in enumerate((7, 0)):
            kept = [row for row in range(T) if not start <= row < start + 3]
            assert torch.equal(present[b, :, kept], past[b, :, kept])
            new = slice(start, start + 3)
            assert float((present[b, :, new] - past[b, :, new]).abs().min(-1).values.max()) > 0


def test_rows_that_a_token_does_not_see_change_nothing() -> None:
    arguments = list(causal_arguments(3, [7, 0]))
    expected = causal_attention.plain(*arguments)[0]
    for i in (7, 8):
        arguments[i] = arguments[i].clone()
        arguments[i][0, :, 10:] = arguments[i][1, :, 3:] = 1e4
    torch.testing.assert_close(causal_attention.plain(*arguments)[0], expected, atol=1e-6, rtol=0)
    arguments[8][0, :, 6] += 1
    assert float((causal_attention.plain(*arguments)[0] - expected).abs().max()) > 0.01


def test_what_a_token_sees_can_be_said() -> None:
    q, k, v = (normal(np.random.default_rng(i), 1, heads, 6, H) for i, heads in enumerate((N, K, K)))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    by_default = causal_attention.attend(q, k, v, 0.2)
    torch.testing.assert_close(causal_attention.attend(q, k, v, 0.2, causal), by_default, atol=1e-6, rtol=0)
    # Tokens 3 to 5 alone: the same as without those before them.
    block = causal.clone()
    block[3:, :3] = False
    found = causal_attention.attend(q, k, v, 0.2, block)[:, 3:]
    expected = causal_attention.attend(*(each[:, :, 3:] for each in (q, k, v)), 0.2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float((found - by_default[:, 3:]).abs().max()) > 0.01


def test_experts_that_tie() -> None:
    """PyTorch takes any of equal experts: with equal weights the result is the reference's, which takes the lowest."""
    x, router, gate_up, down, _ = experts_arguments(1, 5, 3)
    tied = [1, 2, 4, 6]
    router, x = torch.zeros_like(router), x.abs() + 0.5
    router[tied, 0] = 1
    weights, chosen = mixture_of_experts.choose(x.flatten(0, 1) @ router.T, 3)
    assert set(chosen.flatten().tolist()) <= set(tied)
    torch.testing.assert_close(weights, torch.full((5, 3), 1 / 3))
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    gate_up[tied], down[tied] = gate_up[1].clone(), down[1].clone()
    found = mixture_of_experts.plain(x, router, gate_up, down, 3)
    arrays = [each.numpy() for each in (x, router, gate_up, down)]
    np.testing.assert_allclose(found.numpy(), experts_reference(*arrays, 3), rtol=1e-4, atol=1e-4)


def test_the_sums_of_experts_are_float32() -> None:
    """Two large experts that cancel: a float16 sum would lose the third."""
    x = torch.ones(1, 1, 4, dtype=torch.float16)
    gate_up = torch.ones(3, 2, 4, dtype=torch.float16)
    down = torch.tensor([30000.0, -30000.0, 1.0], dtype=torch.float16)[:, None, None].expand(3, 4, 1).contiguous()
    inner = float(torch.nn.functional.silu(torch.tensor(4.0)) * 4)
    gate_up[:, 1] /= 16  # the product with down stays within float16
    found = mixture_of_experts.plain(x, torch.zeros(3, 4, dtype=torch.float16), gate_up, down, 3)
    assert float(found[0, 0, 0]) == pytest.approx(inner / 16 / 3, rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_plain_form_are_those_of_differences(name: str) -> None:
    """Of the sum of all outputs, along one random direction of every float input."""
    op, make, _ = CASES[name]
    arguments = make()
    rng = np.random.default_rng(1)
    floats = [i for i, a in enumerate(arguments) if torch.is_tensor(a) and a.is_floating_point()]
    factors: list[Tensor] = []

    def loss(changed: Arguments) -> Tensor:
        outputs = as_tuple(op.plain(*changed))
        if not factors:
            factors.extend(normal(rng, *each.shape) for each in outputs)
        return sum((each * factor).sum() for each, factor in zip(outputs, factors, strict=True))

    leaves = tuple(a.clone().requires_grad_() if i in floats else a for i, a in enumerate(arguments))
    gradients = torch.autograd.grad(loss(leaves), [leaves[i] for i in floats])
    for i, gradient in zip(floats, gradients, strict=True):
        assert torch.isfinite(gradient).all()
        direction = normal(rng, *gradient.shape)
        step = 1e-3 / float(direction.pow(2).mean().sqrt())
        sides = []
        for sign in (1, -1):
            changed = [*arguments]
            changed[i] = arguments[i] + sign * step * direction
            sides.append(float(loss(tuple(changed)).detach().double()))
        numeric = (sides[0] - sides[1]) / (2 * step)
        analytic = float((gradient * direction).sum())
        assert analytic == pytest.approx(numeric, rel=0.03, abs=0.15)
