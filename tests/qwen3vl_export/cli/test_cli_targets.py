"""`qwen3vl targets`: the probe, the estimates and the choice, as people and as programs see them."""

from __future__ import annotations

import io
import json
import re
from logging import StreamHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engines import hardware
from engines.choose import consider
from engines.hardware import Gpu, Hardware
from helpers import ROOT
from helpers.own_kernels import needs_own_kernels
from qwen3vl_export.cli.errors import run_app
from qwen3vl_export.cli.run import app
from qwen3vl_export.cli.targets import model_shape
from qwen3vl_export.sources import SHIPPED
from runtime import native
from runtime.errors import CheckpointError, EngineError, UsageError

MACHINE = Hardware(
    cpu="Abacus",
    cpu_features=("avx2",),
    num_cores=3,
    memory_bytes=32_000_000_000,
    gpus=(Gpu("Test RTX", "8.6", 8_000_000_000, 6_000_000_000, "570.1"),),
    versions={"torch": "2.14.1"},
    notes=("a note of the probe",),
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe", lambda: MACHINE)


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["targets", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.portable
def test_the_machine_is_shown() -> None:
    text = call()
    for expected in (
        "Abacus, 3 cores (avx2)",
        "32.0 GB",
        "Test RTX, SM 8.6, 6.0 of 8.0 GB free, driver 570.1",
        "torch 2.14.1",
        "a note of the probe",
    ):
        assert expected in text
    assert "MB" not in text


@pytest.mark.portable
def test_json_of_the_machine() -> None:
    values: dict[str, Any] = json.loads(call("--json"))
    assert list(values) == ["machine", "own_kernels", "targets"]
    assert values["machine"]["gpus"][0]["compute_capability"] == "8.6"
    assert values["machine"]["memory_bytes"] == 32_000_000_000


@needs_own_kernels
@pytest.mark.portable
def test_the_instruction_set_of_the_own_kernels_is_shown() -> None:
    isa, isas = native.isa(), native.isas()
    rest = [each for each in isas if each != isa]
    others = f"; this processor also runs {', '.join(rest)}" if rest else ""
    assert f"own kernels  {isa}{others}\n" in call()
    values = json.loads(call("--json"))["own_kernels"]
    assert values == {"isa": isa, "isas": list(isas), "problem": None, "remedy": None}


@pytest.mark.portable
def test_why_the_own_kernels_cannot_be_used_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "failure", lambda: EngineError("the library is missing", remedy="build it"))
    assert "own kernels  cannot be used: the library is missing\n             remedy: build it\n" in call()
    values = json.loads(call("--json"))["own_kernels"]
    assert values == {"isa": None, "isas": [], "problem": "the library is missing", "remedy": "build it"}


@pytest.mark.portable
def test_estimates_of_a_size() -> None:
    expected = consider(MACHINE, model_shape("qwen3-vl-2b"))
    assert expected.target is not None
    assert call("--model", "qwen3-vl-2b").endswith(f"\n{expected.render()}\n--target auto: {expected.target.name}\n")
    choice = json.loads(call("--model", "qwen3-vl-2b", "--json"))["choice"]
    assert choice["target"] == expected.target.name
    assert choice["candidates"] == json.loads(json.dumps([each.to_dict() for each in expected.candidates]))
    assert all(each["total_bytes"] == sum(each["parts"].values()) for each in choice["candidates"])


@pytest.mark.portable
def test_a_model_that_fits_nowhere_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe", lambda: Hardware("Abacus", (), 1, 1000))
    assert call("--model", "qwen3-vl-32b").endswith("--target auto: none fits\n")
    assert json.loads(call("--model", "qwen3-vl-32b", "--json"))["choice"]["target"] is None


@pytest.mark.portable
def test_a_folder_is_a_model_too() -> None:
    for name, subfolder in SHIPPED.items():
        folder = ROOT / "qwen3vl_export" / "demo" / subfolder
        assert model_shape(str(folder)) == model_shape(name)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["no such model", "./qwen3-vl-2b", "a/b/c", "qwen3-vl-3b"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{re.escape(name)}'?: no such folder(.|\n)*qwen3-vl-2b"):
        model_shape(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The Hub, with one model; the calls of it."""
    import huggingface_hub

    asked: list[Any] = []

    def hf_hub_download(repo: str, name: str, *, revision: str | None, cache_dir: None = None) -> str:
        asked.append((repo, name, revision))
        if repo != "me/mine":
            raise OSError("cannot\nbe found")
        return str(ROOT / "qwen3vl_export" / "demo" / "checkpoint" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


@pytest.mark.portable
@pytest.mark.parametrize("command", [["targets", "--model"], ["verify", "--ranges", "--json", "--checkpoint"]])
def test_nothing_but_our_error_is_said_of_a_hub_out_of_reach(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client has a log with a handler of its own, to which it writes a line for each retry."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    log, said = logging.get_logger("huggingface_hub.utils._http"), io.StringIO()
    handler = StreamHandler(said)
    logging.get_logger("huggingface_hub").addHandler(handler)

    def fail(*_: object, **__: object) -> str:
        log.warning("Retrying in 1s [Retry 1/5].")
        log.error("Too many retries")
        raise OSError("unreachable")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    arguments = [*command, "me/mine", *(["--json"] if "--json" not in command else [])]
    with pytest.raises(SystemExit) as end:
        run_app(app, arguments)
    out, err = capfd.readouterr()
    assert (end.value.code, out, err.count("\n")) == (CheckpointError.exit_code, "", 1)
    assert "unreachable" in json.loads(err)["error"]["message"]
    assert logging.get_verbosity() == level
    assert said.getvalue() == ""
    log.warning("said again")
    logging.get_logger("huggingface_hub").removeHandler(handler)
    assert said.getvalue() == "said again\n"


@pytest.mark.portable
def test_of_a_hub_id_the_config_alone_is_fetched(hub: list[Any]) -> None:
    assert model_shape("me/mine@v1") == model_shape("demo")
    assert (
        json.loads(call("--model", "me/mine", "--json"))["choice"]
        == json.loads(call("--model", "demo", "--json"))["choice"]
    )
    assert hub == [("me/mine", "config.json", "v1"), ("me/mine", "config.json", None)]
    with pytest.raises(
        CheckpointError, match=r"--model me/other: .*neither here nor on the Hub \(OSError: cannot be found\)"
    ):
        model_shape("me/other")


@pytest.mark.portable
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl-2b"),
        ("Qwen/Qwen3-VL-8B-Thinking-FP8", "qwen3-vl-8b"),
        ("Qwen/Qwen3-VL-235B-A22B-Instruct", "qwen3-vl-235b-a22b"),
    ],
)
def test_of_released_checkpoints_nothing_is_fetched(name: str, size: str, hub: list[Any]) -> None:
    assert model_shape(name) == model_shape(size)
    assert hub == []
