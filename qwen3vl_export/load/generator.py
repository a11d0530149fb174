"""Offer an engine or a server requests as clients do, and note what becomes of each.

Closed loop: so many clients, each of which asks again when it has its answer. Open loop: requests arrive at random,
whether or not earlier ones are answered, as they do at a server (Poisson arrivals); what the server cannot take then
shows as refusals and as waiting, which clients that wait for each other would hide.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.errors import OverloadError, Qwen3VLError

if TYPE_CHECKING:
    from qwen3vl_export.load.client import Client, Reply
    from qwen3vl_export.load.prompts import Prompts

MAX_IN_FLIGHT = 2048
"""Threads of an open loop without a bound, each of which waits for one answer."""
_LONGEST_PAUSE_S = 1.0
_SAMPLE_S = 0.25


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        clients: Most requests in flight. Without a rate, so many clients ask, each again when it has its answer.
        rate: Requests a second, at random; an arrival waits while `clients` are in flight. None for a closed loop.
        num_requests: Requests to offer; None for no bound.
        duration_s: Seconds in which they are offered; all that were accepted are then answered. None for no bound.
        new_tokens: Tokens of each answer, which no end token ends.
        seed: Seed of the arrivals.
        warms_up: Send prompt number 0 before, and wait for its answer.
    """

    clients: int
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    new_tokens: int = 32
    seed: int = 0
    warms_up: bool = True


@dataclass(frozen=True)
class Answered:
    """A request that was answered; seconds since the load began.

    Attributes:
        arrived_s: When it arrived.
        asked_s: When it was sent.
        ended_s: When its answer was complete.
        reply: What the client says of it.
    """

    arrived_s: float
    asked_s: float
    ended_s: float
    reply: Reply

    @property
    def latency_s(self) -> float:
        """Seconds from the arrival to the whole answer."""
        return self.ended_s - self.arrived_s

    @property
    def ttft_s(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.asked_s - self.arrived_s + self.reply.ttft_s


@dataclass
class Trace:
    """What became of the requests; seconds since the load began.

    Attributes:
        num_offered: Requests that were sent, whatever became of them.
        answered: Those with an answer, in the order in which they ended.
        refused_s: When the others were refused because too many waited.
        failed: How often each error ended a request, by its message.
        rss: Resident bytes of the process that answers, and when; empty if they cannot be seen.
        wall_s: From the beginning to the last answer.
        before, after: `Client.statistics` at both ends.
    """

    num_offered: int = 0
    answered: list[Answered] = field(default_factory=list)
    refused_s: array[float] = field(default_factory=lambda: array("d"))
    failed: dict[str, int] = field(default_factory=dict)
    rss: list[tuple[float, int]] = field(default_factory=list)
    wall_s: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Requests that an error ended."""
        return sum(self.failed.values())

    @property
    def num_ended(self) -> int:
        """Requests of which something has become."""
        return len(self.answered) + len(self.refused_s) + self.num_failed


def offer(
    client: Client, prompts: Prompts, load: Load, on_tick: Callable[[Trace], object] = lambda trace: None
) -> Trace:
    """Offer a load, and return when all of it is answered or refused.

    Args:
        client: Whom to ask.
        prompts: What is asked.
        load: How requests arrive.
        on_tick: Called with what there is so far, some times a second, in another thread.

    Raises:
        Exception: What ended a request and is no error that a user can act on.
    """
    run = _Run(client, prompts, load)
    if load.warms_up:
        run.warm_up()
    run.trace.before = client.statistics()
    run.begin()
    ticker = threading.Thread(target=run.tick, args=(on_tick,), daemon=True)
    ticker.start()
    num_threads = min(load.clients, MAX_IN_FLIGHT)
    clients = ThreadPoolExecutor(num_threads, "client")
    try:
        if load.rate is None:
            futures = [clients.submit(run.ask_again_and_again) for _ in range(num_threads)]
            for future in futures:
                future.result()
        else:
            run.arrive(clients.submit, load.rate)
        clients.shutdown(wait=True)
    except BaseException:
        run.is_over.set()
        client.stop()  # else the clients would wait for their answers
        raise
    finally:
        run.is_over.set()
        clients.shutdown(wait=True, cancel_futures=True)
        ticker.join()
    run.end()
    return run.trace


class _Run:
    """One load as it runs; all threads of it write here."""

    def __init__(self, client: Client, prompts: Prompts, load: Load) -> None:
        self.trace = Trace()
        self.is_over = threading.Event()
        self._client, self._prompts, self._load = client, prompts, load
        self._lock = threading.Lock()
        self._start = 0.0
        self._bug: Exception | None = None

    def warm_up(self) -> None:
        self._client.ask(self._prepared(0))

    def begin(self) -> None:
        self._start = time.perf_counter()
        self._sample()

    def end(self) -> None:
        """Take the last figures."""
        if self._bug is not None:
            raise self._bug
        trace = self.trace
        trace.wall_s = max((each.ended_s for each in trace.answered), default=self._now())
        trace.after = self._client.statistics()
        self._sample()

    def tick(self, on_tick: Callable[[Trace], object]) -> None:
        """Sample the memory and tell what there is, until the load is over."""
        while not self.is_over.wait(_SAMPLE_S):
            self._sample()
            on_tick(self.trace)

    def ask_again_and_again(self) -> None:
        """Be one client of a closed loop; one that is refused waits as long as it is told to."""
        while (index := self._next()) is not None:
            pause = self._ask(self._prepared(index), None)
            if pause:
                self.is_over.wait(min(pause, _LONGEST_PAUSE_S))

    def arrive(self, submit: Callable[..., object], rate: float) -> None:
        """Send requests as they arrive."""
        import numpy as np

        gaps = np.random.default_rng(self._load.seed)
        arrival_s = 0.0
        while (index := self._next(arrival_s)) is not None:
            request = self._prepared(index)
            pause = arrival_s - self._now()
            if pause > 0:
                self.is_over.wait(pause)
            submit(self._ask, request, arrival_s)
            arrival_s += float(gaps.exponential(1 / rate))

    def _next(self, arrival_s: float | None = None) -> int | None:
        """Return the number of the next request, or None at the end."""
        most, duration = self._load.num_requests, self._load.duration_s
        now = self._now() if arrival_s is None else arrival_s
        with self._lock:
            is_done = most is not None and self.trace.num_offered >= most
            if is_done or self.is_over.is_set() or (duration is not None and now >= duration):
                return None
            self.trace.num_offered += 1
            return self.trace.num_offered

    def _ask(self, request: Any, arrival_s: float | None) -> float | None:
        """Send one request and note what becomes of it; return the seconds to wait after a refusal."""
        asked = self._now()
        arrived = asked if arrival_s is None else arrival_s
        try:
            reply = self._client.ask(request)
        except OverloadError as error:
            self.trace.refused_s.append(asked)
            return error.retry_after_s
        except Qwen3VLError as error:
            with self._lock:
                self.trace.failed[error.message] = self.trace.failed.get(error.message, 0) + 1
        except Exception as error:  # a bug: the load ends, and the caller gets it
            self._bug = error
            self.is_over.set()
        else:
            self.trace.answered.append(Answered(arrived, asked, self._now(), reply))
        return None

    def _prepared(self, index: int) -> Any:
        return self._client.prepare(self._prompts.messages(index), self._load.new_tokens)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _sample(self) -> None:
        num_bytes = self._client.memory_bytes()
        if num_bytes is not None:
            self.trace.rss.append((self._now(), num_bytes))
