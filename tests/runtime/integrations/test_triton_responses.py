"""The order of what is said to a response sender: nothing beside a call that runs, and nothing after the final one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from helpers.triton_backend import Logger, backend_module
from runtime.integrations.triton.responses import Responses
from runtime.server.errors import ApiError

_PATIENCE_S = 60


class Sender:
    """Notes calls when they begin and when they end; each waits for the gate."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.began = threading.Event()

    def send(self, response: Any, flags: int) -> None:
        name = "error" if response.has_error() else response.output_tensors()[0].as_numpy()[0].decode()
        self._note(f"{name} {flags}")

    def is_cancelled(self) -> bool:
        self._note("asked")
        return True

    def _note(self, name: str) -> None:
        self.calls.append(f"{name} begins")
        self.began.set()
        assert self.gate.wait(_PATIENCE_S)
        self.calls.append(f"{name} ends")


def run(scenario: Callable[[Responses, Sender], Coroutine[Any, Any, None]]) -> list[str]:
    sender = Sender()
    with ThreadPoolExecutor(4) as threads:
        try:
            asyncio.run(scenario(Responses(backend_module(Logger()), sender, threads), sender))
        finally:
            sender.gate.set()
    return sender.calls


async def begun(sender: Sender) -> None:
    assert await asyncio.to_thread(sender.began.wait, _PATIENCE_S)


def test_the_final_response_waits_until_a_question_is_answered() -> None:
    async def scenario(responses: Responses, sender: Sender) -> None:
        asking = asyncio.create_task(responses.is_cancelled())
        await begun(sender)
        asking.cancel()  # nobody waits for it any more, and its thread goes on
        sending = asyncio.create_task(responses.send({"text_output": ["a"]}, is_final=True))
        await asyncio.wait([asking])
        sender.gate.set()
        await sending
        assert not await responses.is_cancelled()  # the request is gone, so the server is not asked
        await responses.fail(ApiError(500, "too late"))

    assert run(scenario) == ["asked begins", "asked ends", "a 1 begins", "a 1 ends"]


def test_an_error_waits_for_the_response_that_was_being_sent() -> None:
    async def scenario(responses: Responses, sender: Sender) -> None:
        sending = asyncio.create_task(responses.send({"text_output": ["a"]}, is_final=False))
        await begun(sender)
        sending.cancel()
        await asyncio.wait([sending])
        failing = asyncio.create_task(responses.fail(ApiError(499, "cancelled")))
        await asyncio.sleep(0)
        assert sender.calls == ["a 0 begins"]
        sender.gate.set()
        await failing

    assert run(scenario) == ["a 0 begins", "a 0 ends", "error 1 begins", "error 1 ends"]
