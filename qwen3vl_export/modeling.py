"""Qwen3-VL in plain torch, dense and with a mixture of experts: the one definition that is run, trained and traced.

Attribute names are the checkpoint's keys. A forward takes what the graph of the same name takes (docs/architecture.md):
positions and tables are made by the runtime, and a segment is one image or one temporal patch of a video. While
`torch.export` runs, norms, attention and experts are single custom operators (`qwen3vl_export.ops`); otherwise they are
PyTorch's own, on any device, in any float type, with gradients.

transformers is not needed here. Its `modeling_qwen3_vl.py` and `modeling_qwen3_vl_moe.py` are the source of the
formulas, and tests hold this file against them.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, V visual rows, I segments, P patches of a segment,
D hidden, H head dim, N query heads, K key/value heads, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_export.ops import causal_attention, mixture_of_experts, rms_norm, vision_attention
from runtime.errors import UsageError
from runtime.model_config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig

LayerCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, K, T, H] each."""

_LAYER_NORM_EPSILON = 1e-6


class Qwen3VL(nn.Module):
    """The whole model; `initialize` draws weights to train, `qwen3vl_export.eager.load` takes a checkpoint's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise UsageError(
                f"config must be a ModelConfig, got {type(config).__name__}",
                remedy="read a config.json with runtime.model_config.ModelConfig.from_hf",
            )
        self.config = config
        self.model = nn.ModuleDict({"visual": VisionTower(config), "language_model": LanguageModel(config)})
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, if they are tied.

        Done by `__init__`, and to be done again after `load_state_dict(assign=True)` or `to_empty`.
        """
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def visual(self) -> VisionTower:
        """The vision tower."""
        tower = self.model["visual"]
        assert isinstance(tower, VisionTower)
        return tower

    @property
    def language_model(self) -> LanguageModel:
        """The decoder without its head."""
        decoder = self.model["language_model"]
        assert isinstance(decoder, LanguageModel)
        return decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visual_rows: Tensor,
        visual_embeds: Tensor,
        past_lengths: Tensor,
        logits_positions: Tensor,
        cache: Sequence[LayerCache],
    ) -> tuple[Tensor, list[LayerCache]]:
        """Run the decoder as `decoder.onnx` does.

        Args:
            input_ids: [B, S].
            position_ids: mRoPE positions (t, h, w), [3, B, S].
            visual_rows: Row of `visual_embeds` that a position takes, -1 for text; [B, S].
            visual_embeds: What `visual` gives, [1+levels, V, D], V ≥ 1.
            past_lengths: Valid rows of each sequence's cache, [B].
            logits_positions: Which of the S positions get logits, [B, L].
            cache: Keys and values of each layer; not written.

        Returns:
            Float32 logits [B, L, vocab], and each layer's cache with the new rows.
        """
        hidden, presents = self.language_model(
            input_ids, position_ids, visual_rows, visual_embeds, past_lengths=past_lengths, cache=cache
        )
        return language_head(self.language_model.norm, self.lm_head, hidden, logits_positions), presents

    def new_cache(self, capacity: int, batch: int = 1) -> list[LayerCache]:
        """Return a cache of zeros for `forward`, in the type and on the device of the weights."""
        text, like = self.config.text, self.lm_head.weight
        shape = (batch, text.num_kv_heads, capacity, text.head_dim)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(text.num_layers)]

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> Qwen3VL:
        """Draw matrices from a normal distribution; biases become 0, norms 1. The start of a training."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


class VisionTower(nn.Module):
    """`vision.onnx`: all segments of one grid at once; a segment attends to itself alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, out_size = config.vision, config.text.hidden_size
        self.deepstack_layers = vision.deepstack_layers
        self.patch_embed = PatchEmbed(vision)
        self.pos_embed = nn.Embedding(vision.num_position_embeddings, vision.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(vision) for _ in range(vision.depth))
        self.merger = PatchMerger(vision, out_size, joins_first=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(vision, out_size, joins_first=True) for _ in vision.deepstack_layers
        )

    def forward(
        self, pixel_values: Tensor, pos_indices: Tensor, pos_weights: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> Tensor:
        """Encode segments.

        Args:
            pixel_values: Patches in merge order, [I, P, C·Tp·p·p].
            pos_indices: Which learned positions a patch mixes, [P, 4].
            pos_weights: In what parts, [P, 4].
            rope_cos: [P, H/2].
            rope_sin: [P, H/2].

        Returns:
            [1+levels, I·P / merge², D]: the merged patches, and the DeepStack levels in the order of their blocks.
        """
        hidden = embed_patches(self.patch_embed, self.pos_embed, pixel_values, pos_indices, pos_weights)
        return self._levels(hidden, rope_cos, rope_sin, self.blocks[-1])

    def scored(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Encode segments as `forward`, and return their tokens' scores in the last block as well, [I·P / merge²]."""
        pixel_values, pos_indices, pos_weights, *tables = inputs
        hidden = embed_patches(self.patch_embed, self.pos_embed, pixel_values, pos_indices, pos_weights)
        scores: list[Tensor] = []

        def last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            block = self.blocks[-1]
            assert isinstance(block, VisionBlock)
            x, found = block.scored(x, cos, sin)
            scores.append(found)
            return x

        return self._levels(hidden, *tables, last), scores[0]

    def _levels(self, hidden: Tensor, rope_cos: Tensor, rope_sin: Tensor, last: Callable[..., Tensor]) -> Tensor:
        """Run the blocks, the last one by a call of `last`, and the mergers."""
        levels = []
        for i, block in enumerate([*self.blocks[:-1], last]):
            hidden = block(hidden, rope_cos, rope_sin)
            if i in self.deepstack_layers:
                levels.append(self.deepstack_merger_list[self.deepstack_layers.index(i)](hidden))
        return torch.cat([self.merger(hidden), *levels])


class LanguageModel(nn.Module):
    """`decoder.onnx` up to the last norm; the visual embeddings come in by rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.num_deepstack_levels = len(config.vision.deepstack_layers)
        self.inv_freq, self.axis_of_frequency = rotary_frequencies(text)
        self.embed_tokens = EmbedTokens(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text, text.experts_of(i)) for i in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visual_rows: Tensor,
        visual_embeds: Tensor,
        *,
        past_lengths: Tensor | None = None,
        cache: Sequence[LayerCache] = (),
        visible: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Return hidden states [B, S, D], not normalised, and each layer's new cache; see `Qwen3VL.forward`.

        Without a cache the S tokens are the whole text, and `visible` may say which of them a token sees: true at
        [S, S], or what broadcasts to [B, N, S, S], where it does; causal by default.
        """
        assert not (cache and visible is not None), "with a cache, what a token sees follows from past_lengths"
        assert bool(cache) is (past_lengths is not None), "a cache and past_lengths go together"
        inv_freq, axes = (
            torch.from_numpy(each).to(input_ids.device) for each in (self.inv_freq, self.axis_of_frequency)
        )
        hidden = self.embed_tokens(input_ids, visual_rows, visual_embeds)
        cos, sin = (each.to(hidden.dtype) for each in rotary_table(position_ids, inv_freq, axes))
        presents = []
        for i, layer in enumerate(self.layers):
            if cache:
                hidden, *present = layer(hidden, cos, sin, *cache[i], past_lengths)
                presents.append((present[0], present[1]))
            else:
                hidden = layer.without_cache(hidden, cos, sin, visible)
            if i < self.num_deepstack_levels:
                level = torch.full((1,), i + 1, device=input_ids.device)
                hidden = add_deepstack(hidden, visual_rows, visual_embeds, level)
        return hidden, presents


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return rms_norm.apply(x, self.weight, self.epsilon)


class CausalAttention(nn.Module):
    """Grouped-query attention with a norm on each query and key head, mRoPE and a cache."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * head, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head, config.rms_norm_eps), RMSNorm(head, config.rms_norm_eps)
        self.scale, self.epsilon = head**-0.5, config.rms_norm_eps

    def forward(self, x: Tensor, *cos_sin_past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the cache and to x [B, S, D]; the arguments after it are those of the op after `k_norm`."""
        out, present_key, present_value = causal_attention.apply(
            *self._projected(x), *cos_sin_past, scale=self.scale, epsilon=self.epsilon
        )
        return self.o_proj(out), present_key, present_value

    def without_cache(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """Attend to x [B, S, D] alone, where `visible` is true, or causally; for training, never traced."""
        heads = causal_attention.rotated_heads(*self._projected(x), cos, sin, self.epsilon)
        return self.o_proj(causal_attention.attend(*heads, self.scale, visible))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.q_norm.weight, self.k_norm.weight


class FeedForward(nn.Module):
    """SwiGLU: down · (silu(gate · x) ∘ (up · x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """The experts of one layer; `gate` gives the router's logits and `router` what it chooses, for hooks to watch."""

    def __init__(self, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        count, width = config.num_experts, config.intermediate_size
        self.gate = nn.Linear(hidden, count, bias=False)
        self.router = Router(config.top_k)
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": nn.Parameter(torch.empty(count, 2 * width, hidden)),
                "down_proj": nn.Parameter(torch.empty(count, hidden, width)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Send x [B, S, D] through the experts."""
        gate_up, down = self.experts["gate_up_proj"], self.experts["down_proj"]
        if torch.compiler.is_exporting():
            return mixture_of_experts.OP(x, self.gate.weight, gate_up, down, self.router.top_k)
        weight_Tk, expert_Tk = self.router(self.gate(x.flatten(0, 1)))
        return mixture_of_experts.mix(x, weight_Tk, expert_Tk, gate_up, down)


class Router(nn.Module):
    """Choose the experts of each token from the gate's logits."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and experts, [B·S, top_k] each."""
        return mixture_of_experts.choose(logits_TE, self.top_k)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network or experts, each after a norm and beside a residual."""

    def __init__(self, config: TextConfig, experts: ExpertsConfig | None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = CausalAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp = (
            FeedForward(hidden, config.intermediate_size) if experts is None else MixtureOfExperts(hidden, experts)
        )

    def forward(self, x: Tensor, *cos_sin_past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transform x [B, S, D]; the arguments after it are those of `CausalAttention.forward`."""
        attended, present_key, present_value = self.self_attn(self.input_layernorm(x), *cos_sin_past)
        return self._feed_forward(x + attended), present_key, present_value

    def without_cache(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """Transform x [B, S, D] as a whole text; see `CausalAttention.without_cache`."""
        return self._feed_forward(x + self.self_attn.without_cache(self.input_layernorm(x), cos, sin, visible))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class EmbedTokens(nn.Embedding):
    """Embed token ids, and put the merged patches where a position is visual."""

    def forward(self, input_ids: Tensor, visual_rows: Tensor, visual_embeds: Tensor) -> Tensor:
        """Return [B, S, D]."""
        merged = _visual_level(visual_embeds, torch.zeros(1, dtype=torch.int64, device=input_ids.device), visual_rows)
        embedded = super().forward(input_ids)
        return torch.where(visual_rows[..., None] >= 0, merged.to(embedded.dtype), embedded)


def add_deepstack(hidden: Tensor, visual_rows: Tensor, visual_embeds: Tensor, level: Tensor) -> Tensor:
    """Add one level of `visual_embeds` to the visual positions of [B, S, D]; `level` is an index [1]."""
    added = hidden + _visual_level(visual_embeds, level, visual_rows).to(hidden.dtype)
    return torch.where(visual_rows[..., None] >= 0, added, hidden)


def _visual_level(visual_embeds: Tensor, level: Tensor, visual_rows: Tensor) -> Tensor:
    """Return the rows of one level, row 0 where a position is text; [B, S, D]."""
    # index_select and embedding export as Gather, indexing brackets as GatherND.
    return F.embedding(visual_rows.clamp(min=0), visual_embeds.index_select(0, level).squeeze(0))


def rotary_frequencies(config: TextConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies float32 [H/2], and the axis (0 t, 1 h, 2 w) whose position turns each, int64 [H/2].

    Axes alternate t h w t h w … as far as the sections of h and w reach; the rest is t.
    Source: `Qwen3VLTextRotaryEmbedding`, `compute_default_rope_parameters` and `recomposition_frequencies`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    axes = np.zeros(config.head_dim // 2, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return (1.0 / config.rope_theta**exponents).numpy(), axes


def rotary_table(position_ids: Tensor, inv_freq: Tensor, axis_of_frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of positions [3, B, S], float32 [B, S, H/2]."""
    position_of_frequency = position_ids.index_select(0, axis_of_frequency).permute(1, 2, 0)
    angles = position_of_frequency.float() * inv_freq
    return angles.cos(), angles.sin()


def language_head(norm: nn.Module, lm_head: nn.Module, hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the float32 logits of positions [B, L] of hidden states [B, S, D]; [B, L, vocab]."""
    chosen = torch.gather(hidden, 1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    logits: Tensor = lm_head(norm(chosen)).float()
    return logits


class PatchEmbed(nn.Module):
    """A product: the kernel of the checkpoint's convolution, [D, C, Tp, p, p], covers the whole patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel_size=(config.temporal_patch_size, size, size)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed patches [I, P, C·Tp·p·p]."""
        return F.linear(pixel_values, self.proj.weight.flatten(1), self.proj.bias)


def embed_patches(
    patch_embed: nn.Module, pos_embed: nn.Module, pixel_values: Tensor, pos_indices: Tensor, pos_weights: Tensor
) -> Tensor:
    """Return the patches [I, P, D] with the learned positions, resampled to their grid."""
    embedded: Tensor = patch_embed(pixel_values)
    positions: Tensor = (pos_embed(pos_indices) * pos_weights[:, :, None]).sum(1)
    return embedded + positions.to(embedded.dtype)


class VisionAttention(nn.Module):
    """Bidirectional attention inside each segment."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.num_heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.patches_per_token = config.patches_per_token

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend in x [I, P, D] with tables [P, H/2]."""
        return self.attend(*self.heads(x), cos, sin)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x [I, P, D], of its shape, not rotated."""
        qkv, size = self.qkv(x), x.shape[-1]
        # Slices, not chunk: chunk emits SplitToSequence (torch 2.13).
        q, k, v = (qkv[..., i * size : (i + 1) * size] for i in range(3))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend with what `heads` returned."""
        return self.proj(vision_attention.apply(q, k, v, cos, sin, num_heads=self.num_heads, scale=self.scale))

    def token_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how much attention the mean query of a segment gives each visual token, [I·P / merge²].

        Queries and keys are those before the rotation, so only contents count. Weights are the mean over the heads of
        the softmax over the patches of a segment, and a token has the sum of its patches': they add up to 1.
        """
        products, size = q.mean(1, keepdim=True) * k, q.shape[-1] // self.num_heads
        # Head by head, since a reshape of all dimensions would fix I in the trace.
        heads = [products[..., n * size : (n + 1) * size].sum(-1) for n in range(self.num_heads)]
        weights = (torch.stack(heads, -1).float() * self.scale).softmax(1)
        return weights.mean(-1).view(-1, self.patches_per_token).sum(-1)


class VisionMLP(nn.Module):
    """Two products with GELU in its tanh form between them."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [..., D]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Attention and feed-forward network, each after a norm and beside a residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPSILON) for _ in range(2))
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Transform x [I, P, D] with tables [P, H/2]."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))

    def scored(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x, and return the scores of its visual tokens as well; see `VisionAttention.token_scores`."""
        q, k, v = self.attn.heads(self.norm1(x))
        x = x + self.attn.attend(q, k, v, cos, sin)
        return x + self.mlp(self.norm2(x)), self.attn.token_scores(q, k)


class ScoredVisionBlock(VisionBlock):
    """A block that is traced with its scores: the last one of a graph with `token_scores`."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return what `scored` does."""
        return self.scored(x, cos, sin)


class PatchMerger(nn.Module):
    """Join merge² patches into one visual token; the mergers of DeepStack join before they normalise."""

    def __init__(self, config: VisionConfig, out_size: int, *, joins_first: bool) -> None:
        super().__init__()
        self.size, self.joins_first = config.hidden_size * config.patches_per_token, joins_first
        self.norm = nn.LayerNorm(self.size if joins_first else config.hidden_size, eps=_LAYER_NORM_EPSILON)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.size, self.size), nn.Linear(self.size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """Turn patches [I, P, D] into a level of visual embeddings, [1, I·P / merge², D of the decoder]."""
        x = self.norm(x.view(-1, self.size) if self.joins_first else x).view(-1, self.size)
        merged: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(x)))
        return merged[None]
