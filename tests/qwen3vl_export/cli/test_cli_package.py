"""`qwen3vl package`: what it writes, what it replaces, and what it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engines import disk, exchange
from helpers.command_line import call
from qwen3vl_export import triton_repository
from qwen3vl_export.cli.run import app
from qwen3vl_export.triton_repository import model_name, write_model
from runtime.errors import EngineError, UsageError
from runtime.manifest import Manifest


def package(engine: Path, output: Path, *options: str) -> tuple[int, str, str]:
    return call(app, "package", str(engine), "--for", "triton", "--output", str(output), *options)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_holds_the_model_and_the_options(demo_engine: Path, tmp_path: Path) -> None:
    options = ("--max-sequences", "4", "--no-prefix-cache", "--max-memory", "2", "--allow-url-host", "a.example")
    code, out, err = package(demo_engine, tmp_path / "models", *options, "--request-timeout", "30", "--json")
    assert (code, err) == (0, "")
    place = tmp_path / "models" / "demo"
    parameters = {"max_sequences": 4, "prefix_cache": False, "max_memory": 2_000_000_000}
    parameters |= {"allowed_url_hosts": ["a.example"], "request_timeout_s": 30.0}
    weight_bytes = Manifest.read(demo_engine).weight_bytes
    assert json.loads(out) == {
        "model": "demo",
        "path": str(place),
        "server": "triton",
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "linked": False,
    }
    engine = {f"1/engine/{each.name}" for each in demo_engine.iterdir()}
    assert files(place) == {"config.pbtxt", "1/model.py", *engine}
    Manifest.read(place / "1" / "engine").check(place / "1" / "engine", full=True)
    config = (place / "config.pbtxt").read_text()
    for key, value in parameters.items():
        text = json.dumps(json.dumps(value))
        assert f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}' in config
    assert [each.name for each in (tmp_path / "models").iterdir()] == ["demo"]  # nothing of the work is left


def test_a_link_takes_no_room_and_outlives_the_engine(demo_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    write_model(tmp_path, "other", demo_engine, parameters={})
    os.rename(tmp_path / "other" / "1" / "engine", engine)
    code, _, err = package(engine, tmp_path / "models", "--name", "linked", "--link")
    assert code == 0 and "the model linked" in err
    weights = tmp_path / "models" / "linked" / "1" / "engine" / "decoder.onnx.data"
    assert weights.samefile(engine / weights.name) and not weights.is_symlink()


def test_links_to_another_file_system_are_refused(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    code, _, err = package(demo_engine, tmp_path, "--link")
    assert code == 2 and "cross-device" in err and "leave --link out" in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_ours_is_replaced_and_others_stay(demo_engine: Path, tmp_path: Path) -> None:
    assert package(demo_engine, tmp_path, "--name", "a")[0] == 0
    assert package(demo_engine, tmp_path, "--name", "b", "--max-queue", "9")[0] == 0
    cache = tmp_path / "a" / "1" / "__pycache__"  # of the server, when it loaded the model
    cache.mkdir()
    (cache / "model.cpython-312.pyc").write_bytes(b"")
    before = (tmp_path / "b" / "config.pbtxt").read_text()
    assert package(demo_engine, tmp_path, "--name", "a", "--max-queue", "7")[0] == 0
    assert "max_queue" in (tmp_path / "a" / "config.pbtxt").read_text() and not cache.exists()
    assert (tmp_path / "b" / "config.pbtxt").read_text() == before
    assert {each.name for each in tmp_path.iterdir()} == {"a", "b"}


def test_without_exchange_of_names_it_is_replaced_too(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "a", demo_engine, parameters={"max_queue": 1})
    monkeypatch.setattr(triton_repository, "exchange", lambda *_: False)
    write_model(tmp_path, "a", demo_engine, parameters={"max_queue": 2})
    assert '"2"' in (tmp_path / "a" / "config.pbtxt").read_text() and exchange.exchange is not None
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("strange", ["notes.txt", "2/model.py", "1/other.py", "1/engine/notes.txt", "1/engine/x/y"])
def test_what_is_not_ours_is_left_alone(demo_engine: Path, tmp_path: Path, strange: str) -> None:
    place = write_model(tmp_path, "demo", demo_engine, parameters={})
    (place / strange).parent.mkdir(exist_ok=True)
    (place / strange).write_text("mine")
    code, _, err = package(demo_engine, tmp_path)
    assert code == 2 and f"{place}: exists and is not a model that this command wrote" in err and "remedy:" in err
    assert (place / strange).read_text() == "mine" and [each.name for each in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("kind", ["file", "link", "config"])
def test_neither_is_what_is_no_model(demo_engine: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "demo"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir()
        (place / "config.pbtxt").write_text("mine")
    code, _, err = package(demo_engine, tmp_path)
    assert code == 2 and "is not a model that this command wrote" in err
    assert os.path.lexists(place)


def test_an_empty_folder_is_taken(demo_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert package(demo_engine, tmp_path, "--quiet") == (0, "", "")


def test_an_engine_that_lacks_a_file_leaves_the_older_model(demo_engine: Path, tmp_path: Path) -> None:
    place = write_model(tmp_path, "demo", demo_engine, parameters={})
    broken = tmp_path / "broken"
    write_model(broken, "x", demo_engine, parameters={})
    (broken / "x" / "1" / "engine" / "vision.onnx").unlink()
    code, _, err = package(broken / "x" / "1" / "engine", tmp_path)
    assert code == EngineError.exit_code and "vision.onnx: missing" in err
    assert "vision.onnx" in os.listdir(place / "1" / "engine")


def test_a_full_disk_is_found_before_the_work(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, _, err = package(demo_engine, tmp_path)
    assert code == 8 and "are free" in err and list(tmp_path.iterdir()) == []
    assert package(demo_engine, tmp_path, "--link")[0] == 0  # takes no room


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "-a", "é", "a" * 101])
def test_names_that_no_model_has(demo_engine: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model"):
        write_model(tmp_path, name, demo_engine, parameters={})
    assert list(tmp_path.iterdir()) == []


def test_the_name_is_that_of_the_checkpoint() -> None:
    names = {"Qwen/Qwen3-VL-2B-Instruct": "Qwen3-VL-2B-Instruct", "my model é": "my_model__", "..": "model", "a": "a"}
    assert {each: model_name(each) for each in names} == names


def test_wrong_options_are_refused_before_anything_is_written(demo_engine: Path, tmp_path: Path) -> None:
    assert package(demo_engine, tmp_path, "--max-choices", "0")[0] == 2
    assert package(demo_engine, tmp_path, "--max-memory", "nan")[0] == 2
    code, _, err = call(app, "package", str(demo_engine), "--for", "vllm", "--output", str(tmp_path))
    assert code == 2 and "triton" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["vision", "prefill"])
def test_a_second_engine_is_refused(demo_engine: Path, tmp_path: Path, part: str) -> None:
    code, _, err = package(demo_engine, tmp_path / "models", f"--{part}-engine", str(tmp_path))
    assert code == 2
    assert f"--{part}-engine: a model holds the files of one engine" in err and "into config.pbtxt" in err
    assert not (tmp_path / "models").exists()


def test_a_window_is_a_parameter(demo_engine: Path, tmp_path: Path) -> None:
    code, out, _ = package(demo_engine, tmp_path / "models", "--window", "64", "--sink-tokens", "2", "--json")
    assert (code, json.loads(out)["parameters"]) == (0, {"window": 64, "sink_tokens": 2})
