"""What is checked before a plan runs, and that every name of TensorRT's API that is used exists."""

from __future__ import annotations

import ast
import enum
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers import host_tensorrt
from helpers.host_cuda import HostDevice
from helpers.host_engine import build_host_engine, with_capabilities
from helpers.host_tensorrt import CONTEXT_BYTES, SCRATCH_BYTES, STREAMABLE_BYTES
from runtime.contract import VisionInputs
from runtime.cuda import CudaDevice
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.manifest import FileRecord, Manifest, sha256_of
from runtime.profiles import Profile, choose
from runtime.session import SessionOptions, open_session
from runtime.sessions.tensorrt import TensorRtSession
from runtime.tensorrt_log import first_errors, is_out_of_memory, make_logger
from runtime.tensorrt_plan import Library

VERSION = host_tensorrt.__version__


@pytest.fixture(scope="module")
def engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(max_context=64, max_batch=1, prefill_chunk=16, patch_buckets=(64,))
    return build_host_engine(demo_bundle, tmp_path_factory.mktemp("host") / "engine", options)


@pytest.fixture
def folder(engine: Path, tmp_path: Path) -> Path:
    """Copy of the plans, which may be spoilt; they go on naming the graphs of the engine."""
    for name in ("vision.plan", "decoder.plan", "engine.json"):
        shutil.copy(engine / name, tmp_path / name)
    return tmp_path


def refusal(folder: Path, manifest: Manifest, device: HostDevice | None = None) -> EngineError:
    """Return the error of opening; whatever was allocated until then is free again."""
    device = device or HostDevice()
    with pytest.raises(EngineError) as caught:
        TensorRtSession(folder, manifest, device)
    assert device.leaks() == []
    assert "qwen3vl-export" in str(caught.value.remedy)
    return caught.value


def rehashed(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """Return the manifest as it would be had the file always been what it is now."""
    path = folder / name
    record = FileRecord(path.stat().st_size, sha256_of(path), is_weights=True)
    return Manifest(**{**vars(manifest), "files": {**manifest.files, name: record}})


def test_an_intact_engine_opens(folder: Path) -> None:
    device = HostDevice()
    TensorRtSession(folder, Manifest.read(folder), device).close()
    assert device.leaks() == []


def test_another_gpu_is_refused_by_its_compute_capability(folder: Path) -> None:
    error = refusal(folder, Manifest.read(folder), HostDevice(compute_capability="9.0"))
    assert "runs on GPUs of compute capability 8.6, 8.9; host memory has 9.0" in error.message
    assert str(error.remedy).endswith("--target trt-rtx-fp16, on this machine")


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [("7.5", "--target trt-rtx-fp16 --compute-capability 7.5"), ("9.0", "builds for no such GPU: export for another")],
)
def test_a_library_that_lists_gpus_is_built_for_those_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: str, remedy: str
) -> None:
    listed = enum.Enum("ComputeCapability", ["SM75", "SM86"])
    monkeypatch.setattr(host_tensorrt, "ComputeCapability", listed, raising=False)
    with pytest.raises(EngineError) as caught:
        TensorRtSession(folder, Manifest.read(folder), HostDevice(compute_capability=capability))
    assert remedy in str(caught.value.remedy)


@pytest.mark.parametrize(("capability", "opens"), [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True)])
def test_a_hardware_compatible_plan_runs_on_ampere_and_later(folder: Path, capability: str, opens: bool) -> None:
    manifest = with_capabilities(Manifest.read(folder), hardware_compatible=True, compute_capabilities=["8.6"])
    device = HostDevice(compute_capability=capability)
    if opens:
        TensorRtSession(folder, manifest, device).close()
    else:
        assert "compute capability 8.0 and later; host memory has 7.5" in refusal(folder, manifest, device).message


@pytest.mark.parametrize(
    ("built_with", "is_compatible", "opens"),
    [
        (VERSION, False, True),
        ("11.2.0.32", False, False),
        ("11.2.0.34", False, False),
        ("11.1.0.33", True, True),
        ("11.3.0.1", True, False),
        ("10.14.1.48", True, False),
    ],
)
def test_the_library_must_be_the_one_it_was_built_with(
    folder: Path, built_with: str, is_compatible: bool, opens: bool
) -> None:
    manifest = with_capabilities(Manifest.read(folder), library_version=built_with, version_compatible=is_compatible)
    if opens:
        TensorRtSession(folder, manifest, HostDevice()).close()
    else:
        assert (
            f"was built with helpers.host_tensorrt {built_with}, and {VERSION} is installed"
            in refusal(folder, manifest).message
        )


def test_a_library_that_is_not_installed_is_named(folder: Path) -> None:
    manifest = with_capabilities(Manifest.read(folder), library="tensorrt_of_tomorrow")
    assert f"needs the Python package tensorrt_of_tomorrow {VERSION}" in refusal(folder, manifest).message


def test_a_truncated_plan_is_refused_by_its_size(folder: Path) -> None:
    plan = folder / "decoder.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    size = plan.stat().st_size
    assert f"decoder.plan: {size} bytes, expected {size + 1}" in refusal(folder, Manifest.read(folder)).message


def test_a_damaged_plan_is_refused_with_the_librarys_words(folder: Path) -> None:
    plan = folder / "decoder.plan"
    plan.write_bytes(b"X" + plan.read_bytes()[1:])
    message = refusal(folder, Manifest.read(folder)).message
    assert f"decoder.plan: helpers.host_tensorrt {VERSION} does not open it (Serialization assertion" in message


def test_exchanged_plans_are_told_apart(folder: Path) -> None:
    shutil.copy(folder / "decoder.plan", folder / "vision.plan")
    message = refusal(folder, rehashed(folder, Manifest.read(folder), "vision.plan")).message
    assert "vision.plan: not the plan that the manifest describes: 2 profiles, expected 1" in message
    assert "('input_ids', 'INT64')" in message


def test_a_plan_that_copies_its_cache_is_refused(folder: Path, engine: Path) -> None:
    manifest = Manifest.read(folder)
    profiles = manifest.capabilities["profiles"]["decoder"]
    host_tensorrt.write_plan(folder / "decoder.plan", engine / "decoder.onnx", profiles, in_place=False)
    message = refusal(folder, rehashed(folder, manifest, "decoder.plan")).message
    assert "present_key_values.0.key is not written into the memory of past_key_values.0.key" in message


def test_a_stripped_plan_takes_the_weights_of_the_graph_beside_it(folder: Path, engine: Path) -> None:
    manifest = with_capabilities(Manifest.read(folder), stripped=True)
    message = refusal(folder, manifest).message
    assert "vision.onnx: the plan beside it does not take its weights (Failed to open" in message
    for name in ("vision.onnx", "decoder.onnx"):
        shutil.copy(engine / name, folder / name)
    session = TensorRtSession(folder, manifest, HostDevice())
    assert session._decoder._engine.refitted_from == str(folder / "decoder.onnx")
    session.close()


def later_bytes(manifest: Manifest) -> int:
    """Device memory of the largest cache, of every input in its largest shape and of the logits, for `engine`."""
    text, hidden = manifest.model.text, manifest.model.num_visual_levels * manifest.model.text.hidden_size
    cache = 2 * text.num_layers * text.num_kv_heads * 64 * text.head_dim * 2
    batch, chunk, patches = 2, 16, 64  # a profile holds at least two sequences
    elements = manifest.model.vision.patch_elements
    vision = patches * (4 * elements + 8 * 4 + 4 * 4 + 2 * 4 * manifest.model.vision.head_dim // 2)
    decoder = batch * chunk * 8 * (1 + 3 + 1) + 8 * batch + 4 * 64 * hidden + 8 * batch * chunk
    return cache + vision + decoder + 4 * chunk * text.vocab_size


@pytest.mark.parametrize(
    ("left", "decoder", "vision"),
    [
        (2 * STREAMABLE_BYTES + 5, STREAMABLE_BYTES, STREAMABLE_BYTES),
        (STREAMABLE_BYTES + 7, STREAMABLE_BYTES, 7),
        (11, 11, 0),
        (-1, 0, 0),
    ],
)
def test_weights_take_the_memory_that_nothing_else_will_take(
    folder: Path, left: int, decoder: int, vision: int
) -> None:
    manifest = with_capabilities(Manifest.read(folder), weight_streaming=True)
    device = HostDevice()
    session = TensorRtSession(folder, Manifest.read(folder), device)
    opened = device.total_bytes - device.memory_info()[0] - 2 * CONTEXT_BYTES  # without a workspace
    session.close()
    # Contexts of decode and prefill, and of the one size of images, with what streaming takes of each.
    contexts = 4 * CONTEXT_BYTES + 3 * SCRATCH_BYTES
    session = TensorRtSession(
        folder, manifest, HostDevice(total_bytes=opened + later_bytes(manifest) + contexts + left)
    )
    budgets = [plan._engine.weight_streaming_budget_v2 for plan in (session._decoder, session._vision)]
    assert budgets == [decoder, vision]
    session.close()


def test_weights_stay_where_the_plan_does_not_stream(folder: Path) -> None:
    session = TensorRtSession(folder, Manifest.read(folder), HostDevice())
    assert session._decoder._engine.weight_streaming_budget_v2 == STREAMABLE_BYTES
    session.close()


def test_the_workspace_is_that_of_the_largest_profile_and_all_contexts_share_it(folder: Path) -> None:
    device = HostDevice()
    session = TensorRtSession(folder, Manifest.read(folder), device)
    (address, num_bytes), other = session._decoder._workspace, session._vision._workspace
    assert other == (address, num_bytes)
    assert num_bytes == device.allocation_at(address).num_bytes == 2 * CONTEXT_BYTES
    session.close()
    assert device.leaks() == []


def test_each_batch_of_a_decode_step_counts_as_a_context(folder: Path) -> None:
    session = TensorRtSession(folder, Manifest.read(folder), HostDevice())
    assert session._decoder.context_bytes(3) == (3 * 1 + 2) * CONTEXT_BYTES
    session.close()


def test_a_budget_that_is_refused_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "This network does not support weight streaming."
    budget = property(lambda self: 1 << 20, lambda self, _: self.log(refused))
    monkeypatch.setattr(host_tensorrt.ICudaEngine, "weight_streaming_budget_v2", budget)
    manifest = with_capabilities(Manifest.read(folder), weight_streaming=True)
    assert refused in refusal(folder, manifest).message


def test_a_bfloat16_cache_is_read_as_float32() -> None:
    device = HostDevice()
    stream = device.new_stream()
    staging = Staging(device, stream)
    cache = DeviceKVCache(device, staging, 2, (1, 2, 3, 4), "bfloat16")
    values = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4) - 12  # exact in bfloat16
    bindings = cache.bindings()
    staging.upload(bindings["past_key_values.1.value"], (values.view(np.uint32) >> 16).astype(np.uint16))
    key, value = cache.layer(1)
    assert np.array_equal(value, values)
    assert not key.any()
    assert cache.num_bytes == 2 * 2 * 24 * 2
    assert bindings["present_key_values.1.value"] == bindings["past_key_values.1.value"]
    del cache
    staging.close()
    device.free_stream(stream)
    assert device.leaks() == []


def test_without_a_driver_the_error_says_so(folder: Path) -> None:
    try:
        CudaDevice()
    except EngineError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="no NVIDIA driver is loaded on this machine") as caught:
        open_session(folder, Manifest.read(folder))
    assert "--target ort-cpu-int4" in str(caught.value.remedy)


def test_out_of_memory_in_the_library_is_a_capacity_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: Any, config: Any) -> None:
        engine.log("Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)")

    monkeypatch.setattr(host_tensorrt.ICudaEngine, "create_execution_context", refuse)
    device = HostDevice()
    session = TensorRtSession(folder, Manifest.read(folder), device)
    try:
        pixels, patches = np.zeros((1, 4, 1536), np.float32), np.zeros((4, 4), np.int64)
        table = np.zeros((4, 12), np.float32)
        with pytest.raises(CapacityError, match=r"no execution context for profile patches-64: the GPU is out of mem"):
            session.vision(VisionInputs(pixels, patches, patches.astype(np.float32), table, table))
    finally:
        session.close()
    assert device.leaks() == []


def test_out_of_memory_is_found_among_all_errors_and_the_first_three_are_shown() -> None:
    log = make_logger(host_tensorrt)
    for message in ("a", "b", "c", "Error Code 2: Out of Memory"):
        log.log(host_tensorrt.ILogger.Severity.ERROR, message)
    log.log(host_tensorrt.ILogger.Severity.WARNING, "only a warning")
    errors = log.take()
    assert first_errors(errors) == "a; b; c"
    assert is_out_of_memory(errors) and not is_out_of_memory(errors[:3])
    assert log.take() == [] and first_errors([]) == "it does not say why"


@pytest.mark.parametrize("option", [{"threads": 2}, {"huge_pages": True}])
def test_options_of_processors_are_refused(folder: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(option))):
        open_session(folder, Manifest.read(folder), SessionOptions(**option))


PROFILES = (
    Profile(0, "decode", {"input_ids": (1, 1)}, {"input_ids": (4, 1)}),
    Profile(1, "prefill", {"input_ids": (1, 1)}, {"input_ids": (1, 512)}),
)


@pytest.mark.parametrize(("shape", "name"), [((1, 1), "decode"), ((4, 1), "decode"), ((1, 2), "prefill")])
def test_the_first_profile_that_takes_a_call_is_chosen(shape: tuple[int, int], name: str) -> None:
    assert choose(PROFILES, {"input_ids": shape}).name == name


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((5, 1), "--max-batch"), ((1, 513), "--prefill-chunk"), ((2, 2), "split the call"), ((1, 1, 1), "split the call")],
)
def test_a_call_that_no_profile_takes_names_them_all(shape: tuple[int, ...], remedy: str) -> None:
    with pytest.raises(CapacityError, match="decode takes B 1 to 4, S 1; prefill takes B 1, S 1 to 512") as caught:
        choose(PROFILES, {"input_ids": shape})
    assert remedy in str(caught.value.remedy)


# Variables of runtime/tensorrt_plan.py and runtime/tensorrt_log.py that hold an object of the library.
OBJECTS = {
    "trt": "",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "refitter": "Refitter",
    "parser": "OnnxParserRefitter",
}


def used_names() -> dict[str, set[str]]:
    """Return the attributes that the runtime uses, by class of the library; its own names have none."""
    modules = map(importlib.import_module, ("runtime.tensorrt_plan", "runtime.tensorrt_log"))
    source = "\n".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in modules)
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            holder = node.value
            name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", None)
            if name in OBJECTS:
                found.setdefault(OBJECTS[name], set()).add(node.attr)
    return found


def missing_names(library: Any) -> list[str]:
    missing = []
    for owner, names in used_names().items():
        holder = getattr(library, owner) if owner else library
        missing += [f"{owner}.{name}" for name in sorted(names) if not hasattr(holder, name)]
    return missing


def test_the_names_are_found_in_the_source() -> None:
    names = used_names()
    assert names.keys() == set(OBJECTS.values())
    assert {"Runtime", "ILogger", "ExecutionContextAllocationStrategy", "Refitter"} <= names[""]
    assert {"execute_async_v3", "set_tensor_address", "set_input_shape"} <= names["IExecutionContext"]


def test_every_name_exists_in_tensorrt_rtx() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert missing_names(library) == []
    assert hasattr(library.IExecutionContext, "is_stream_capturable")
    assert {"ERROR", "INTERNAL_ERROR"} <= library.ILogger.Severity.__members__.keys()
    assert {"FLOAT", "HALF", "BF16", "INT64"} <= library.DataType.__members__.keys()


def test_the_host_library_has_no_names_that_tensorrt_lacks() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    for owner in ("Runtime", "ICudaEngine", "IExecutionContext"):
        real = dir(getattr(library, owner))
        own = {"graph", "profiles", "inputs", "outputs", "log"}
        names = {name for name in vars(getattr(host_tensorrt, owner)) if not name.startswith("_")} - own
        assert names <= set(real)


def test_tensorrt_rtx_itself_refuses_a_damaged_plan(folder: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    (folder / "decoder.plan").write_bytes(b"no plan" * 100)
    manifest = with_capabilities(Manifest.read(folder), library="tensorrt_rtx", library_version=library.__version__)
    opened = Library(manifest, HostDevice())
    with pytest.raises(EngineError, match=r"decoder\.plan: tensorrt_rtx .* does not open it \(.*[Ss]erializ"):
        opened.open_plan(folder / "decoder.plan", 700, {}, ())
