"""Turn the dense demo into a mixture of experts that training can start from.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055), with experts smaller than the dense feed-forward: its
intermediate units are divided among the experts, the whole of them several times over in another order each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

NUM_EXPERTS, TOP_K, INTERMEDIATE = 8, 2, 128


def upcycled(dense: Qwen3VLForConditionalGeneration, seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """Return a mixture of `NUM_EXPERTS` experts, `TOP_K` a token, made of a dense model; float32.

    All weights but those of the feed-forwards are the dense model's. An expert's down projection is multiplied so that
    `TOP_K` experts of weight 1 / `TOP_K` give on average what the dense feed-forward gives. Routers are small and
    random, so that tokens spread from the start.
    """
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    values = dense.config.to_dict()
    text = values["text_config"]
    intermediate = int(text["intermediate_size"])
    text |= {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTERMEDIATE,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    values["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(values)).float()
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.detach().float() for name, tensor in dense.state_dict().items()}
    known = model.state_dict()
    with torch.no_grad():
        for name, tensor in known.items():
            if ".mlp.experts." not in name and ".mlp.gate." not in name:
                tensor.copy_(weights[name])
        for i, layer in enumerate(model.model.language_model.layers):
            prefix = f"model.language_model.layers.{i}.mlp"
            gate, up, down = (weights[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
            # Enough orders of all units, one behind the other, to fill the experts.
            rounds = -(-NUM_EXPERTS * INTERMEDIATE // intermediate)
            units = torch.cat([torch.randperm(intermediate, generator=generator) for _ in range(rounds)])
            for e in range(NUM_EXPERTS):
                part = units[e * INTERMEDIATE : (e + 1) * INTERMEDIATE]
                layer.mlp.experts.gate_up_proj[e] = torch.cat((gate[part], up[part]))
                layer.mlp.experts.down_proj[e] = down[:, part] * (intermediate / INTERMEDIATE)
            layer.mlp.gate.weight.normal_(std=0.02, generator=generator)
    return model
