"""A server of the demo engine, for the tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from helpers.http_server import Client, running
from runtime.model import Qwen3VLModel


@pytest.fixture(scope="session")
def opened(demo_engine: Path) -> Qwen3VLModel:
    """The demo engine, to compare with what its server says."""
    return Qwen3VLModel.from_engine(demo_engine)


@pytest.fixture(scope="session")
def client(demo_engine: Path) -> Iterator[Client]:
    """Asks a server of the demo engine."""
    with running(Qwen3VLModel.from_engine(demo_engine)) as found:
        yield found
