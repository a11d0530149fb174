"""Turn the dense demo into a mixture of experts that training can start from.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055), with experts smaller than the dense feed-forward: its
intermediate units are divided among the experts, the whole of them several times over in another order each time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen3vl_export.modeling import Qwen3VL
from runtime.model_config import ExpertsConfig

NUM_EXPERTS, TOP_K, INTERMEDIATE = 8, 2, 128


@torch.no_grad()
def upcycled(dense: Qwen3VL, seed: int = 0) -> Qwen3VL:
    """Return a mixture of `NUM_EXPERTS` experts, `TOP_K` a token, made of a dense model; float32.

    All weights but those of the feed-forwards are the dense model's. An expert's down projection is multiplied so that
    `TOP_K` experts of weight 1 / `TOP_K` give on average what the dense feed-forward gives. Routers are small and
    random, so that tokens spread from the start.
    """
    text = dense.config.text
    experts = ExpertsConfig(NUM_EXPERTS, TOP_K, INTERMEDIATE, dense_layers=())
    model = Qwen3VL(replace(dense.config, text=replace(text, experts=experts)))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.float() for name, tensor in dense.state_dict().items()}
    for name, parameter in model.named_parameters():
        if ".mlp.experts." not in name and ".mlp.gate." not in name:
            parameter.copy_(weights[name])
    # Enough orders of all units, one after the other, to fill the experts.
    rounds = -(-NUM_EXPERTS * INTERMEDIATE // text.intermediate_size)
    for i, layer in enumerate(model.language_model.layers):
        prefix = f"model.language_model.layers.{i}.mlp"
        gate, up, down = (weights[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        units = torch.cat([torch.randperm(text.intermediate_size, generator=generator) for _ in range(rounds)])
        for e in range(NUM_EXPERTS):
            part = units[e * INTERMEDIATE : (e + 1) * INTERMEDIATE]
            layer.mlp.experts["gate_up_proj"][e] = torch.cat((gate[part], up[part]))
            layer.mlp.experts["down_proj"][e] = down[:, part] * (text.intermediate_size / INTERMEDIATE)
        layer.mlp.gate.weight.normal_(std=0.02, generator=generator)
    return model
