"""Results of requests of a batch: those of the server, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from helpers import PICTURES
from helpers.http_server import HELD_OUT, shown
from runtime.errors import EngineError
from runtime.model import Qwen3VLModel
from runtime.server.batch.answering import CHAT, TEXT, Outcome, answer_with
from runtime.server.batch.lines import read_lines
from runtime.server.chat import complete_chat
from runtime.server.engines import Engines, Served
from runtime.server.protocol.chat import ChatRequest
from runtime.server.settings import ServerSettings


def messages(question: str, *urls: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": shown(question, *urls)}]


ASKED = {"messages": messages("Read the digits.")}


def outcome(opened: Qwen3VLModel, tmp_path: Path, values: Any, **settings: Any) -> Outcome:
    path = tmp_path / "in.jsonl"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    engines = Engines([Served("demo", opened, ServerSettings(**settings))])
    (line,) = read_lines(path, 1 << 20)
    return asyncio.run(answer_with(engines)(line))


def chat(body: Any, **changes: Any) -> dict[str, Any]:
    return {"custom_id": "mine", "method": "POST", "url": CHAT, "body": body, **changes}


def without_names(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


def test_a_chat_is_answered_as_the_server_does(opened: Qwen3VLModel, tmp_path: Path) -> None:
    found = outcome(opened, tmp_path, chat(ASKED))
    assert list(found.result) == ["id", "custom_id", "response", "error"]
    assert found.result["custom_id"] == "mine" and found.result["error"] is None and not found.is_failure
    response = found.result["response"]
    assert list(response) == ["status_code", "request_id", "body"] and response["status_code"] == 200
    served = Served("demo", opened, ServerSettings())
    expected = asyncio.run(complete_chat(served, ChatRequest.model_validate(ASKED)))
    assert without_names(response["body"]) | {"usage": None} == without_names(expected) | {"usage": None}
    assert response["body"]["choices"][0]["message"]["content"] == "1654"
    usage = response["body"]["usage"]
    assert (found.prompt_tokens, found.new_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_text_is_continued(opened: Qwen3VLModel, tmp_path: Path) -> None:
    found = outcome(opened, tmp_path, chat({"prompt": "Read", "max_tokens": 3, "ignore_eos": True}, url=TEXT))
    assert found.result["response"]["body"]["object"] == "text_completion" and found.new_tokens == 3


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        (chat(ASKED, url="/v1/embeddings"), 404, "url is '/v1/embeddings'. Remedy: pass /v1/chat/completions or"),
        (chat(ASKED, method="GET"), 405, "method is 'GET'. Remedy: pass POST"),
        ({"custom_id": "mine", "url": CHAT, "body": ASKED}, 405, "method is None"),
        (chat("text"), 400, "body is 'text'"),
        (chat({}), 400, "messages is missing"),
        (chat({**ASKED, "temprature": 1}), 400, "did you mean 'temperature'"),
        (chat({"messages": "text"}), 400, "compare it with OpenAI's API reference"),
        (chat({**ASKED, "stream": True}), 400, "leave stream out"),
        (chat({**ASKED, "model": "other"}), 404, "the model 'other' does not exist. Remedy: pass one of: demo"),
        (chat({**ASKED, "n": 17}), 400, "at most 16 are made"),
        (chat({"messages": messages("Read", "https://example.org/a.png")}), 400, "run the batch with --allow-url-host"),
        (chat({"messages": messages("Read", "/etc/hostname")}), 400, "is read with --allow-local-files alone"),
        (chat({"messages": messages("Read", str(HELD_OUT))}), 400, "is read with --allow-local-files alone"),
        (chat({"messages": [{"role": "user", "content": "a " * 9000}]}), 400, "max_context"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_result(
    values: Any, status: int, words: str, opened: Qwen3VLModel, tmp_path: Path
) -> None:
    found = outcome(opened, tmp_path, values)
    assert found.is_failure and found.result["custom_id"] == "mine" and found.result["error"] is None
    response = found.result["response"]
    assert response["status_code"] == status
    assert response["body"]["error"].keys() == {"message", "type", "param", "code"}
    assert words in response["body"]["error"]["message"]


@pytest.mark.parametrize("text", ["{", "[]", '{"custom_id": 1}'])
def test_a_line_that_is_no_request_has_an_error(text: str, opened: Qwen3VLModel, tmp_path: Path) -> None:
    found = outcome(opened, tmp_path, text)
    assert found.is_failure and found.result["response"] is None and found.result["custom_id"] is None
    assert found.result["error"]["code"] == "invalid_line" and found.result["error"]["message"].startswith("line 1: ")


def test_files_may_be_named_where_that_is_allowed(opened: Qwen3VLModel, tmp_path: Path) -> None:
    for name in (HELD_OUT.name, str(HELD_OUT)):
        found = outcome(opened, tmp_path, chat({"messages": messages("Read the digits.", name)}), local_folder=PICTURES)
        assert found.result["response"]["body"]["choices"][0]["message"]["content"] == "1654"
    for name, words in (("none.png", "no such file in"), (".", "folder"), ("truth.json", "image")):
        found = outcome(opened, tmp_path, chat({"messages": messages("Read", name)}), local_folder=PICTURES)
        error = found.result["response"]["body"]["error"]
        assert found.result["response"]["status_code"] == 400 and words in error["message"]


def test_a_queue_that_is_full_is_waited_for(demo_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(chat({**ASKED, "max_tokens": 300, "ignore_eos": True}, custom_id=str(i))) for i in range(6)
        )
    )

    async def all_at_once(model: Qwen3VLModel) -> list[Outcome]:
        answer = answer_with(Engines([Served("demo", model, ServerSettings())]))
        return await asyncio.gather(*map(answer, read_lines(path, 1 << 20)))

    with Qwen3VLModel.from_engine(demo_engine, max_sequences=1, max_queue=1) as model:
        found = asyncio.run(all_at_once(model))
        assert model.statistics()["refused"] > 0
    assert [each.result["response"]["status_code"] for each in found] == [200] * 6


def test_an_engine_that_has_failed_is_no_result(
    opened: Qwen3VLModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> Any:
        raise EngineError("out of memory", remedy="open it again")

    monkeypatch.setattr("runtime.server.batch.answering.complete_chat", fail)
    assert outcome(opened, tmp_path, chat(ASKED)).result["response"]["status_code"] == 503

    def failed(self: Qwen3VLModel) -> None:
        raise EngineError("the engine has failed", remedy="open it again")

    monkeypatch.setattr(Qwen3VLModel, "check_open", failed)
    with pytest.raises(EngineError, match="has failed"):
        outcome(opened, tmp_path, chat(ASKED))


def test_a_bug_of_ours_is_the_result_of_one_request(
    opened: Qwen3VLModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("runtime.server.batch.answering.complete_chat", fail)
    found = outcome(opened, tmp_path, chat(ASKED))
    assert found.result["response"]["status_code"] == 500
    assert "internal error in line 1" in caplog.text and "ZeroDivisionError" in caplog.text
