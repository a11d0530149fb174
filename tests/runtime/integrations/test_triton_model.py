"""A model of Triton's Python backend answers as the engine does; the server is helpers/triton_backend.py."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

import runtime.route
from helpers import PICTURES, ROOT
from helpers.http_server import shown
from helpers.triton_backend import (
    Answer,
    InferenceResponse,
    InferenceResponseSender,
    LoadedModel,
    Tensor,
    TritonModelException,
    loaded,
)
from qwen3vl_export.triton_repository import write_model
from runtime.answer import Generation
from runtime.errors import EngineError
from runtime.model import Qwen3VLModel

IMAGE = (PICTURES / "held_out_0.png").read_bytes()
QUESTION = "Read the digits."
LONG = json.dumps({"ignore_eos": True, "max_tokens": 3000})


@pytest.fixture(scope="module")
def repository(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_model(folder, "demo", demo_engine, parameters={"threads": 1, "max_sequences": 2, "max_queue": 3}, link=True)
    return folder


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[LoadedModel]:
    with loaded(repository, "demo") as found:
        yield found


@pytest.fixture(scope="module")
def expected(demo_engine: Path) -> Generation:
    """What the engine itself answers."""
    with Qwen3VLModel.from_engine(demo_engine, threads=1) as opened:
        content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}]
        return opened.generate([{"role": "user", "content": content}])


def written(demo_engine: Path, folder: Path, **parameters: Any) -> Path:
    write_model(folder, "demo", demo_engine, parameters={"threads": 1, **parameters}, link=True)
    return folder


def refused(answer: Answer) -> tuple[str, str]:
    assert answer.wait().error is not None and answer.finals == [True]
    return answer.error


@pytest.mark.parametrize("image", [IMAGE, base64.b64encode(IMAGE)], ids=["file", "base64"])
def test_a_question_about_an_image(model: LoadedModel, expected: Generation, image: bytes) -> None:
    answer = model.ask(text_input=QUESTION, image=[image]).wait()
    assert (answer.texts("text_output"), answer.texts("finish_reason")) == ([expected.text], ["stop"])
    assert answer.finals == [True]
    usage = json.loads(answer.texts("usage")[0])
    assert usage["prompt_tokens"] == expected.stats.prompt_tokens
    assert usage["completion_tokens"] == expected.stats.new_tokens


def test_a_stream_ends_with_reason_and_figures(model: LoadedModel, expected: Generation) -> None:
    answer = model.ask(text_input=QUESTION, image=[IMAGE], stream=True).wait()
    assert answer.text == expected.text and len(answer.responses) > 2
    assert answer.finals == [False] * (len(answer.finals) - 1) + [True]
    assert answer.texts("finish_reason") == ["stop"] and "usage" in answer.responses[-1]


@pytest.mark.parametrize("streams", [False, True])
def test_a_chat_as_openai_has_it(model: LoadedModel, expected: Generation, streams: bool) -> None:
    url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    messages = [{"role": "user", "content": shown(QUESTION, url)}]
    body = {"messages": messages, "stream": streams, "logprobs": True, "model": "demo"}
    answer = model.ask(chat_request=json.dumps(body)).wait()
    parts = [json.loads(each) for each in answer.texts("chat_response")]
    assert answer.text == expected.text and answer.finals.index(True) == len(answer.finals) - 1
    logprobs = parts[-1]["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in logprobs) == expected.text
    assert ("usage" in answer.responses[-1]) is not streams  # which was not asked for in the stream
    assert {each["object"] for each in parts} == {"chat.completion.chunk" if streams else "chat.completion"}


@pytest.mark.parametrize("streams", [False, True])
def test_several_answers(model: LoadedModel, streams: bool) -> None:
    options = json.dumps({"n": 2, "temperature": 1.5, "seed": 3})
    answer = model.ask(text_input=QUESTION, image=[IMAGE], sampling_parameters=options, stream=streams).wait()
    assert len(answer.texts("finish_reason")) == 2 and answer.finals.count(True) == 1
    parts = [json.loads(each) for each in answer.texts("chat_response")]
    assert {choice["index"] for part in parts for choice in part["choices"]} == {0, 1}


def test_options_are_tensors_members_or_parameters(model: LoadedModel) -> None:
    asked = {"text_input": QUESTION, "image": [IMAGE]}
    answers = [
        model.ask(**asked, max_tokens=3).wait(),
        model.ask(**asked, sampling_parameters='{"max_tokens": 3}').wait(),
        model.ask({"max_tokens": 3}, **asked).wait(),
    ]
    assert [each.texts("finish_reason") for each in answers] == [["length"]] * 3
    assert len({each.text for each in answers}) == 1
    drawn = [
        model.ask(**asked, temperature=0.7, top_p=0.9, top_k=20, seed=5).wait(),
        model.ask(**asked, sampling_parameters='{"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 5}').wait(),
    ]
    assert drawn[0].text == drawn[1].text
    stopped = model.ask(**asked, stop=[answers[0].text[:1]]).wait()
    assert stopped.text == ""


def test_requests_of_many_threads_run_beside_each_other(model: LoadedModel, expected: Generation) -> None:
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(lambda: model.ask(text_input=QUESTION, image=[IMAGE]).wait()) for _ in range(4)]
        answers = [each.result() for each in asked]
    assert {each.text for each in answers} == {expected.text}
    assert {thread for each in answers for thread in each.threads}.isdisjoint({threading.get_ident()})


def test_a_server_that_takes_no_response_holds_up_no_other_request(model: LoadedModel, expected: Generation) -> None:
    model.gate.clear()
    try:
        answers = [model.ask(text_input=QUESTION, image=[IMAGE], stream=True) for _ in range(3)]  # execute returned
        assert [each.finals for each in answers] == [[], [], []]
    finally:
        model.gate.set()
    assert [each.wait().text for each in answers] == [expected.text] * 3


def test_a_client_that_cancels_gives_its_place_back(model: LoadedModel, expected: Generation) -> None:
    answers = [model.ask(text_input="Count.", sampling_parameters=LONG, stream=True) for _ in range(2)]
    for each in answers:
        each.wait_until(lambda each=each: len(each.responses) > 1)
        each.cancel()
    # Both places are taken, so this one is only answered because they are given back; so is one that does not stream.
    whole = model.ask(text_input="Count.", sampling_parameters=LONG)
    whole.cancel()
    for each in (*answers, whole):
        each.wait()
        assert each.error == ("CANCELLED", "the client has cancelled the request")
        assert each.finals.index(True) == len(each.finals) - 1
    assert model.ask(text_input=QUESTION, image=[IMAGE]).wait().text == expected.text


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [
        ({}, "INVALID_ARG", "there is no prompt. Remedy: give the tensor text_input"),
        ({"chat_request": "{"}, "INVALID_ARG", "chat_request: the body is no JSON"),
        ({"chat_request": "[]"}, "INVALID_ARG", "chat_request is '[]'. Remedy: give an object of JSON"),
        ({"chat_request": b"\xff"}, "INVALID_ARG", "not UTF-8"),
        ({"chat_request": "{}"}, "INVALID_ARG", "messages is missing"),
        ({"chat_request": "{}", "text_input": "x"}, "INVALID_ARG", "chat_request and 'text_input' are given together"),
        ({"chat_request": '{"stream": true}', "stream": False}, "INVALID_ARG", "differs from stream in chat_request"),
        ({"text_input": "x", "sampling_parameters": '{"top_q": 1}'}, "INVALID_ARG", "did you mean 'top_p'"),
        ({"text_input": "x", "sampling_parameters": '{"seed": 1}', "seed": 2}, "INVALID_ARG", "'seed' is given twice"),
        ({"text_input": "x", "sampling_parameters": '{"stream": true}'}, "INVALID_ARG", "is no option of an answer"),
        ({"text_input": "x", "sampling_parameters": '{"n": 99}'}, "INVALID_ARG", "at most 16 are made"),
        ({"text_input": "x", "max_tokens": 0}, "INVALID_ARG", "greater than or equal to 1"),
        ({"text_input": "x", "image": [b"\x89no image"]}, "INVALID_ARG", "image"),
        ({"text_input": "x", "image": ["https://a.example/b.png"]}, "INVALID_ARG", "package the engine with --allow"),
        ({"text_input": "x", "image": ["/etc/hostname"]}, "INVALID_ARG", "no file of the server is read"),
        ({"text_input": "word " * 5000}, "INVALID_ARG", "tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said(model: LoadedModel, inputs: Any, code: str, words: str) -> None:
    found = refused(model.ask(**inputs))
    assert found[0] == code and words in found[1] and "Remedy: " in found[1] and "openapi" not in found[1]


def test_other_codes(model: LoadedModel) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "model": "other"}
    assert refused(model.ask(chat_request=json.dumps(body)))[0] == "NOT_FOUND"
    assert "unknown field 'max_token'" in refused(model.ask({"max_token": 3}, text_input="x"))[1]
    assert refused(model.ask({"tools": "x"}, chat_request=json.dumps(body)))[0] == "INVALID_ARG"


def test_a_full_queue_is_said(model: LoadedModel) -> None:
    answers = [model.ask(text_input="Count.", sampling_parameters=LONG) for _ in range(12)]
    answers[0].wait_until(lambda: any(each.error for each in answers))
    for each in answers:
        each.cancel()
    errors = [each.wait().error for each in answers]
    assert {error[0] for error in errors if error} == {"UNAVAILABLE", "CANCELLED"}


def test_unloading_answers_what_was_accepted(repository: Path, expected: Generation) -> None:
    with loaded(repository, "demo") as model:
        answers = [model.ask(text_input=QUESTION, image=[IMAGE], stream=True) for _ in range(3)]
        model.unload()
        assert [each.text for each in answers] == [expected.text] * 3
        assert all(each.finals[-1] for each in answers)


def test_unloading_waits_no_longer_than_the_drain_timeout(demo_engine: Path, tmp_path: Path) -> None:
    with loaded(written(demo_engine, tmp_path, drain_timeout_s=0), "demo") as model:
        answer = model.ask(text_input="Count.", sampling_parameters=LONG, stream=True)
        answer.wait_until(lambda: len(answer.responses) > 0)
        model.unload()
        assert answer.error is not None and answer.error[0] == "UNAVAILABLE"
        assert "stopped before the answer was complete" in answer.error[1]


def failure(repository: Path) -> str:
    with pytest.raises(TritonModelException) as caught, loaded(repository, "demo"):
        pass
    return str(caught.value)


def test_a_missing_file_is_named_where_the_server_logs_it(demo_engine: Path, tmp_path: Path) -> None:
    repository = written(demo_engine, tmp_path)
    missing = repository / "demo" / "1" / "engine" / "decoder.onnx.data"
    missing.unlink()
    found = failure(repository)
    assert found.startswith(f"demo: {missing}: missing. Remedy: copy the whole engine folder")


def test_a_processor_that_the_engine_is_not_for(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise EngineError("MatMulNBits computes wrong products on this processor", remedy="build it for this one")

    monkeypatch.setattr(runtime.route, "open_session", refuse)
    found = failure(written(demo_engine, tmp_path))
    assert found == "demo: MatMulNBits computes wrong products on this processor. Remedy: build it for this one"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_sequences": 0}, "max_sequences"),
        ({"max_sequence": 4}, "unknown option 'max_sequence'"),
        ({"allowed_url_hosts": "a.example"}, "allowed_url_hosts is 'a.example'. Remedy: write a list"),
        ({"max_choices": "2"}, "max_choices is '2', expected a number"),
        ({"max_choices": 0}, "max_choices = 0, expected at least 1"),
    ],
)
def test_a_wrong_parameter(demo_engine: Path, tmp_path: Path, parameters: dict[str, Any], words: str) -> None:
    assert words in failure(written(demo_engine, tmp_path, **parameters))


def test_a_parameter_that_is_no_json_and_one_of_the_backend(demo_engine: Path, tmp_path: Path) -> None:
    config = written(demo_engine, tmp_path) / "demo" / "config.pbtxt"
    text = config.read_text()
    own = 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/env.tar.gz" } }\n'
    config.write_text(text + own + 'parameters { key: "max_queue" value { string_value: "many" } }\n')
    assert "the parameter 'max_queue' is 'many', which is no JSON" in failure(tmp_path)
    config.write_text(text + own)
    with loaded(tmp_path, "demo") as model:
        assert model.ask(text_input="x", max_tokens=1).wait().error is None


_LOAD = """
import sys
from pathlib import Path
sys.modules["fastapi"] = None
from helpers.triton_backend import loaded
with loaded(Path(sys.argv[1]), "demo"):
    pass
"""


def test_a_missing_library_is_named(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", _LOAD, str(repository)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert "TritonModelException: demo: the backend's Python has no package fastapi" in said
    assert "Remedy: install the extra `serve`" in said


def test_an_engine_that_has_failed_is_said_in_the_servers_log(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise EngineError("the engine has failed", remedy="open it again")

    with loaded(repository, "demo") as model:
        monkeypatch.setattr(Qwen3VLModel, "stream", fail)
        code, message = refused(model.ask(text_input="x"))
        assert (code, message) == ("UNAVAILABLE", "the engine has failed. Remedy: open it again")
        assert model.log.lines == []  # one call failed, and the engine goes on
        monkeypatch.setattr(Qwen3VLModel, "check_open", fail)
        refused(model.ask(text_input="x"))
        assert model.log.lines == [("error", "demo: the engine has failed. Remedy: unload the model and load it again")]


def test_a_bug_ends_its_request_alone(repository: Path, expected: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    with loaded(repository, "demo") as model:
        with monkeypatch.context() as patch:
            patch.setattr(Qwen3VLModel, "stream", fail)
            assert refused(model.ask(text_input="x"))[0] == "INTERNAL"
        assert "ZeroDivisionError" in model.log.lines[0][1]
        assert model.ask(text_input=QUESTION, image=[IMAGE]).wait().text == expected.text


def test_a_missing_package_is_named(demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = written(demo_engine, tmp_path)
    monkeypatch.setitem(sys.modules, "qwen3_vl.integrations.triton", None)
    with (
        pytest.raises(ImportError, match="Remedy: install qwen3vl-export with the extras `serve`"),
        loaded(repository, "demo"),
    ):
        pass


def test_what_the_runtime_warns_of_is_in_the_servers_log(repository: Path) -> None:
    with loaded(repository, "demo") as model:
        logging.getLogger("runtime.anything").warning("a note of %s", "the runtime")
    logging.getLogger("runtime.anything").warning("after its end")
    assert model.log.lines == [("warning", "a note of the runtime")]


def test_the_stand_in_refuses_what_the_backend_refuses() -> None:
    """Else the tests above could not fail."""
    answer, gate = Answer(threading.Condition()), threading.Event()
    gate.set()
    sender = InferenceResponseSender(answer, ["text_output"], gate)
    texts = Tensor("text_output", np.array([b"a"], object))
    with pytest.raises(TritonModelException, match="must be provided"):
        sender.send()
    with pytest.raises(TritonModelException, match="Unsupported flag"):
        sender.send(InferenceResponse([texts]), flags=2)
    sender.send(InferenceResponse([texts, Tensor("other", np.array([b"b"], object))]), flags=1)
    assert answer.responses == [{"text_output": ["a"]}]
    with pytest.raises(TritonModelException, match="closed"):
        sender.send(InferenceResponse([texts]))
    with pytest.raises(TritonModelException, match="released"):
        sender.is_cancelled()
    with pytest.raises(TritonModelException, match="dtype"):
        Tensor("text_output", np.array(["a"]))


def test_the_stand_in_uses_the_memory_of_a_request_again() -> None:
    class Keeping:
        def execute(self, requests: list[Any]) -> None:
            self.kept = requests[0].inputs()[0].as_numpy()

    config = {"input": [{"name": "text_input", "dims": [1], "data_type": "TYPE_STRING"}], "output": []}
    model = Keeping()
    LoadedModel(model, config, None).ask(text_input="x")  # type: ignore[arg-type]
    assert model.kept.tolist() == [b"of another request"]
