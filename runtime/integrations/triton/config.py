"""The configuration of a model (`config.pbtxt`): its tensors, and the options of the engine as its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError
from runtime.server.settings import ServerSettings
from runtime.shown import shown

ENGINE_FOLDER = "engine"
"""Name of the engine's folder in that of a model's version."""
CHAT_REQUEST, CHAT_RESPONSE = "chat_request", "chat_response"
TEXT_INPUT, IMAGE, VIDEO, STREAM, SAMPLING = "text_input", "image", "video", "stream", "sampling_parameters"
TEXT_OUTPUT, FINISH_REASON, USAGE = "text_output", "finish_reason", "usage"


@dataclass(frozen=True)
class Input:
    """An input tensor; a request may leave any of them out.

    Attributes:
        name: Its name.
        data_type: Of Triton's `DataType`.
        is_list: It has any number of elements, not one.
    """

    name: str
    data_type: str = "TYPE_STRING"
    is_list: bool = False


OPTIONS = (
    Input("max_tokens", "TYPE_INT32"),
    Input("temperature", "TYPE_FP32"),
    Input("top_p", "TYPE_FP32"),
    Input("top_k", "TYPE_INT32"),
    Input("seed", "TYPE_INT64"),
    Input("stop", is_list=True),
)
"""Options of an answer that have a tensor of their own; all others are members of `sampling_parameters`."""
INPUTS = (
    Input(CHAT_REQUEST),
    Input(TEXT_INPUT),
    Input(IMAGE, is_list=True),
    Input(VIDEO, is_list=True),
    Input(STREAM, "TYPE_BOOL"),
    Input(SAMPLING),
    *OPTIONS,
)
OUTPUTS = (TEXT_OUTPUT, FINISH_REASON, USAGE, CHAT_RESPONSE)
"""Names of the output tensors: texts, `text_output` and `finish_reason` one for each choice."""

# What of the server's limits means something without HTTP.
_SETTINGS = (
    *("allowed_url_hosts", "max_answer_tokens", "max_choices", "max_frames", "request_timeout_s", "drain_timeout_s"),
    *("fetch_timeout_s", "max_fetch_bytes", "max_redirects"),
)


def config_text(name: str, *, on_gpu: bool, parameters: Mapping[str, Any]) -> str:
    """Return the configuration of a model as protobuf's text.

    Args:
        name: The model's name.
        on_gpu: The engine runs on a GPU: an instance on the first one.
        parameters: Options of the engine and of the server, by the names of `Qwen3VLModel.from_engine` and
            `ServerSettings`.
    """
    lines = [
        "# Written by `qwen3vl package`, which writes it anew whenever the model is packaged again.",
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "# The engine batches by itself: it takes each request at once, and sequences join and leave at each step.",
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "# An instance is a process with an engine of its own.",
        f"instance_group [ {{ count: 1 {'kind: KIND_GPU gpus: [ 0 ]' if on_gpu else 'kind: KIND_CPU'} }} ]",
    ]
    for each in INPUTS:
        dims = -1 if each.is_list else 1
        lines.append(f'input {{ name: "{each.name}" data_type: {each.data_type} dims: [ {dims} ] optional: true }}')
    lines += [f'output {{ name: "{each}" data_type: TYPE_STRING dims: [ -1 ] }}' for each in OUTPUTS]
    if parameters:
        lines.append("# Values are JSON.")
    for key, value in sorted(parameters.items()):
        text = json.dumps(json.dumps(value))
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}')
    return "\n".join(lines) + "\n"


def read_parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], ServerSettings]:
    """Return the options of the engine, and the limits of requests, that a configuration has as parameters.

    Args:
        config: The configuration as the backend gives it: `ModelConfig` as JSON. Names in capitals are the backend's
            own, such as EXECUTION_ENV_PATH.

    Raises:
        UsageError: A value is no JSON, or out of range.
    """
    given: dict[str, Any] = {}
    for key, value in config.get("parameters", {}).items():
        if key.isupper():
            continue
        text = value["string_value"]
        try:
            given[key] = json.loads(text)
        except ValueError as error:
            raise UsageError(
                f"config.pbtxt: the parameter {shown(key)} is {shown(text, 80)}, which is no JSON",
                remedy="write numbers, true, false, or texts in escaped quotation marks",
            ) from error
    settings = {name: given.pop(name) for name in _SETTINGS if name in given}
    hosts = settings.get("allowed_url_hosts", [])
    if not (isinstance(hosts, list) and all(isinstance(host, str) for host in hosts)):
        raise UsageError(f"allowed_url_hosts is {shown(hosts, 80)}", remedy='write a list: [\\"example.org\\"]')
    for name in set(settings) - {"allowed_url_hosts"}:
        if isinstance(settings[name], bool) or not isinstance(settings[name], int | float):
            raise UsageError(f"{name} is {shown(settings[name], 80)}, expected a number", remedy="leave it out")
    return given, ServerSettings(**{**settings, "allowed_url_hosts": tuple(hosts)})
