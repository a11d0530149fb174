"""Time a plain PyTorch decode step of the same shape in a CUDA graph: `torch_step ENGINE`, which must be filled.

The engine's decoder weights are read from its file, so both compute the same numbers. Values: `decode` by batch
after 512 cached tokens {median_ms, …}; `copy_bytes_per_s`, measured again in this process; `parity` {cosine,
same_first} of the logits after a prompt of random tokens, run token by token here and as one prompt by the engine's
session.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.machine import copy_rate, on_device
from benchmarks.gpu.measure import LAYOUT
from benchmarks.gpu.values import Values, parser
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

BATCHES = (1, 4, 8, 16, 32)
PAST = 512
_CAPACITY = 1024
_PROMPT_TOKENS = 24
_LEAST_COSINE = 0.999
_LAYERS = "model.language_model.layers"


def read_weights(folder: Path, device: str) -> dict[str, Any]:
    """Return the decoder's weights as tensors on a device, by their names in the graph."""
    import torch

    types = {"float16": (np.float16, torch.float16), "bfloat16": (np.uint16, torch.bfloat16)}
    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))["decoder.onnx.data"]
    data = np.memmap(folder / "decoder.onnx.data", np.uint8, "r")
    weights = {}
    for each in layout["tensors"]:
        stored, wanted = types[each["dtype"]]
        piece = np.array(data[each["offset"] : each["offset"] + each["num_bytes"]]).view(stored)
        weights[each["name"]] = torch.from_numpy(piece).to(device).view(wanted).reshape(each["shape"])
    return weights


class Step:
    """One token of each sequence, with everything it reads at fixed places, so that a CUDA graph may replay it.

    Shapes: B batch, T capacity, N query heads, K key/value heads, H head dim.
    """

    def __init__(self, weights: dict[str, Any], config: ModelConfig, batch: int, device: str = "cuda") -> None:
        import torch

        self.weights, self.text = weights, config.text
        text = config.text
        embed = weights["model.language_model.embed_tokens.weight"]
        self.head = embed if text.tie_word_embeddings else weights["lm_head.weight"]
        shape = batch, text.num_kv_heads, _CAPACITY, text.head_dim
        made = {"device": device, "dtype": embed.dtype}
        self.keys = [torch.zeros(shape, **made) for _ in range(text.num_layers)]
        self.values = [torch.zeros(shape, **made) for _ in range(text.num_layers)]
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.past = torch.zeros(1, dtype=torch.long, device=device)
        places = torch.arange(_CAPACITY, device=device)
        frequencies = text.rope_theta ** (-torch.arange(0, text.head_dim, 2, device=device) / text.head_dim)
        angles = torch.outer(places.float(), frequencies.float()).repeat(1, 2)
        self.cos, self.sin, self.places = angles.cos(), angles.sin(), places
        self.logits: Any = None

    def run(self) -> None:
        """Compute the logits of `ids`, at the place `past` of all sequences."""
        import torch.nn.functional as functional

        text, eps = self.text, self.text.rms_norm_eps
        hidden = self.weights["model.language_model.embed_tokens.weight"][self.ids][:, None]
        mask = (self.places <= self.past)[None, None, None]
        for index in range(text.num_layers):
            layer = f"{_LAYERS}.{index}"
            normed = functional.rms_norm(
                hidden, hidden.shape[-1:], self.weights[f"{layer}.input_layernorm.weight"], eps
            )
            hidden = hidden + self._attention(normed, index, mask)
            after = self.weights[f"{layer}.post_attention_layernorm.weight"]
            normed = functional.rms_norm(hidden, hidden.shape[-1:], after, eps)
            gate, up = functional.linear(normed, self.weights[f"{layer}.mlp.{{gate_proj,up_proj}}.weight"]).chunk(2, -1)
            down = self.weights[f"{layer}.mlp.down_proj.weight"]
            hidden = hidden + functional.linear(functional.silu(gate) * up, down)
        normed = functional.rms_norm(hidden, hidden.shape[-1:], self.weights["model.language_model.norm.weight"], eps)
        self.logits = functional.linear(normed, self.head)[:, 0]

    def _attention(self, normed_B1D: Any, index: int, mask: Any) -> Any:
        import torch.nn.functional as functional

        text, layer = self.text, f"{_LAYERS}.{index}.self_attn"
        num_heads, num_kv, size = text.num_heads, text.num_kv_heads, text.head_dim
        joined = functional.linear(normed_B1D, self.weights[f"{layer}.{{q_proj,k_proj,v_proj}}.weight"])
        q, k, v = joined.view(-1, 1, num_heads + 2 * num_kv, size).split([num_heads, num_kv, num_kv], 2)
        q = self._rotated(functional.rms_norm(q, (size,), self.weights[f"{layer}.q_norm.weight"], text.rms_norm_eps))
        k = self._rotated(functional.rms_norm(k, (size,), self.weights[f"{layer}.k_norm.weight"], text.rms_norm_eps))
        self.keys[index].index_copy_(2, self.past, k.transpose(1, 2))
        self.values[index].index_copy_(2, self.past, v.transpose(1, 2))
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), self.keys[index], self.values[index], attn_mask=mask, enable_gqa=True
        )
        return functional.linear(out.transpose(1, 2).flatten(2), self.weights[f"{layer}.o_proj.weight"])

    def _rotated(self, x_B1NH: Any) -> Any:
        import torch

        half = x_B1NH.shape[-1] // 2
        turned = torch.cat((-x_B1NH[..., half:], x_B1NH[..., :half]), -1)
        cos, sin = self.cos[self.past][None, :, None], self.sin[self.past][None, :, None]
        return (x_B1NH.float() * cos + turned.float() * sin).to(x_B1NH.dtype)


def recorded_ms(step: Step) -> dict[str, float]:
    """Return the milliseconds of a step as a CUDA graph; each replay takes the largest logit as its next id."""
    import torch

    def once() -> None:
        step.run()
        step.ids.copy_(step.logits.argmax(-1))

    step.past.fill_(PAST)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return on_device(torch, graph.replay, warmup=10, repeats=40)


def prompt_logits(step: Step, ids: list[int]) -> np.ndarray:
    """Return the logits after the last of some tokens of one sequence, run one by one, float32 [vocab]."""
    for place, token in enumerate(ids):
        step.ids.fill_(token)
        step.past.fill_(place)
        step.run()
    return step.logits[0].float().cpu().numpy()


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Return cosine and agreement of the largest of two rows of logits."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return {"cosine": cosine if np.isfinite(cosine) else None, "same_first": bool(a.argmax() == b.argmax())}


def main() -> int:
    """Run the section."""
    args = parser().parse_args()
    values = Values(args.values)
    import torch

    config = Manifest.read(args.folder).model
    weights = read_weights(args.folder, "cuda")
    decode: dict[str, Any] = {}
    with torch.inference_mode():
        for batch in BATCHES:
            decode[str(batch)] = recorded_ms(Step(weights, config, batch))
            values["decode"] = decode
        ids = np.random.default_rng(1).integers(0, config.text.vocab_size, _PROMPT_TOKENS).tolist()
        theirs = prompt_logits(Step(weights, config, 1), ids)
    del weights
    torch.cuda.empty_cache()
    values["copy_bytes_per_s"] = copy_rate(torch)
    torch.cuda.empty_cache()
    values["parity"] = compare(session_logits(args.folder, ids), theirs)
    cosine = values["parity"]["cosine"]
    is_good = cosine is not None and cosine >= _LEAST_COSINE
    values["problems"] = [] if is_good else [f"cosine {cosine} with PyTorch, expected at least {_LEAST_COSINE}"]
    return 0


def session_logits(folder: Path, ids: list[int], opener: Any = None) -> np.ndarray:
    """Return the logits that the engine's session gives after a prompt, and a step for its last token: [vocab]."""
    from benchmarks.gpu.speed import Engine
    from runtime.contract import DecoderInputs, no_visual_embeds

    engine = Engine(folder) if opener is None else Engine(folder, opener=opener)
    cache, none = engine.session.new_cache(_CAPACITY), no_visual_embeds(engine.config)
    head, last = np.array([ids[:-1]], np.int64), np.array([ids[-1:]], np.int64)
    engine.session.prefill(DecoderInputs.text(head, np.zeros(1, np.int64), none), cache)
    logits = engine.session.decode(DecoderInputs.text(last, np.array([len(ids) - 1]), none), cache)
    return np.asarray(logits[0, 0], np.float32)


if __name__ == "__main__":
    sys.exit(main())
