"""Clients that users have: OpenAI's own, langchain's and llama-index's chat classes, and schemathesis.

OpenAI's is in the lock; `make test-clients` sets up an environment with the others.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from helpers.answers import TOOLS
from helpers.http_server import HELD_OUT, Client, running, shown
from helpers.scripted import Scripted
from helpers.serving import asked
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE
from runtime.model import Qwen3VLModel

_MESSAGES: list[Any] = [{"role": "user", "content": shown()}]
_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class Answer(BaseModel):
    """What a structured answer has to be."""

    digits: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(max_length=3)]


@pytest.fixture(scope="module")
def expected(opened: Qwen3VLModel) -> str:
    return opened.generate(asked("Which digits are there?", 0)).text


def test_openai(client: Client, expected: str) -> None:
    openai = pytest.importorskip("openai")
    ours = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    assert [each.id for each in ours.models.list()] == ["demo"]
    chats = ours.chat.completions
    whole = chats.create(model="demo", messages=_MESSAGES, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == expected[0]
    chunks = list(chats.create(model="demo", messages=_MESSAGES, stream=True, stream_options={"include_usage": True}))
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == expected
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    with chats.stream(model="demo", messages=_MESSAGES) as stream:
        assert "content.delta" in [each.type for each in stream]
        assert stream.get_final_completion().choices[0].message.content == expected
    text = ours.completions.create(model="demo", prompt="Which", max_tokens=3)
    assert text.usage.completion_tokens <= 3
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chats.create(model="other", messages=_MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        chats.create(model="demo", messages=_MESSAGES, extra_body={"max_tokns": 1})
    assert caught.value.code == "unknown_field" and caught.value.param == "max_tokns"


def test_openai_in_asyncio(client: Client, expected: str) -> None:
    openai = pytest.importorskip("openai")

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none") as ours:
            found = [ours.chat.completions.create(model="demo", messages=_MESSAGES) for _ in range(20)]
            return [each.choices[0].message.content for each in await asyncio.gather(*found)]

    assert set(asyncio.run(ask())) == {expected}


def test_openai_parses_answers_of_a_schema(client: Client) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("llguidance", reason="needs the extra structured")
    ours = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none")
    found = ours.chat.completions.parse(model="demo", messages=_MESSAGES, response_format=Answer)
    assert isinstance(found.choices[0].message.parsed, Answer)


def test_openai_calls_functions(opened: Qwen3VLModel) -> None:
    openai = pytest.importorskip("openai")
    model = Scripted(opened, INSTRUCT_TEMPLATE)
    model.write(_CALL)
    with running(model.model) as client:
        ours = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none")
        asks: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Warm?"}], "tools": TOOLS}
        (call,) = ours.chat.completions.create(**asks, temperature=0).choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Köln"}')
        with ours.chat.completions.stream(**asks, temperature=0) as stream:
            (again,) = stream.get_final_completion().choices[0].message.tool_calls
        assert again.function.arguments == call.function.arguments


def test_langchain(client: Client, expected: str) -> None:
    openai = pytest.importorskip("langchain_openai", reason="make test-clients")
    from langchain_core.messages import HumanMessage

    chat = openai.ChatOpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", model="demo")
    message = HumanMessage(content=shown())
    assert chat.invoke([message]).content == expected
    assert "".join(each.content for each in chat.stream([message])) == expected
    assert asyncio.run(chat.ainvoke([message])).content == expected
    assert isinstance(chat.with_structured_output(Answer).invoke([message]), Answer)


def test_langchain_calls_functions(opened: Qwen3VLModel) -> None:
    openai = pytest.importorskip("langchain_openai", reason="make test-clients")
    model = Scripted(opened, INSTRUCT_TEMPLATE)
    model.write(_CALL)
    with running(model.model) as client:
        url = f"http://127.0.0.1:{client.port}/v1"
        chat = openai.ChatOpenAI(base_url=url, api_key="none", model="demo", temperature=0).bind_tools(TOOLS)
        assert chat.invoke("Warm?").tool_calls[0]["args"] == {"city": "Köln"}
        streamed = None
        for each in chat.stream("Warm?"):
            streamed = each if streamed is None else streamed + each
        assert streamed is not None and streamed.tool_calls[0]["args"] == {"city": "Köln"}


def test_llama_index(client: Client, expected: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like", reason="make test-clients")
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock

    chat = like.OpenAILike(
        api_base=f"http://127.0.0.1:{client.port}/v1", api_key="none", model="demo", is_chat_model=True
    )
    blocks = [ImageBlock(image=HELD_OUT.read_bytes()), TextBlock(text="Which digits are there?")]
    messages = [ChatMessage(role="user", blocks=blocks)]
    assert chat.chat(messages).message.content == expected
    assert "".join(each.delta for each in chat.stream_chat(messages)) == expected
    assert chat.complete("Which digits").text is not None


def test_schemathesis_finds_no_server_error(client: Client) -> None:
    pytest.importorskip("schemathesis", reason="make test-clients")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{client.port}/openapi.json"]
    options = ["--checks", "not_a_server_error", "--max-examples", "60", "--seed", "1", "--generation-database", "none"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "not_a_server_error" in done.stdout or "passed" in done.stdout
