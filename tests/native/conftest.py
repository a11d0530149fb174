"""Fixtures of the tests of our own kernels. These tests use no other conftest.py: they run under emulators, too."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from runtime import native

hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


RUNS = native.isas() if native.problem() == "" else (native.PORTABLE,)


@pytest.fixture(params=RUNS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor runs, in use for the test."""
    before = native.isa()
    native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture
def any_isa() -> Iterator[None]:
    """Puts back the instruction set that was in use."""
    before = native.isa()
    yield
    native.use(before)
