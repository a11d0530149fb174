"""Engines in NVIDIA Polygraphy: the command in a process of its own, and loaders, runner and inputs in this one."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

from demo_training.prompts import training_prompts
from engines import registry
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import DECODER, VISION, Bundle
from helpers import ROOT
from helpers.damage import scaled_weight
from helpers.engines import requantized
from runtime.errors import UsageError
from runtime.manifest import Manifest

pytest.importorskip("polygraphy", reason="polygraphy is not installed: the extra polygraphy has it")

from polygraphy.backend.onnx import BytesFromOnnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, SimpleCompareFunc

from qwen3_vl.integrations.polygraphy import BundleGraph, EngineRunner, EngineSession, LoweredGraph, PromptInputs

PAGE = (ROOT / "docs" / "polygraphy.md").read_text(encoding="utf-8").replace("\\\n", "")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (polygraphy .+)$", PAGE, re.MULTILINE)]
"""The commands of the page, each of which a test below runs."""
COMPARE_DECODER, COMPARE_VISION, INSPECT, SAVE_INPUTS, REDUCE = COMMANDS
DOWN_PROJ = "model.language_model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def bundle(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    demo_bundle.write(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip writes of this package, with the entry points that pyproject.toml has now."""
    folder = tmp_path_factory.mktemp("metadata")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def work(demo_engine: Path, bundle: Path, tmp_path: Path) -> Path:
    """A folder in which the paths of the page lead to the engine and the bundle."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(demo_engine)
    (tmp_path / "out" / "demo-bundle").symlink_to(bundle)
    return tmp_path


def polygraphy(metadata: Path, work: Path, *arguments: str | Path) -> tuple[int, str]:
    """Run the command and return its exit code and all that it printed."""
    command = Path(sys.executable).with_name("polygraphy")
    paths = [str(metadata), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",  # where `debug reduce` looks for its check
    }
    done = subprocess.run(
        [command, *map(str, arguments)],
        cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_run_compares_the_decoder_with_the_bundle_s(metadata: Path, work: Path) -> None:
    code, printed = polygraphy(metadata, work, *COMPARE_DECODER, "--seed", "1")
    assert code == 0, printed
    assert "qwen3vl-runner" in printed and "onnxrt-runner" in printed and "Pass Rate: 100.00%" in printed
    assert "PASSED | Output: 'logits'" in printed and "PASSED | Output: 'present_key_values.3.value'" in printed
    assert "--seed has no use" in printed
    engine = scaled_weight(work / "out" / "demo", work / "faulty", DOWN_PROJ)
    code, printed = polygraphy(metadata, work, *[engine if each == "out/demo" else each for each in COMPARE_DECODER])
    assert code == 1 and "PASSED | Output: 'present_key_values.2.value'" in printed  # of what came into layer 2
    assert "FAILED | Output: 'present_key_values.3.key'" in printed and "FAILED | Output: 'logits'" in printed


def test_script_for_the_vision_tower_runs_by_itself(metadata: Path, work: Path) -> None:
    image = ROOT / "qwen3vl_export" / "demo" / "images" / "held_out_0.png"
    more = ("--qwen3vl-image", image, image, "--gen-script", "compare.py")
    code, printed = polygraphy(metadata, work, *COMPARE_VISION, *more)
    assert code == 0, printed
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "compare.py"], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Passed: 2/2 iterations" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("graph", [VISION, DECODER])
def test_random_inputs_crash(graph: str, bundle: Path) -> None:
    """Why there are inputs of our own: if this ends well some day, they are not needed any more."""
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        Comparator.run([OnnxrtRunner(SessionFromOnnx(str(bundle / f"{graph}.onnx")))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("out/demo-bundle/decoder.onnx", "--qwen3vl"), "is no engine. Give the folder"),
        (
            ("out/demo", "--qwen3vl", "--load-inputs", "i.json", "--qwen3vl-prompt", "x"),
            "leave --qwen3vl-prompt and --qwen3vl-image out",
        ),
        (("out/demo", "--qwen3vl", "--qwen3vl-image", "none.png"), "--qwen3vl-image none.png: there is no such file"),
        (("out/demo", "--qwen3vl", "--onnxrt"), "--onnxrt needs an ONNX model beside the engine"),
        (("out/demo", "--qwen3vl", "--onnxrt", "--qwen3vl-bundle", "out/demo"), "is no bundle. `qwen3vl-export"),
    ],
)
def test_wrong_options_say_what_to_type(options: tuple[str, ...], message: str, metadata: Path, work: Path) -> None:
    code, printed = polygraphy(metadata, work, "run", *options)
    assert code == 1 and message in printed and "Traceback" not in printed


def test_inspect_shows_bundles_and_graphs_with_own_kernels(demo_bundle: Bundle, metadata: Path, work: Path) -> None:
    code, printed = polygraphy(metadata, work, *INSPECT)
    assert code == 0 and printed.count("[Op: DecoderLayer]") == 4 and "[Op: LanguageHead]" in printed
    (target,) = registry.get("ort-cpu-int4").other_kernels
    build_engine(demo_bundle, target, work / "lowered", with_weights=False, runnable=False)
    more = ("lowered/decoder.onnx", "--show", "layers", "--ignore-external-data")
    code, printed = polygraphy(metadata, work, "inspect", "model", *more)
    assert code == 0 and "[Op: MatMulInt4]" in printed and "past_key_values.0.key [dtype=float32" in printed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("onnx_graphsurgeon") is None,
    reason="onnx_graphsurgeon is not installed: the extra polygraphy has it",
)
def test_debug_reduce_ends_at_the_layer_with_a_fault(bundle: Path, metadata: Path, work: Path) -> None:
    code, printed = polygraphy(metadata, work, *SAVE_INPUTS)
    assert code == 0, printed
    (work / "out" / "demo-bundle").unlink()
    scaled_weight(bundle, work / "out" / "demo-bundle", DOWN_PROJ, 0, float("nan"))
    code, printed = polygraphy(metadata, work, *REDUCE)
    assert code == 0, printed
    nodes = onnx.load(work / "reduced.onnx", load_external_data=False).graph.node
    assert nodes[-1].name == "model.language_model.layers.2" and len(nodes) == 7  # rotary, embed, 3 layers, 2 levels


def test_loaders_and_runner_agree_in_a_program(demo_engine: Path, bundle: Path) -> None:
    for graph in (VISION, DECODER):
        inputs = PromptInputs(demo_engine, graph)
        session = SessionFromOnnx(BytesFromOnnx(BundleGraph(bundle, graph)))
        runners = [EngineRunner(EngineSession(demo_engine), graph, name="engine"), OnnxrtRunner(session, name="bundle")]
        results = Comparator.run(runners, data_loader=inputs)
        assert len(results["engine"]) == len(inputs) == 1
        assert results["engine"][0].keys() == results["bundle"][0].keys()
        assert Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-3, rtol=1e-3))


def test_bundle_is_traced_where_a_checkpoint_is_given(tiny_checkpoint: Path) -> None:
    model = BundleGraph(tiny_checkpoint, VISION)()
    assert [value.name for value in model.graph.output] == ["visual_embeds"]
    (weight,) = (each for each in model.graph.initializer if each.name == "model.visual.merger.linear_fc2.weight")
    assert np.isfinite(onnx.numpy_helper.to_array(weight)).all()  # it is in memory: the folder is gone


def test_lowered_graph_of_an_engine_and_of_a_target(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    of_engine = LoweredGraph(tiny_engine)().graph
    of_target = LoweredGraph(tiny_checkpoint, target="ort-cpu-fp32")().graph
    assert [node.op_type for node in of_engine.node] == [node.op_type for node in of_target.node]
    assert of_engine.initializer[0].raw_data == of_target.initializer[0].raw_data != b""
    with pytest.raises(UsageError, match=r"holds no prefill\.onnx"):
        LoweredGraph(tiny_engine, "prefill")()


def test_lowered_graphs_of_fixed_capacity_get_a_cache_of_it(demo_bundle: Bundle, tmp_path: Path) -> None:
    sizes = BuildOptions(max_context=512)
    build_engine(demo_bundle, registry.get("trt-rtx-fp16"), tmp_path / "lowered", runnable=False, options=sizes)
    (feed,) = PromptInputs(tmp_path / "lowered", images=[])
    assert feed["past_key_values.0.key"].shape[2] == 512 and (feed["visual_rows"] == -1).all()
    with EngineRunner(EngineSession(tmp_path / "lowered"), name="lowered") as runner:
        outputs = runner.infer(feed)
    num_tokens = feed["input_ids"].shape[1]
    keys = outputs["present_key_values.1.key"]
    assert keys[:, :, :num_tokens].all(axis=-1).all() and not keys[:, :, num_tokens:].any()


def test_engine_that_takes_grey_levels_is_compared_on_the_same_pixels(
    demo_bundle: Bundle, bundle: Path, tmp_path: Path
) -> None:
    build_engine(demo_bundle, registry.get("ort-cuda-fp16"), tmp_path / "lowered", runnable=False)
    (feed,) = PromptInputs(tmp_path / "lowered", VISION)
    assert (feed["pixel_values"].dtype, feed["pixel_levels"].dtype) == (np.float32, np.uint8)
    session = SessionFromOnnx(str(bundle / "vision.onnx"))
    runners = [
        EngineRunner(EngineSession(tmp_path / "lowered"), VISION, name="engine"),
        OnnxrtRunner(session, name="bundle"),
    ]
    results = Comparator.run(runners, data_loader=[feed])
    assert Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=0.02, rtol=0.02))


def test_cache_of_few_bits_comes_back_in_float32(demo_engine: Path, tmp_path: Path) -> None:
    engine = requantized(demo_engine, tmp_path / "engine", 8, training_prompts(12))
    (feed,) = PromptInputs(engine)
    with EngineRunner(EngineSession(demo_engine)) as exact, EngineRunner(EngineSession(engine)) as rounded:
        wanted, found = exact.infer(feed), rounded.infer(feed)
    for name, values in wanted.items():
        assert found[name].dtype == np.float32
        assert np.linalg.norm(found[name] - values) < 0.05 * np.linalg.norm(values), name


def test_runner_closes_what_it_opened(demo_engine: Path) -> None:
    runner = EngineRunner(EngineSession(demo_engine))
    with runner:
        own = runner.model
    with pytest.raises(UsageError, match="closed"):
        own.check_open()
    with EngineSession(demo_engine)() as model:
        with EngineRunner(model) as runner:
            names = [*runner.get_input_metadata(use_numpy_dtypes=False)]
        model.check_open()
    num_layers = Manifest.read(demo_engine).model.text.num_layers
    assert names[:2] == ["input_ids", "position_ids"] and len(names) == 6 + 2 * num_layers


def test_refused(demo_engine: Path) -> None:
    with pytest.raises(UsageError, match="unknown graph 'prefill'"):
        EngineRunner(EngineSession(demo_engine), "prefill")
    with pytest.raises(UsageError, match="needs an image"):
        PromptInputs(demo_engine, "vision", images=[])
    (feed,) = PromptInputs(demo_engine, images=[])
    feed["past_lengths"] += 1
    with (
        EngineRunner(EngineSession(demo_engine)) as runner,
        pytest.raises(UsageError, match="begins with an empty cache"),
    ):
        runner.infer(feed)
