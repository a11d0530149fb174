"""A stand-in for Triton's Python backend: it loads a model of a repository and asks it, as the server's stub does.

No Triton Inference Server runs where these tests do. What is imitated, and by which of the sources of
github.com/triton-inference-server/python_backend:

| | |
|---|---|
| `initialize`, `execute`, `finalize`, their arguments; error codes; cancellation | README.md |
| a decoupled `execute` returns None, or its requests fail | src/pb_stub.cc, `ProcessRequestsDecoupled` |
| the memory of a request is used again after `execute` | README.md, "avoid storing any of the input Tensors" |
| which responses are refused; a call waits for the server's process | src/response_sender.cc |
| texts are an array of objects, bytes in a request | src/resources/triton_python_backend_utils.py |
| outputs that were not asked for are left out | src/infer_response.cc, `PruneOutputTensors` |

Beyond that, a request is compared with `config.pbtxt` as the server does before it reaches the backend.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PATIENCE_S = 300
_FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
DTYPES = {
    "TYPE_STRING": np.dtype(object),
    "TYPE_BOOL": np.dtype(bool),
    "TYPE_INT32": np.dtype(np.int32),
    "TYPE_INT64": np.dtype(np.int64),
    "TYPE_FP32": np.dtype(np.float32),
}
_CODES = (
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)


class TritonModelException(Exception):
    """What a model raises, and what the backend raises where a model uses it wrongly."""


class TritonError:
    """An error with a code."""

    def __init__(self, message: str, code: int = _CODES.index("INTERNAL")) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


for _number, _name in enumerate(_CODES):
    setattr(TritonError, _name, _number)


class Tensor:
    """A named array."""

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        if not isinstance(values, np.ndarray) or values.dtype.kind in "US":
            raise TritonModelException("Tensor dtype used for numpy_array is not supported. Please use np.object_.")
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._values


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Logger:
    """The server's log, as lines of its level and text."""

    lines: list[tuple[str, str]]

    def __init__(self) -> None:
        self.lines = []

    def log_info(self, message: str) -> None:
        self.lines.append(("info", message))

    def log_warn(self, message: str) -> None:
        self.lines.append(("warning", message))

    def log_error(self, message: str) -> None:
        self.lines.append(("error", message))


class Answer:
    """What a client gets for a request.

    Attributes:
        responses: The responses so far: texts by output.
        finals: For each, whether it was marked as the last.
        error: Code and message of the error that ended it.
        threads: Threads that sent something.
        changed: Notified of each response, to this or another request of the model.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.responses: list[dict[str, list[str]]] = []
        self.finals: list[bool] = []
        self.error: tuple[str, str] | None = None
        self.threads: set[int] = set()
        self.changed = changed
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Want no answer any more."""
        self.cancelled.set()

    def wait(self) -> Answer:
        """Wait until the last response has come."""
        self.wait_until(lambda: any(self.finals))
        return self

    def wait_until(self, is_enough: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(is_enough, _PATIENCE_S), "no response came"

    def texts(self, name: str) -> list[str]:
        """All texts of an output, over all responses."""
        assert self.error is None, self.error
        return [text for response in self.responses for text in response.get(name, [])]

    @property
    def text(self) -> str:
        return "".join(self.texts("text_output"))


class InferenceResponseSender:
    """Takes the responses to a request; `gate` holds them up, as a server does that has no thread left."""

    def __init__(self, answer: Answer, outputs: Sequence[str], gate: threading.Event) -> None:
        self._answer, self._outputs, self._gate = answer, outputs, gate
        self._lock = threading.Lock()
        self._is_closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if flags not in (0, _FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if flags == 0 and response is None:
            raise TritonModelException("Inference Response object must be provided when the flags are zero.")
        with self._lock:
            if self._is_closed:
                raise TritonModelException("Unable to send response. Response sender has been closed.")
            self._is_closed = flags == _FINAL
        assert self._gate.wait(_PATIENCE_S)
        answer = self._answer
        with answer.changed:
            answer.threads.add(threading.get_ident())
            if response is not None and response.has_error():
                error = response.error()
                assert error is not None
                answer.error = _CODES[error.code()], error.message()
            elif response is not None:
                tensors = [each for each in response.output_tensors() if each.name() in self._outputs]
                answer.responses.append({each.name(): _texts(each.as_numpy()) for each in tensors})
            answer.finals.append(flags == _FINAL)
            answer.changed.notify_all()

    def is_cancelled(self) -> bool:
        with self._lock:
            if self._is_closed:
                raise TritonModelException("the request was released, and its memory used again")
        return self._answer.cancelled.is_set()


class InferenceRequest:
    """A request as a model gets it."""

    def __init__(self, tensors: list[Tensor], parameters: Mapping[str, Any], sender: InferenceResponseSender) -> None:
        self._tensors, self._parameters, self._sender = tensors, json.dumps(parameters), sender

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> InferenceResponseSender:
        return self._sender

    def release(self) -> None:
        """Let its memory be used for something else."""
        for each in self._tensors:
            each.as_numpy()[...] = b"of another request" if each.as_numpy().dtype == object else 1


class LoadedModel:
    """A model that the server has loaded.

    Attributes:
        log: The server's log.
        gate: While it is not set, no response leaves the backend.
    """

    def __init__(self, model: Any, config: dict[str, Any], log: Logger) -> None:
        self.model, self.config, self.log = model, config, log
        self.changed = threading.Condition()
        self.gate = threading.Event()
        self.gate.set()

    def ask(self, parameters: Mapping[str, Any] | None = None, **inputs: Any) -> Answer:
        """Send a request; a value is one element, a list several. Its responses come into what is returned."""
        answer = Answer(self.changed)
        outputs = [each["name"] for each in self.config["output"]]
        sender = InferenceResponseSender(answer, outputs, self.gate)
        tensors = [Tensor(name, self._array(name, value)) for name, value in inputs.items()]
        request = InferenceRequest(tensors, parameters or {}, sender)
        if self.model.execute([request]) is not None:
            raise TritonModelException("the execute function must return None.")
        request.release()
        return answer

    def unload(self) -> None:
        """End it."""
        self.model.finalize()

    def _array(self, name: str, value: Any) -> NDArray[Any]:
        """Return an input as the server passes it on, which refuses what config.pbtxt does not have."""
        spec = next((each for each in self.config["input"] if each["name"] == name), None)
        assert spec is not None, f"unexpected inference input '{name}' for model"
        values = [each.encode() if isinstance(each, str) else each for each in np.atleast_1d(np.array(value, object))]
        assert spec["dims"] == [-1] or spec["dims"] == [len(values)], f"unexpected shape for input '{name}'"
        return np.array(values, DTYPES[spec["data_type"]])


@contextmanager
def loaded(
    repository: Path, name: str, version: str = "1", kind: str = "CPU", device: int = 0
) -> Iterator[LoadedModel]:
    """Load a model as the server does, and end it if the block has not.

    Raises:
        TritonModelException: What `initialize` raised.
    """
    log = Logger()
    backend = backend_module(log)
    before = sys.modules.get(backend.__name__)
    sys.modules[backend.__name__] = backend
    try:
        config = read_config((repository / name / "config.pbtxt").read_text(encoding="utf-8"))
        model = _imported(repository / name / version / "model.py", f"{version}.model").TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": kind,
                "model_instance_device_id": str(device),
                "model_repository": str(repository / name),
                "model_version": version,
                "model_name": name,
            }
        )
        found = LoadedModel(model, config, log)
        is_loaded = True
        unload = found.unload

        def once() -> None:
            nonlocal is_loaded
            if is_loaded:
                is_loaded = False
                unload()

        found.unload = once  # type: ignore[method-assign]
        try:
            yield found
        finally:
            found.gate.set()
            once()
    finally:
        del sys.modules[backend.__name__]
        if before is not None:
            sys.modules[backend.__name__] = before


_PAIR = re.compile(r'(\w+): (?:"((?:[^"\\]|\\.)*)"|\[ (-?\d+) \]|([\w-]+))')


def read_config(text: str) -> dict[str, Any]:
    """Read a configuration of ours, which has a field on a line; tests/runtime/integrations/test_triton_config.py
    compares this with what protobuf reads."""
    config: dict[str, Any] = {"input": [], "output": [], "parameters": {}}
    for line in text.splitlines():
        pairs = {key: _unescaped(found) for key, *found in _PAIR.findall(line)}
        if line.startswith("parameters"):
            config["parameters"][pairs["key"]] = {"string_value": pairs["string_value"]}
        elif line.startswith(("input", "output")):
            config[line.split()[0]].append(pairs)
        elif line.startswith("instance_group"):
            config["instance_group"] = [pairs]
        elif line.startswith("model_transaction_policy"):
            config["model_transaction_policy"] = pairs
        elif not line.startswith("#"):
            config |= pairs
    return config


def _unescaped(found: list[str]) -> Any:
    text, number, word = found
    if number:
        return [int(number)]
    if word:
        return {"true": True, "false": False}.get(word, int(word) if word.lstrip("-").isdecimal() else word)
    return json.loads(f'"{text}"')


def backend_module(log: Logger) -> ModuleType:
    """The module that a model imports."""
    module = ModuleType("triton_python_backend_utils")
    for kind in (TritonModelException, TritonError, Tensor, InferenceResponse, InferenceRequest):
        setattr(module, kind.__name__, kind)
    module.Logger = log  # type: ignore[attr-defined]
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = _FINAL  # type: ignore[attr-defined]
    return module


def _imported(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _texts(values: NDArray[Any]) -> list[str]:
    assert values.dtype == object and values.size > 0
    return [each.decode() for each in values]
