"""The configuration of a Triton model, read with the server's own schema, which refuses unknown fields."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("tritonclient", reason="runs in the environment of make test-cluster")

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from helpers.triton_backend import DTYPES, read_config
from runtime.integrations.triton.config import INPUTS, OUTPUTS, config_text, read_parameters

pytestmark = pytest.mark.cluster
PARAMETERS = {
    "max_sequences": 4,
    "huge_pages": True,
    "max_delay_ms": 12.5,
    "allowed_url_hosts": ["a.example", "b.example"],
    "request_timeout_s": 30.0,
}


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_triton_reads_what_is_written(on_gpu: bool) -> None:
    config = parsed(config_text("demo", on_gpu=on_gpu, parameters=PARAMETERS))
    assert (config.name, config.backend, config.platform, config.max_batch_size) == ("demo", "python", "", 0)
    assert config.model_transaction_policy.decoupled and config.WhichOneof("scheduling_choice") is None
    (group,) = config.instance_group
    kinds = model_config_pb2.ModelInstanceGroup
    assert (group.kind, list(group.gpus)) == ((kinds.KIND_GPU, [0]) if on_gpu else (kinds.KIND_CPU, []))
    assert group.count == 1
    assert [each.name for each in config.input] == [each.name for each in INPUTS]
    assert [list(each.dims) for each in config.input] == [[-1 if each.is_list else 1] for each in INPUTS]
    assert all(each.optional for each in config.input)
    assert [each.name for each in config.output] == list(OUTPUTS)
    assert {model_config_pb2.DataType.Name(each.data_type) for each in config.input} == set(DTYPES)


def test_parameters_come_back_through_the_json_of_the_backend() -> None:
    config = parsed(config_text("demo", on_gpu=False, parameters=PARAMETERS))
    values = json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))
    options, settings = read_parameters(values)
    assert options == {"max_sequences": 4, "huge_pages": True, "max_delay_ms": 12.5}
    assert (settings.allowed_url_hosts, settings.request_timeout_s) == (("a.example", "b.example"), 30.0)


def test_a_field_that_triton_does_not_have_is_refused() -> None:
    text = config_text("demo", on_gpu=False, parameters={})
    for sabotaged in (text + "dynamic_batchin { }\n", text.replace("optional: true", "optionl: true", 1)):
        with pytest.raises(text_format.ParseError, match="has no field named"):
            parsed(sabotaged)
    with pytest.raises(text_format.ParseError, match="TYPE_TEXT"):
        parsed(text.replace("TYPE_STRING", "TYPE_TEXT", 1))


def test_the_stand_in_of_the_backend_reads_the_same() -> None:
    text = config_text("demo", on_gpu=False, parameters=PARAMETERS)
    config, found = parsed(text), read_config(text)
    names = {number: name for name, number in model_config_pb2.DataType.items()}
    for kind, tensors in (("input", config.input), ("output", config.output)):
        expected = [(each.name, names[each.data_type], list(each.dims)) for each in tensors]
        assert [(each["name"], each["data_type"], each["dims"]) for each in found[kind]] == expected
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert {key: value["string_value"] for key, value in found["parameters"].items()} == parameters
    assert found["max_batch_size"] == 0 and found["model_transaction_policy"] == {"decoupled": True}
