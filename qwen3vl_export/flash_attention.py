"""The model's attention on PyTorch's own flash kernel (FlashAttention-2, Dao 2023, arXiv:2307.08691), or not at all.

The modules are those of `qwen3vl_export.modeling` with another way to compute: keys, parameters, inputs and outputs are
the same, with a cache and without, in training too. Where the kernel does not take an input they raise, while
PyTorch by itself would take a slower way. A trace (`torch.export`) is made of the eager modules alone.

Shapes: B batch, S new tokens, T cache capacity, N query heads, K key/value heads, H head dim, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from qwen3vl_export.modeling import CausalAttention, Qwen3VL, VisionAttention
from qwen3vl_export.ops import causal_attention
from runtime.errors import UsageError


class FlashAttention2(CausalAttention):
    """The decoder's attention; it reads the valid rows of a cache alone, whatever its capacity."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor, past_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the cache and to x [B, S, D]; see `CausalAttention.forward`.

        The kernel knows no lengths, so it runs once for each sequence, and `past_lengths` are brought to the host.

        Raises:
            UsageError: The kernel does not take the type or the device of x, or the head dim.
        """
        q_BNSH, k_BKSH, v_BKSH = causal_attention.rotated_heads(*self._projected(x), cos, sin, self.epsilon)
        num_new = x.shape[1]
        rows_B1S1 = causal_attention.cache_rows(past_lengths, num_new)
        present_key = causal_attention.with_rows(past_key, k_BKSH, rows_B1S1)
        present_value = causal_attention.with_rows(past_value, v_BKSH, rows_B1S1)
        outputs = []
        for b, past in enumerate(past_lengths.tolist()):
            length = past + num_new
            keys, values = (each[b : b + 1, :, :length].to(q_BNSH.dtype) for each in (present_key, present_value))
            # The last token sees all rows; `is_causal` alone would let the first new one see the first row only.
            visible = causal_lower_right(num_new, length)
            with _flash_kernel(x):
                outputs.append(causal_attention.attend(q_BNSH[b : b + 1], keys, values, self.scale, visible))
        return self.o_proj(torch.cat(outputs)), present_key, present_value

    def without_cache(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """Attend to x [B, S, D] alone; see `CausalAttention.without_cache`.

        Raises:
            UsageError: As `forward`; on a GPU, if `visible` is given.
        """
        with _flash_kernel(x):
            return super().without_cache(x, cos, sin, visible)


class VisionFlashAttention2(VisionAttention):
    """The attention of the vision tower."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend inside each segment; see `VisionAttention.forward`.

        Raises:
            UsageError: The kernel does not take the type or the device of x, or the head dim.
        """
        with _flash_kernel(x):
            return super().forward(x, cos, sin)


def use_flash_attention(model: Qwen3VL) -> Qwen3VL:
    """Exchange every attention of a model, in place, for the one on the flash kernel with the same parameters."""
    with torch.device("meta"):  # no memory for parameters that are exchanged at once
        for layer in model.language_model.layers:
            layer.self_attn = _with_parts_of(layer.self_attn, FlashAttention2(model.config.text))
        for block in model.visual.blocks:
            block.attn = _with_parts_of(block.attn, VisionFlashAttention2(model.config.vision))
    return model


def _with_parts_of(eager: nn.Module, flash: nn.Module) -> nn.Module:
    for name, part in eager.named_children():
        setattr(flash, name, part)
    return flash.train(eager.training)


@contextlib.contextmanager
def _flash_kernel(x: Tensor) -> Iterator[None]:
    """Let attention take the flash kernel only; x is what is attended to.

    Raises:
        UsageError: The kernel does not take the inputs.
    """
    remedy = (
        "the kernel takes float32, float64, bfloat16 and float16 on a CPU, and masks without a gradient; on an NVIDIA "
        "GPU from SM 8.0 on bfloat16 and float16, heads of up to 256, and no mask; else use the eager attention"
    )
    if x.device.type not in ("cpu", "cuda"):  # where PyTorch does not heed the choice of a kernel
        raise UsageError(f"flash attention on {x.device}: there is no kernel", remedy=remedy)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise UsageError(
            f"PyTorch's flash kernel does not take these inputs: {x.dtype} on {x.device}", remedy=remedy
        ) from error
