"""Shapes of all weights of a model, by checkpoint key, without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.model_config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING_KEY = "model.language_model.embed_tokens.weight"
VISION_PREFIX = "model.visual."


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every tensor that a float checkpoint of this model holds, in the order of the network.

    Keys and shapes are those of transformers' models. Its mixtures of experts hold the experts of a layer stacked,
    [experts, out, in]; a checkpoint may hold them in other layouts, of as many elements.
    """
    return dict([*_vision(config), *_text(config)])


def _linear(name: str, out_features: int, in_features: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_features, in_features)
    yield f"{name}.bias", (out_features,)


def _norm(name: str, features: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (features,)
    yield f"{name}.bias", (features,)


def _vision(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision, prefix = config.vision, VISION_PREFIX.rstrip(".")
    hidden, inner = vision.hidden_size, vision.intermediate_size
    merged = hidden * vision.patches_per_token
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield f"{prefix}.patch_embed.proj.weight", (hidden, *patch)
    yield f"{prefix}.patch_embed.proj.bias", (hidden,)
    yield f"{prefix}.pos_embed.weight", (vision.num_position_embeddings, hidden)
    for index in range(vision.depth):
        block = f"{prefix}.blocks.{index}"
        yield from _norm(f"{block}.norm1", hidden)
        yield from _norm(f"{block}.norm2", hidden)
        yield from _linear(f"{block}.attn.qkv", 3 * hidden, hidden)
        yield from _linear(f"{block}.attn.proj", hidden, hidden)
        yield from _linear(f"{block}.mlp.linear_fc1", inner, hidden)
        yield from _linear(f"{block}.mlp.linear_fc2", hidden, inner)
    mergers = [("merger", hidden)]  # the last merger normalises patches, those of DeepStack merged patches
    mergers += [(f"deepstack_merger_list.{level}", merged) for level in range(len(vision.deepstack_layers))]
    for name, normalised in mergers:
        yield from _norm(f"{prefix}.{name}.norm", normalised)
        yield from _linear(f"{prefix}.{name}.linear_fc1", merged, merged)
        yield from _linear(f"{prefix}.{name}.linear_fc2", config.text.hidden_size, merged)


def _text(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    text = config.text
    hidden, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_heads * head, text.num_kv_heads * head
    yield EMBEDDING_KEY, (text.vocab_size, hidden)
    prefix = EMBEDDING_KEY.removesuffix(".embed_tokens.weight")
    for index in range(text.num_layers):
        layer = f"{prefix}.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        experts = text.experts_of(index)
        if experts is None:
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        else:
            count, width = experts.num_experts, experts.intermediate_size
            yield f"{layer}.mlp.experts.gate_up_proj", (count, 2 * width, hidden)
            yield f"{layer}.mlp.experts.down_proj", (count, hidden, width)
            yield f"{layer}.mlp.gate.weight", (count, hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    if not text.tie_word_embeddings:
        yield "lm_head.weight", (text.vocab_size, hidden)
