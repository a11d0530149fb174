"""Fixtures that build once a session: the demo engine, and a tiny random checkpoint with its engine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from helpers.garbage import set_aside

# Before PyTorch is imported: models this small gain nothing from a second thread, and where other processes want the
# cores, two threads that wait for each other were measured to take fifty times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is imported: kernels run in its interpreter here, and are compiled in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"

from helpers.random_checkpoints import write_random

if TYPE_CHECKING:
    from engines.bundle import Bundle

# A shell starts what it runs in the background with SIGINT ignored, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in each run, and no judgement by the clock: neither depends on the machine or on what else it does.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


# The files that take longest. `make test` gives a file to whichever process is free: with one of these at the end, the
# other process would wait.
LONG = (
    "tests/project/test_wheel.py",
    "tests/project/test_readme.py",
    "tests/qwen3vl_export/parity/test_parity.py",
    "tests/qwen3vl_export/parity/test_tasks.py",
    "tests/qwen3vl_export/parity/test_moe_parity.py",
    "tests/qwen3vl_export/parity/test_moe_few_bits.py",
    "tests/qwen3vl_export/parity/test_sabotage.py",
    "tests/qwen3vl_export/integrations/test_polygraphy.py",
    "tests/qwen3vl_export/parity/test_bisect.py",
    "tests/qwen3vl_export/tracing/test_tracing.py",
    "tests/engines/tensorrt/test_tensorrt_build.py",
    "tests/qwen3vl_export/test_moe_other_shapes.py",
    "tests/engines/test_new_target.py",
    "tests/engines/test_kills.py",
    "tests/engines/tensorrt/test_moe_tensorrt.py",
    "tests/demo_training/test_demo_training.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def pytest_collection_finish() -> None:
    """Search no module of the tests for garbage, nor what they import."""
    set_aside()


@pytest.fixture(scope="session", autouse=True)
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Open engines with their defaults, whatever `qwen3vl tune` has found on this machine."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.tuning_store.user_cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def demo_bundle() -> Bundle:
    """Bundle of the demo checkpoint; `build` lowers a copy."""
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    return make_bundle(Checkpoint.open("demo"))


@pytest.fixture(scope="session")
def demo_engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the demo checkpoint for ort-cpu-fp32."""
    from helpers.engines import build

    return build(demo_bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("demo") / "engine")


@pytest.fixture(scope="session")
def demo_moe_bundle() -> Bundle:
    """Bundle of the demo with a mixture of experts."""
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    return make_bundle(Checkpoint.open("demo-moe"))


@pytest.fixture(scope="session")
def demo_moe_engine(demo_moe_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the demo with a mixture of experts for ort-cpu-fp32."""
    from helpers.engines import build

    return build(demo_moe_bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("demo-moe") / "engine")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the tiny shape; head_dim differs from hidden / heads."""
    return write_random(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine of the tiny checkpoint for ort-cpu-fp32."""
    from helpers.engines import build
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    bundle = make_bundle(Checkpoint.open(str(tiny_checkpoint)))
    return build(bundle, "ort-cpu-fp32", tmp_path_factory.mktemp("tiny-engine") / "engine")


@pytest.fixture
def gpu_engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """An engine whose manifest says that it lives on a GPU; the CPU's session opens it."""
    from runtime.manifest import Manifest

    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": "gpu"}).write(folder)
    return folder
