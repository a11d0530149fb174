"""The thread that owns a session: it takes requests from any thread, runs step after step, and hands the pieces out."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from runtime.errors import DeadlineError, EngineError, OverloadError, Qwen3VLError, UsageError
from runtime.manifest import Manifest
from runtime.prompt_lookup import PromptLookup
from runtime.scheduling.request import Limits, Request
from runtime.scheduling.scheduler import State, Step, next_step
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.steps import Steps
from runtime.session import Session
from runtime.tokenizer import Tokenizer

_T = TypeVar("_T")
# While all that runs waits for the vision tower, nothing wakes the thread for a deadline.
_LOOK_AGAIN_S = 0.1


class Place:
    """A place in the queue, taken before the prompt is prepared.

    It is given back at the end of its block: an error that was raised there holds it for as long as somebody keeps the
    error. Where no block was reached, such as after an interrupt, it is given back when nobody holds it any more.
    """

    def __init__(self, places: set[int], number: int) -> None:
        self._places, self._number = places, number
        places.add(number)

    def leave(self) -> None:
        """Give the place back."""
        self._places.discard(self._number)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __del__(self) -> None:
        self.leave()


class Worker:
    """Queue and thread of one session.

    The thread starts with the first request and ends with `close`. All methods may be called from any thread.

    Args:
        session: The engine.
        manifest: Its manifest.
        tokenizer: Makes text of tokens.
        limits: What runs and waits at most.
    """

    def __init__(self, session: Session, manifest: Manifest, tokenizer: Tokenizer, limits: Limits) -> None:
        self.limits = limits
        self._config = manifest.model
        self._tokenizer = tokenizer
        self._steps = Steps(session, manifest, limits, self._wake)
        # Reentrant: a place may be given back by the garbage collector, in a thread that is inside.
        # Blocks are of the lock, not of the condition: that one is entered by Python code, and an interrupt in there
        # could leave it closed for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._arrived: deque[Sequence] = deque()
        self._waiting: list[Sequence] = []
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._places: set[int] = set()
        self._numbers = itertools.count()
        self._queued_tokens = 0
        self._thread: threading.Thread | None = None
        self._is_draining = self._is_stopped = False
        self._failure: Qwen3VLError | None = None
        self._refused = 0
        self._pid = os.getpid()
        self._num_prefills = 0

    def reserve(self, *, waits: bool = False) -> Place:
        """Take a place in the queue.

        Args:
            waits: Wait for one where there is none.

        Raises:
            OverloadError: The queue is full.
            UsageError: The model is closed.
            EngineError: The engine has failed before.
        """
        with self._lock:
            self._check_open()
            while waits and self._num_queued >= self.limits.max_queue:
                self._changed.wait(_LOOK_AGAIN_S)
                self._check_open()
            if self._num_queued >= self.limits.max_queue:
                raise self._overload(f"{self._num_queued} requests wait, max_queue is {self.limits.max_queue}")
            return Place(self._places, next(self._numbers))

    def submit(self, place: Place, request: Request, *, waits: bool = False) -> None:
        """Put a request into its place.

        Args:
            place: Taken for it.
            request: The request.
            waits: Wait for room where its tokens are too many beside those that wait.

        Raises:
            OverloadError: The prompts that wait have too many tokens.
            DeadlineError: Its time is over.
            UsageError: The model is closed.
            EngineError: The engine has failed before.
        """
        lookup = self._lookup(request)
        sequence = Sequence(request, next(self._numbers), self._tokenizer, lookup)
        most = self.limits.max_queue_tokens
        with self._lock:
            self._check_open()
            _check_deadline(request, "before it was queued")
            while waits and self._queued_tokens and self._queued_tokens + request.num_tokens > most:
                self._changed.wait(_LOOK_AGAIN_S)
                self._check_open()
            if self._queued_tokens and self._queued_tokens + request.num_tokens > most:
                raise self._overload(
                    f"prompts of {self._queued_tokens} tokens wait, this one has {request.num_tokens}, "
                    f"max_queue_tokens is {most}"
                )
            self._queued_tokens += request.num_tokens
            self._arrived.append(sequence)
            place.leave()
            self._start()
            self._changed.notify_all()

    def call(self, work: Callable[[], _T]) -> _T:
        """Run something on the session between two steps, and wait for it.

        Raises:
            Exception: What it raises, and as `reserve`.
        """
        future: Future[_T] = Future()
        with self._lock:
            self._check_open()
            self._jobs.append((work, future))
            self._start()
            self._changed.notify_all()
        return future.result()

    def warm_up(self) -> None:
        """Run each kind of call once; for `call`."""
        self._steps.warm_up()

    def statistics(self) -> dict[str, Any]:
        """Return counters, histograms and what there is now, as plain data."""
        steps, vision = self._steps, self._steps.vision_cache
        with self._lock:
            return {
                **steps.counters.to_dict(),
                "refused": self._refused,
                "waiting": self._num_queued,
                "waiting_tokens": self._queued_tokens,
                "running": steps.num_running,
                "decoding": len(steps.decoding),
                "max_sequences": self.limits.max_sequences,
                "slots": len(steps.slots),
                "cache_rows": steps.slots.total_rows,
                "max_cache_rows": len(steps.slots) * self.limits.max_context,
                "moved_rows": steps.slots.moved_rows,
                "evicted_rows": steps.slots.evicted_rows,
                "vision_cache": {name: getattr(vision, name) for name in ("num_bytes", "hits", "misses", "evictions")},
            }

    def close(self, *, drains: bool, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those there are or let them fail, and end the thread.

        Args:
            drains: Answer them.
            timeout_s: Wait no longer for that, then let them fail.

        Returns:
            Whether the thread has ended.
        """
        if self._is_forked:
            return True
        with self._lock:
            self._is_draining = True
            self._is_stopped = self._is_stopped or not drains
            thread = self._thread
            self._changed.notify_all()
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(timeout_s if drains else None)
        if thread.is_alive() and drains:
            return self.close(drains=False)
        return True

    def stop(self) -> None:
        """End the thread after its step; for what runs when a model is dropped or Python ends."""
        if self._is_forked:
            return
        with self._lock:
            self._is_draining = self._is_stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    @property
    def _is_forked(self) -> bool:
        """Whether this is a fork of the process: the thread is not here, and may have left the lock closed."""
        return os.getpid() != self._pid

    @property
    def _num_queued(self) -> int:
        return len(self._places) + len(self._arrived) + len(self._waiting)

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineError(
                f"the engine has failed and takes no more requests: {self._failure.message}",
                remedy="open the engine again, in a new process if it runs on a GPU",
            )
        if self._is_draining:
            raise _closed()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="qwen3vl-worker", daemon=True)
            self._thread.start()

    def _overload(self, reason: str) -> OverloadError:
        self._refused += 1
        times = self._steps.counters.request_s
        seconds = times.total / times.count / self.limits.max_sequences if times.count else 1.0
        return OverloadError(
            f"too many requests: {reason}, and {self._steps.num_running} run",
            remedy=f"ask again in about {seconds:.3g} s, when a request may have ended, or raise the limit",
            retry_after_s=seconds,
        )

    def _lookup(self, request: Request) -> PromptLookup | None:
        num_tokens = min(request.options.prompt_lookup_num_tokens, self.limits.logits_chunk - 1)
        never = (self._config.image_token_id, self._config.video_token_id)
        return PromptLookup(request.prepared.prompt.input_ids, num_tokens, never) if num_tokens > 0 else None

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        except BaseException as error:  # a bug of ours: nobody may wait for an answer that never comes
            self._failure = EngineError(
                f"the engine's thread ended ({type(error).__name__}: {error})",
                remedy="open the engine again; report it",
            )
            self._end_all(self._failure)
            raise
        self._end_all(self._failure or _closed())

    def _wait(self) -> bool:
        """Wait until there is something to do; return False at the end."""
        steps = self._steps
        with self._lock:
            while not self._is_stopped and self._failure is None:
                self._waiting += self._arrived
                self._arrived.clear()
                has_room = bool(self._waiting) and steps.num_running < self.limits.max_sequences
                if self._jobs or has_room or steps.can_run:
                    return True
                if self._is_draining and not (self._num_queued or steps.num_running):
                    return False
                # A place that is given back wakes nobody.
                may_change = bool(steps.num_running) or self._is_draining
                if not self._changed.wait(_LOOK_AGAIN_S if may_change else None) and steps.num_running:
                    return True  # to look for deadlines
        return False

    def _step(self) -> None:
        steps = self._steps
        while self._jobs:
            _do(*self._jobs.popleft())
        steps.take_vision()
        start = time.perf_counter()
        self._sweep(start)
        # The weights of each step drive all else out of the processor's caches, so that each line costs: sequences that
        # only decode need no decision.
        step = self._decide() if self._waiting or steps.prompts else None
        steps.counters.steps += 1
        steps.counters.scheduler_s += time.perf_counter() - start
        if step is not None:
            self._run_prompt(step.encode, step.prefill)
        steps.decode()
        if steps.failure is not None:
            self._failure = steps.failure

    def _decide(self) -> Step[Sequence]:
        """Return what the next step does, and take those that it admits out of the queue."""
        steps = self._steps
        with self._lock:
            step = next_step(
                State(
                    self._waiting,
                    steps.prompts,
                    len(steps.decoding),
                    self.limits.max_sequences,
                    steps.is_vision_busy,
                    steps.counters.vision_calls,
                    self._num_prefills,
                )
            )
            for sequence in step.admitted:
                self._waiting.remove(sequence)
                self._queued_tokens -= sequence.request.num_tokens
            if step.admitted:
                steps.prompts += step.admitted
                self._changed.notify_all()
        return step

    def _run_prompt(self, encode: Sequence | None, prefill: Sequence | None) -> None:
        """Run the piece of a prompt that is next: images, or a chunk."""
        steps = self._steps
        if encode is not None:
            steps.encode(encode)
            steps.take_vision()
            if not steps.is_vision_busy:
                return  # it ran here
        if prefill is None:
            return
        self._num_prefills += 1
        if not prefill.is_started:
            steps.start(prefill)
            if prefill.waits_for_vision and not steps.is_vision_busy:
                steps.encode(prefill)
                steps.take_vision()
                return
        if not (prefill.waits_for_vision or prefill.is_encoding):
            steps.prefill(prefill)

    def _sweep(self, now: float) -> None:
        """Let go what nobody wants any more, or is too late."""
        steps = self._steps
        for sequence in [*self._waiting, *steps.prompts, *steps.decoding]:
            deadline = sequence.request.deadline
            is_cancelled = sequence.request.pieces.is_cancelled
            if not is_cancelled and (deadline is None or now < deadline):
                continue
            if sequence in self._waiting:
                with self._lock:
                    self._waiting.remove(sequence)
                    self._queued_tokens -= sequence.request.num_tokens
                    self._changed.notify_all()
            else:
                steps.drop(sequence)
            if is_cancelled:
                steps.counters.ended("cancelled")
                sequence.request.pieces.finish(None)
            else:
                steps.counters.ended("expired")
                sequence.request.pieces.fail(_late(f"after {len(sequence.answer_ids)} tokens"))

    def _end_all(self, error: Qwen3VLError) -> None:
        """Let all that waits or runs fail."""
        steps = self._steps
        with self._lock:
            self._is_draining = True
            jobs, self._jobs = self._jobs, deque()
            sequences = [*self._arrived, *self._waiting, *steps.prompts, *steps.decoding]
            self._arrived.clear()
            self._waiting.clear()
            steps.prompts.clear()
            steps.decoding.clear()
            self._changed.notify_all()
        for sequence in sequences:
            steps.counters.ended("failed")
            sequence.request.pieces.fail(type(error)(error.message, remedy=error.remedy))
        for _, future in jobs:
            future.set_exception(type(error)(error.message, remedy=error.remedy))
        steps.close()


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


def _check_deadline(request: Request, when: str) -> None:
    if request.deadline is not None and time.perf_counter() >= request.deadline:
        raise _late(when)


def _late(when: str) -> DeadlineError:
    # How long it was, the caller knows: it began before the request was made.
    return DeadlineError(
        f"the time for this answer was over {when}",
        remedy="pass a larger timeout_s, or ask for fewer tokens (max_new_tokens)",
    )


def _closed() -> UsageError:
    return UsageError("the model was closed", remedy="open the engine again with Qwen3VLModel.from_engine")
