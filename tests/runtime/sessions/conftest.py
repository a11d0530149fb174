"""Engines with a decode plan whose kernels run on the host."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_plan import write_host_plan


@pytest.fixture(scope="session")
def plain(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine without a plan."""
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("plain") / "engine")


@pytest.fixture(scope="session")
def planned(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The engine with a plan that has a fault."""
    made: dict[str, Path] = {}

    def folder(fault: str = "") -> Path:
        if fault not in made:
            copy = tmp_path_factory.mktemp("planned") / "engine"
            made[fault] = write_host_plan(Path(shutil.copytree(plain, copy)), fault=fault)
        return made[fault]

    return folder
