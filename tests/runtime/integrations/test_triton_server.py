"""A packaged model in a real Triton Inference Server, the one in NVIDIA's wheel of PyTriton, asked over gRPC.

`make test-triton` makes the environment. That server is 2.51 (24.10), whose Python backend takes NumPy 1 alone, so its
environment has that in place of the NumPy 2 that this project asks for; 24.11 and later take NumPy 2.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytriton", reason="runs in the environment of make test-triton")

import numpy as np
import pytriton
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from helpers import PICTURES, ROOT
from qwen3vl_export.triton_repository import write_model
from runtime.answer import Generation
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.cluster
ENGINE = ROOT / "build" / "triton" / "engine"
HOME = Path(pytriton.__file__).parent / "tritonserver"
IMAGE = (PICTURES / "held_out_0.png").read_bytes()
QUESTION = {"text_input": ["Read the digits."], "image": [IMAGE]}
LONG = {"text_input": ["Count."], "sampling_parameters": [json.dumps({"ignore_eos": True, "max_tokens": 2000})]}
_PATIENCE_S = 120
_TYPES = {"stream": ("BOOL", bool), "max_tokens": ("INT32", np.int32), "temperature": ("FP32", np.float32)}


class Server:
    """A server of a repository, which loads models when it is asked to."""

    def __init__(self, repository: Path, folder: Path) -> None:
        stub = HOME / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
        backends = folder / "backends"
        shutil.copytree(HOME / "backends", backends)
        shutil.copy(stub / "triton_python_backend_stub", backends / "python")
        os.chmod(backends / "python" / "triton_python_backend_stub", 0o755)
        os.chmod(HOME / "bin" / "tritonserver", 0o755)
        ports = _free_ports()
        self.log = folder / "log"
        command = [
            HOME / "bin" / "tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            f"--http-port={ports[0]}",
            f"--grpc-port={ports[1]}",
            "--allow-metrics=false",
            f"--backend-config=python,shm-region-prefix-name=qwen3vl{os.getpid()}",
            "--exit-timeout-secs=60",
        ]
        libraries = [sysconfig.get_config_var("LIBDIR"), str(HOME.parents[1] / "nvidia_pytriton.libs")]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.url = f"127.0.0.1:{ports[1]}"
        self.client = grpc.InferenceServerClient(self.url)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._is_live():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def _is_live(self) -> bool:
        try:
            return bool(self.client.is_server_live())
        except InferenceServerException:
            return False


class Stream:
    """A connection on which requests are asked; their responses come in `responses`."""

    def __init__(self, url: str) -> None:
        self._client = grpc.InferenceServerClient(url)
        self.responses: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self.responses.put(error or result))

    def ask(self, **inputs: list[Any]) -> None:
        tensors = []
        for name, values in inputs.items():
            kind, dtype = _TYPES.get(name, ("BYTES", object))
            array = np.array([each.encode() if isinstance(each, str) else each for each in values], dtype)
            tensor = grpc.InferInput(name, [len(values)], kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        self._client.async_stream_infer("demo", tensors, enable_empty_final_response=True)

    def answer(self) -> list[Any]:
        """Return the responses to one request, the last of which alone is marked as that."""
        found: list[Any] = []
        while not found or not found[-1].get_response().parameters["triton_final_response"].bool_param:
            response = self.responses.get(timeout=_PATIENCE_S)
            if isinstance(response, InferenceServerException):
                raise response
            found.append(response)
        return found

    def close(self, *, cancels: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancels)
        self._client.close()


def text(responses: list[Any]) -> str:
    return "".join(each.decode() for response in responses for each in response.as_numpy("text_output"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    written(folder, "demo")
    return folder


def written(repository: Path, name: str) -> Path:
    place = write_model(repository, name, ENGINE, parameters={"threads": 1, "max_sequences": 2, "max_queue": 8})
    # The interpreter in the backend knows neither virtual environments nor PYTHONPATH.
    paths = [str(ROOT), sysconfig.get_path("purelib")]
    script = place / "1" / "model.py"
    script.write_text(f"import sys\nsys.path[:0] = {paths}\n" + script.read_text())
    return place


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(repository, tmp_path_factory.mktemp("server"))
    try:
        found.client.load_model("demo", client_timeout=_PATIENCE_S)
        yield found
        found.process.terminate()
        found.process.wait(_PATIENCE_S)
    finally:
        found.process.kill()


@pytest.fixture
def stream(server: Server) -> Iterator[Stream]:
    found = Stream(server.url)
    yield found
    found.close()


@pytest.fixture(scope="module")
def expected() -> Generation:
    with Qwen3VLModel.from_engine(ENGINE, threads=1) as model:
        content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION["text_input"][0]}]
        return model.generate([{"role": "user", "content": content}])


def test_the_server_knows_the_tensors(server: Server) -> None:
    config = server.client.get_model_config("demo").config
    assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
    assert config.WhichOneof("scheduling_choice") is None  # no dynamic batching
    assert server.client.is_model_ready("demo")


def test_a_whole_answer_is_the_engines(stream: Stream, expected: Generation) -> None:
    stream.ask(**QUESTION)
    (response,) = stream.answer()
    assert text([response]) == expected.text and response.as_numpy("finish_reason").tolist() == [b"stop"]
    assert json.loads(response.as_numpy("usage")[0])["completion_tokens"] == expected.stats.new_tokens


def test_a_stream_is_too(stream: Stream, expected: Generation) -> None:
    stream.ask(**QUESTION, stream=[True])
    responses = stream.answer()
    assert len(responses) > 2 and text(responses) == expected.text
    url = {"role": "user", "content": "How many digits are there?"}
    stream.ask(chat_request=[json.dumps({"messages": [url], "stream": True})])
    chunks = [json.loads(each.as_numpy("chat_response")[0]) for each in stream.answer()]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_many_at_once(server: Server, expected: Generation) -> None:
    streams = [Stream(server.url) for _ in range(6)]
    for each in streams:
        each.ask(**QUESTION, stream=[True])
    assert {text(each.answer()) for each in streams} == {expected.text}
    for each in streams:
        each.close()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "there is no prompt. Remedy"),
        ({"chat_request": ["{"]}, "the body is no JSON"),
        ({"text_input": ["x"], "image": [b"\x89no"]}, "image"),
        ({"text_input": ["x"], "max_tokens": [0]}, "greater than or equal to 1"),
    ],
)
def test_errors_come_with_their_message(stream: Stream, inputs: dict[str, Any], words: str) -> None:
    if not inputs:
        inputs = {"stream": [False]}
    stream.ask(**inputs)
    with pytest.raises(InferenceServerException, match=words):
        stream.answer()


def test_a_client_that_goes_gives_its_place_back(server: Server, stream: Stream, expected: Generation) -> None:
    """Both places are taken, and a queue of answers behind them would take minutes more."""
    for _ in range(5):
        going = [Stream(server.url) for _ in range(2)]
        for each in going:
            each.ask(**LONG, stream=[True])
            assert text([each.responses.get(timeout=_PATIENCE_S)])
        for each in going:
            each.close(cancels=True)
    stream.ask(**QUESTION)
    assert text(stream.answer()) == expected.text


def test_unloading_waits_for_answers_and_loading_again_works(
    server: Server, stream: Stream, expected: Generation
) -> None:
    options = json.dumps({"ignore_eos": True, "max_tokens": 300})
    stream.ask(text_input=["Count."], sampling_parameters=[options], stream=[True])
    stream.responses.get(timeout=_PATIENCE_S)  # it was accepted
    server.client.unload_model("demo")
    assert json.loads(stream.answer()[-1].as_numpy("usage")[0])["completion_tokens"] == 300
    deadline = time.monotonic() + _PATIENCE_S
    while server.client.is_model_ready("demo"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.client.load_model("demo")
    stream.ask(**QUESTION)
    assert text(stream.answer()) == expected.text


def test_an_engine_that_cannot_be_opened_says_why(server: Server, repository: Path) -> None:
    missing = written(repository, "broken") / "1" / "engine" / "vision.onnx"
    missing.unlink()
    with pytest.raises(InferenceServerException, match=r"missing\. Remedy: copy the whole engine folder"):
        server.client.load_model("broken")
    assert "TritonModelException: broken: " in server.log.read_text()
    assert server.client.is_model_ready("demo")


def _free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
