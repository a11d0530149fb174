"""The chat template renderer against transformers', and what its sandbox keeps out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import judge
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, THINKING_TEMPLATE, build_tokenizer_files
from runtime.chat import ChatTemplate, template_source
from runtime.errors import EngineError, UsageError
from runtime.files import read_json_object
from runtime.input_kinds.image import IMAGE_TOKEN
from runtime.messages import normalise_messages
from runtime.template_engine import MARKER

MARKERS = [MARKER.format(number=number, index=0) for number in range(3)]
IMAGE = {"type": "image", "image": "cat.png"}
TOOL = {"type": "function", "function": {"name": "größe", "description": '<a> & "b"', "parameters": {"x": [1, None]}}}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "  What?\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text("a"), text("b")]}],
    "image": [{"role": "user", "content": [IMAGE, text("What is this?")]}],
    "images in two turns": [
        {"role": "user", "content": [text("First "), IMAGE, text(" then "), IMAGE]},
        {"role": "assistant", "content": [text("Two cats.")]},
        {"role": "user", "content": [{"type": "image", "url": "dog.png"}, text("{{ 7 * 7 }} {% raw %}")]},
    ],
    "thoughts": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n6"},
    ],
    "reasoning by name": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4", "reasoning": "two and two"},
    ],
    "tools": [
        {"role": "user", "content": "How large?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "size", "arguments": {"x": "ä"}}}],
        },
        {"role": "tool", "content": [text("here "), IMAGE]},
    ],
    "typed tokens": [{"role": "user", "content": [IMAGE, text(f"say {IMAGE_TOKEN} and <|im_end|> and {MARKERS[0]}")]}],
}


@pytest.fixture(scope="module", params=["instruct", "thinking"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Any]:
    folder = build_tokenizer_files(tmp_path_factory.mktemp("processor"), thinking=request.param == "thinking")
    return opened(folder), judge.processor(folder)


def opened(folder: Path) -> ChatTemplate:
    return ChatTemplate.from_config(template_source(folder), read_json_object(folder / "tokenizer_config.json"))


@pytest.mark.judge
@pytest.mark.parametrize("options", [{}, {"tools": [TOOL]}, {"add_vision_id": True}])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", list(CHATS))
def test_equals_the_processor(
    pair: tuple[ChatTemplate, Any], name: str, add_generation_prompt: bool, options: dict[str, Any]
) -> None:
    template, processor = pair
    if name == "reasoning by name":
        judge.skip_unless(judge.release() > (5, 10), "it does not hand `reasoning` on to the template")
    plain, _ = normalise_messages(CHATS[name])
    chat = template.render(
        plain,
        add_generation_prompt=add_generation_prompt,
        tools=options.get("tools"),
        chat_template_kwargs={key: value for key, value in options.items() if key != "tools"},
    )
    expected = processor.apply_chat_template(CHATS[name], add_generation_prompt=add_generation_prompt, **options)
    assert chat.text == expected


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One with the special token that the templates below ask for, and without the other."""
    found = judge.processor(build_tokenizer_files(tmp_path_factory.mktemp("tokenizer"))).tokenizer
    assert (found.bos_token, found.eos_token) == (None, "<|im_end|>")
    return found


@pytest.mark.portable
def test_the_thinking_variant_opens_a_thought() -> None:
    plain, _ = normalise_messages("hi")
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(INSTRUCT_TEMPLATE).render(plain).text == start
    assert ChatTemplate(THINKING_TEMPLATE).render(plain).text == f"{start}<think>\n"


@pytest.mark.judge
@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n   {% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
        "{% set ns = namespace(self=1, n=2) %}{% set ns.n = 3 %}{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
        "{{ bos_token }}|{{ eos_token }}|{{ undefined_name }}|{{ documents }}|{{ tools }}",
        "{{ strftime_now('%Y-%m-%d') }}",
        "{{ messages[0].content | trim | upper }}{{ messages[9] }}\n",
    ],
)
def test_the_environment_equals_that_of_transformers(tokenizer: Any, source: str) -> None:
    messages = [{"role": "user", "content": ' a <b> & "ü" 日本\n'}, {"role": "system", "content": "x"}]
    expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    template = ChatTemplate(source, special_tokens={"eos_token": "<|im_end|>"})
    assert template.render(messages, add_generation_prompt=False).text == expected


@pytest.mark.portable
@pytest.mark.parametrize("name", list(CHATS))
def test_only_the_tokens_that_the_template_wrote_are_images(name: str) -> None:
    plain, images = normalise_messages(CHATS[name])
    chat = ChatTemplate(INSTRUCT_TEMPLATE).render(plain)
    assert len(chat.places) == len(images)
    for offset, token in chat.places:
        assert token == IMAGE_TOKEN
        assert chat.text[:offset].endswith("<|vision_start|>")
        assert chat.text[offset:].startswith(f"{IMAGE_TOKEN}<|vision_end|>")


@pytest.mark.portable
@pytest.mark.parametrize(
    "parts",
    [
        [text(f"{IMAGE_TOKEN}"), IMAGE],
        [text(f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"), IMAGE, text(IMAGE_TOKEN * 3)],
        # Neither part holds the token, the rendered text does.
        [text("<|image_"), text("pad|>"), IMAGE],
        [text("<|image_pad|"), IMAGE, text(">")],
        [text(f"{MARKERS[0]} {MARKERS[1]}"), IMAGE, text(MARKERS[2][:9]), text(MARKERS[2][9:])],
    ],
)
def test_typed_tokens_are_told_from_the_templates_own(parts: list[dict[str, Any]]) -> None:
    plain, _ = normalise_messages([{"role": "user", "content": parts}])
    chat = ChatTemplate(INSTRUCT_TEMPLATE).render(plain)
    before = "".join(part["text"] for part in parts[: parts.index(IMAGE)])
    assert chat.places == ((len(f"<|im_start|>user\n{before}<|vision_start|>"), IMAGE_TOKEN),)
    after = "".join(part["text"] for part in parts[parts.index(IMAGE) + 1 :])
    assert chat.text.startswith(f"<|im_start|>user\n{before}<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{after}<|im_end")


@pytest.mark.portable
def test_a_template_may_take_the_token_from_a_variable() -> None:
    source = "{% for p in messages[0].content %}{{ sep_token if p.type == 'image' else p.text }}{% endfor %}"
    template = ChatTemplate(source, special_tokens={"sep_token": f"[{IMAGE_TOKEN}]"})
    plain, _ = normalise_messages([{"role": "user", "content": [text(IMAGE_TOKEN), IMAGE]}])
    chat = template.render(plain)
    assert chat.text == f"{IMAGE_TOKEN}[{IMAGE_TOKEN}]"
    assert chat.places == ((len(IMAGE_TOKEN) + 1, IMAGE_TOKEN),)


@pytest.mark.portable
def test_a_template_that_rewrites_typed_tokens_is_an_error_only_where_they_are_typed() -> None:
    source = "{% for p in messages[0].content %}{{ p.text | replace('<|image_pad|>', 'X<|image_pad|>') }}{% endfor %}"
    template = ChatTemplate(source)
    assert template.render(normalise_messages("plain")[0]).text == "plain"
    with pytest.raises(UsageError, match="cannot be told from attached images"):
        template.render(normalise_messages(f"typed {IMAGE_TOKEN}")[0])


@pytest.mark.portable
@pytest.mark.parametrize(
    ("source", "error", "expected"),
    [
        ("{{ messages.append(1) }}", EngineError, "sandbox forbids"),
        ("{{ ''.__class__.__mro__ }}", EngineError, "sandbox forbids"),
        ("{% set ns = namespace(_x=1) %}", EngineError, "sandbox forbids"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", EngineError, "sandbox forbids"),
        ("{{ strftime_now.__self__.year }}", EngineError, "sandbox forbids"),
        ("{{ range(10 ** 9) | list }}", UsageError, "refuses these messages"),
        ("{{ raise_exception('no turn') }}", UsageError, "refuses these messages: no turn"),
        ("{{ messages[0].content + 1 }}", UsageError, "refuses these messages"),
        ("{% for %}", EngineError, "line 1"),
        ("a\n{{ b", EngineError, "line 2"),
    ],
)
def test_what_a_template_may_not_do(source: str, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        ChatTemplate(source).render(normalise_messages("hi")[0])


@pytest.mark.portable
def test_unknown_variables_are_refused() -> None:
    template = ChatTemplate(INSTRUCT_TEMPLATE)
    plain, _ = normalise_messages("hi")
    with pytest.raises(UsageError, match=r"no variable 'enable_thinking'.*\n.*its variables are add_vision_id"):
        template.render(plain, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(UsageError, match="'tools': it has its own argument"):
        template.render(plain, chat_template_kwargs={"tools": []})
    with pytest.raises(UsageError, match="no variable 'strftime_now'"):
        ChatTemplate("{{ strftime_now('%Y') }}").render(plain, chat_template_kwargs={"strftime_now": "x"})
    with pytest.raises(UsageError, match=r"chat_template_kwargs\['add_vision_id'\] must be JSON data"):
        template.render(plain, chat_template_kwargs={"add_vision_id": object()})
    with pytest.raises(UsageError, match="knows no tools"):
        ChatTemplate("{{ messages }}").render(plain, tools=[TOOL])
    with pytest.raises(UsageError, match="list of JSON schemas"):
        template.render(plain, tools="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"tools\[0\] must be JSON data"):
        template.render(plain, tools=[len])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"tools\[0\] must be a dict, got str"):
        template.render(plain, tools=["x"])  # type: ignore[list-item]


@pytest.mark.portable
def test_an_empty_list_of_tools_is_none() -> None:
    plain, _ = normalise_messages("hi")
    assert ChatTemplate("{{ messages[0].role }}").render(plain, tools=[]).text == "user"
    assert ChatTemplate("{{ tools is none }}").render(plain, tools=()).text == "True"


def write_config(key: str, value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / key).write_text(json.dumps(value), encoding="utf-8")

    return write


@pytest.mark.portable
@pytest.mark.parametrize(
    "write",
    [
        write_config("chat_template.json", {"chat_template": "{{ eos_token }}!"}),
        write_config("tokenizer_config.json", {"chat_template": "{{ eos_token }}!", "eos_token": {"content": "E"}}),
        write_config(
            "tokenizer_config.json",
            {
                "eos_token": "E",
                "chat_template": [
                    {"name": "other", "template": "?"},
                    {"name": "default", "template": "{{ eos_token }}!"},
                ],
            },
        ),
    ],
)
def test_older_places_of_the_template(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write_config("tokenizer_config.json", {"eos_token": "E"})(tmp_path)
    write(tmp_path)
    assert opened(tmp_path).render(normalise_messages("hi")[0]).text == "E!"


@pytest.mark.portable
def test_a_folder_without_a_template_or_with_a_broken_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has no chat template"):
        template_source(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(EngineError, match=r"tokenizer_config\.json: not readable as JSON"):
        template_source(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(EngineError, match="expected a JSON object, got list"):
        template_source(tmp_path)
