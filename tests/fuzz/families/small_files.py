"""Recipes that change one of the small files of a checkpoint or an engine; shared by two families."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz.family import ROOT, Recipe
from fuzz.mutation import WHOLE, apply_bytes, apply_json, byte_edits, encoded, json_edits

CHECKPOINT = ROOT / "qwen3vl_export" / "demo" / "checkpoint"
_TEMPLATE = "chat_template.jinja"
# More of the file that says most.
FILES = ("config.json",) * 7 + ("generation_config.json",) * 4 + ("preprocessor_config.json",) * 4
FILES += ("tokenizer.json",) * 4 + ("tokenizer_config.json",) * 2 + (_TEMPLATE,) * 4
_EXTRA_KEYS = {
    "config.json": "rope_scaling rope_parameters quantization_config layer_types num_experts num_local_experts "
    "mlp_only_layers architectures auto_map vision_config text_config eos_token_id attn_implementation dtype "
    "torch_dtype head_dim model_type num_experts_per_tok moe_intermediate_size decoder_sparse_step id2label "
    "pad_token_id",
    "generation_config.json": "temperature top_k top_p min_p repetition_penalty stop_strings seed stop num_beams "
    "bad_words_ids max_length typical_p guidance_scale cache_config eos_token_ids penalty_alpha suppress_tokens "
    "prompt_lookup_num_tokens begin_suppress_tokens no_repeat_ngram_size",
    "preprocessor_config.json": "min_pixels max_pixels size do_pad crop_size image_processor auto_map resample "
    "patch_size do_center_crop longest_edge",
    "tokenizer.json": "added_tokens normalizer pre_tokenizer post_processor decoder model truncation padding",
    "tokenizer_config.json": "chat_template bos_token eos_token pad_token auto_map added_tokens_decoder",
}
_TEMPLATE_TOKENS = tuple(
    text.encode()
    for text in (
        *("{{", "}}", "{%", "%}", "{#", "|tojson", "|length", ".x.y", "[0]", "()", "messages", " if ", "{% endif %}"),
        *("{% for i in messages %}", "{% endfor %}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{% include 'x' %}"),
        *(
            "{% import 'x' as y %}",
            "{% extends 'x' %}",
            "<|image_pad|>",
            "{% raw %}",
            "{{ undefined.x }}",
            "{% break %}",
        ),
        *("{% generation %}", "{{ namespace(_a=1) }}", "{{ lipsum() }}", "{{ range(10)|list }}", "{{ cycler }}"),
        *("{{ strftime_now('%Y') }}", "{{ messages|map(attribute='__class__')|list }}", "{{ 'a' * 10**9 }}"),
        *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ '{0.__class__}'.format(1) }}", "\ufeff", "\u2028"),
    )
)
SPECIAL = ("missing", "folder", "loop", "pipe", "zeros", "utf-16", "as json")
"""What may stand in a file's place in a checkpoint."""


def make(random: Random) -> Recipe:
    """Return a file's name and edits of it."""
    name = random.choice(FILES)
    data = (CHECKPOINT / name).read_bytes()
    recipe: Recipe = {"file": name, "form": "bytes", "edits": []}
    if random.random() < 0.04:
        recipe["edits"] = [["whole", random.choice(sorted(WHOLE))]]
    elif name == _TEMPLATE:
        recipe["edits"] = byte_edits(random, len(data), _TEMPLATE_TOKENS)
    elif random.random() < 0.3:
        recipe["edits"] = byte_edits(random, len(data))
    else:
        recipe |= {"form": "json", "edits": json_edits(random, json.loads(data), _EXTRA_KEYS[name].split())}
    return recipe


def contents(recipe: Recipe) -> bytes:
    """Return the bytes of the changed file."""
    data = (CHECKPOINT / recipe["file"]).read_bytes()
    if recipe["form"] == "bytes":
        return apply_bytes(data, recipe["edits"])
    return encoded(apply_json(json.loads(data), recipe["edits"]))


def manifest_of(engine: Any) -> dict[str, Any]:
    """Return the entries of an engine's manifest, without its own hash."""
    values: dict[str, Any] = json.loads((engine / "engine.json").read_bytes())
    del values["sha256"]
    return values
