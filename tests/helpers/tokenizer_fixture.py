"""A small byte-level BPE tokenizer and a chat template of the Qwen3-VL kind, made in memory or written as files.

The special tokens are those of Qwen3-VL; ids, merges and the wording of the template are our own.
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added tokens that decoding does not skip.
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = (
    "system\nuser\nassistant\ntool\n",
    "What is in the picture? There are three digits in the picture: one, two and seven.",
    "Which digit is in the upper left corner? The digit in the upper left corner is a four.",
    "You are a helpful assistant. Answer the question with the digits only, in the order of reading.",
    'Answer as JSON: {"digits": [1, 2, 3], "count": 3}',
    "Grüße aus Köln, naïve café, 日本語のテキスト, 日本語, эти слова, 🙂🙂👍🏽",
)

# Whitespace control keeps the output free of the indentation.
_TEMPLATE = """\
{%- set state = namespace(num_images=0, last_question=-1) %}
{%- macro body(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set state.num_images = state.num_images + 1 %}
                {%- if add_vision_id is defined and add_vision_id %}
                    {{- 'Picture ' ~ state.num_images ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro words(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content if 'text' in part %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- words(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- 'Functions you may call:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + words(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' and not words(message.content).startswith('<tool_response>') %}
        {%- set state.last_question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + body(message.content) + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set text = words(message.content) %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in text %}
            {%- set reasoning = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning and loop.index0 > state.last_question %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {% generation %}{{- text }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | default(call) | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + body(message.content) + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\nGENERATION_PREFIX' }}
{%- endif %}
"""

INSTRUCT_TEMPLATE = _TEMPLATE.replace("GENERATION_PREFIX", "")
THINKING_TEMPLATE = _TEMPLATE.replace("GENERATION_PREFIX", "<think>\\n")


def build_tokenizer_json() -> bytes:
    """Return the content of a `tokenizer.json`: 256 bytes, about a hundred merges, and Qwen's added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer.to_str().encode()


def build_tokenizer_files(folder: str | Path, *, thinking: bool = False) -> Path:
    """Write what `AutoTokenizer` and `AutoProcessor` need, and return the folder.

    Files: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `preprocessor_config.json` and
    `video_preprocessor_config.json`, the last two with Qwen3-VL's values but a small smallest size.

    Args:
        folder: Is made if it is not there.
        thinking: Write the template whose generation prompt opens `<think>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(build_tokenizer_json())
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3VLProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
    }
    preprocessing = {
        "size": {"shortest_edge": 4096, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {**preprocessing, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {**preprocessing, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, content in (
        ("tokenizer_config.json", config),
        ("preprocessor_config.json", image),
        ("video_preprocessor_config.json", video),
    ):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE if thinking else INSTRUCT_TEMPLATE, encoding="utf-8")
    return folder
