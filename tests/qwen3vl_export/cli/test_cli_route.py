"""`--vision-engine` and `--prefill-engine`: every command that opens an engine takes them, and says what runs where."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from engines import hardware
from engines.choose import consider
from engines.hardware import Gpu, Hardware
from engines.split import find_split
from engines.target import Target
from helpers import PICTURES
from helpers.command_line import call
from helpers.targets import like
from qwen3vl_export.cli.run import app
from qwen3vl_export.cli.targets import model_shape
from runtime.manifest import Manifest

PICTURE = str(PICTURES / "held_out_0.png")


@pytest.fixture
def copy(demo_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_engine, tmp_path / "copy"))


@pytest.mark.parametrize(
    "options", [("--prefill-engine",), ("--vision-engine",), ("--prefill-engine", "--vision-engine")]
)
def test_an_answer_of_two_engines(options: tuple[str, ...], demo_engine: Path, copy: Path) -> None:
    others = [word for option in options for word in (option, str(copy))]
    code, out, err = call(app, "run", str(demo_engine), "Read the digits.", "--image", PICTURE, *others)
    assert (code, out, err) == (0, "1654\n", "")


def test_inspect_checks_and_shows_the_route(demo_engine: Path, copy: Path) -> None:
    code, out, _ = call(app, "inspect", str(demo_engine), "--prefill-engine", str(copy))
    expected = f"route      decode {demo_engine} (ort-cpu-fp32), prefill {copy} (ort-cpu-fp32), vision {demo_engine}"
    assert code == 0 and expected in out
    _, out, _ = call(app, "inspect", str(demo_engine), "--prefill-engine", str(copy), "--json")
    assert json.loads(out)["route"]["prefill"] == {"engine": str(copy), "target": "ort-cpu-fp32"}
    _, out, _ = call(app, "inspect", str(demo_engine), "--json")
    assert "route" not in json.loads(out)


def test_bench_times_the_route(demo_engine: Path, copy: Path) -> None:
    sizes = ("--runs", "1", "--new-tokens", "2", "--image-size", "64x64", "--json")
    code, out, _ = call(app, "bench", str(demo_engine), "--prefill-engine", str(copy), *sizes)
    assert code == 0 and json.loads(out)["new_tokens"] == 2


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_engines_of_different_checkpoints_are_refused(command: str, demo_engine: Path, copy: Path) -> None:
    manifest = Manifest.read(copy)
    source = {**manifest.source, "name": "another", "weights_sha256": "0" * 64}
    dataclasses.replace(manifest, source=source).write(copy)
    prompt = ("Hello.",) if command == "run" else ()
    code, _, err = call(app, command, str(demo_engine), *prompt, "--prefill-engine", str(copy))
    assert code == 2
    assert f"{demo_engine} (of demo) and {copy} (of another) are not engines of one checkpoint" in err
    assert "remedy: build both engines of one checkpoint" in err


def test_the_engine_itself_is_refused(demo_engine: Path) -> None:
    code, _, err = call(app, "run", str(demo_engine), "Hello.", "--vision-engine", str(demo_engine))
    assert code == 2 and "--vision-engine" in err and "it changes nothing" in err


def test_targets_shows_what_a_small_gpu_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Target] = [like("ort-cuda-fp16"), like("ort-cpu-int8")]
    gpu = Gpu("Test RTX", "8.9", 3 << 30, 3 << 30, "570.1")
    machine = Hardware("Abacus", (), 2, 32 << 30, gpus=(gpu,))
    monkeypatch.setattr(hardware, "probe", lambda: machine)
    for module in ("choose", "split", "registry"):
        monkeypatch.setattr(f"engines.{module}.all_targets", lambda: targets)
    config = model_shape("qwen3-vl-2b")
    split = find_split(machine, config, consider(machine, config))
    assert split is not None
    _, out, _ = call(app, "targets", "--model", "qwen3-vl-2b")
    assert out.endswith(f"--target auto: ort-cpu-int8\n\n{split.render('MODEL')}\n")
    _, out, _ = call(app, "targets", "--model", "qwen3-vl-2b", "--json")
    assert json.loads(out)["choice"]["split"] == split.to_dict()
