"""A browser, and the page of a server that answers as each test tells it to.

The browser is one for each file: while it is open, no event loop can be run in this thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.browser import opened_browser, opened_page
from helpers.stand_in_server import StandIn, stand_in


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as found:
        yield found


@pytest.fixture(scope="module")
def started() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


@pytest.fixture
def server(started: StandIn) -> StandIn:
    started.reset()
    return started


@pytest.fixture
def page(browser: Any, server: StandIn) -> Iterator[Any]:
    with opened_page(browser, server.url) as found:
        yield found
