"""The thread that owns a session: it takes requests from any thread, runs step after step, and hands the pieces out."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from runtime.errors import DeadlineError, EngineError, OverloadError, Qwen3VLError, UsageError
from runtime.image_processor import ProcessedImage
from runtime.manifest import Manifest
from runtime.parallel import no_thread
from runtime.prompt_lookup import PromptLookup
from runtime.scheduling.request import Limits, Request
from runtime.scheduling.scheduler import State, Step, next_step
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.steps import Steps
from runtime.scheduling.wakeup import Wakeup
from runtime.session import Session
from runtime.still_wanted import Check, always
from runtime.tokenizer import Tokenizer
from runtime.visual_pruning.scored import Encoded

_T = TypeVar("_T")
# While all that runs waits for the vision tower, nothing wakes the thread for a deadline.
_LOOK_AGAIN_S = 0.1
_VISION_COUNTS = ("num_bytes", "device_bytes", "hits", "misses", "evictions")


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
        if hasattr(self, "_places"):  # an interrupt may come before
            self.leave()


class _Job(Generic[_T]):
    """Something to run on the session between two steps, and how it went.

    Attributes:
        is_vision: It runs the vision tower alone.
    """

    def __init__(self, work: Callable[[], _T], *, is_vision: bool, on_end: Callable[[], object] = lambda: None) -> None:
        self._work = work
        self._on_end = on_end
        self.is_vision = is_vision
        self._ended = Wakeup()
        self._outcome: list[_T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run it; what it raises is for who waits."""
        try:
            self._outcome.append(self._work())
        except BaseException as error:
            self._error = error
        self._end()

    def fail(self, error: Exception) -> None:
        """End it without having run it."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._ended.wake()
        self._on_end()

    def wait(self) -> _T:
        """Wait for its end and return what it gave, or raise what it raised."""
        self._ended.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._outcome.pop()


class Worker:
    """Queue and thread of one session.

    The thread ends with `close` or `stop`. All methods may be called from any thread.

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
        # Reentrant: what the garbage collector drops may call back in a thread that is inside.
        self._lock = threading.RLock()
        self._changed = Wakeup()
        self._steps = Steps(session, manifest, limits, self._changed.wake)
        self._hoping: set[Wakeup] = set()
        self._arrived: deque[Sequence] = deque()
        self._waiting: list[Sequence] = []
        self._jobs: deque[_Job[Any]] = deque()
        self._places: set[int] = set()
        self._numbers = itertools.count()
        self._queued_tokens = 0
        self._is_draining = self._is_stopped = False
        self._failure: Qwen3VLError | None = None
        self._refused = 0
        self._pid = os.getpid()
        self._num_prefills = 0
        # Started here and not with a request: an interrupt there would leave a thread that is or is not to be started.
        self._thread = threading.Thread(target=self._run, name="qwen3vl-worker", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_thread(error) from error

    def reserve(self, *, waits: bool = False, check: Check = always) -> Place:
        """Take a place in the queue.

        Args:
            waits: Wait for one where there is none.
            check: Asked while it waits; raises where the place is not wanted any more.

        Raises:
            OverloadError: The queue is full.
            UsageError: The model is closed.
            EngineError: The engine has failed before.
        """
        room = Wakeup()
        while True:
            with self._lock:
                self._check_open()
                if self._num_queued < self.limits.max_queue:
                    return Place(self._places, next(self._numbers))
                if not waits:
                    raise self._overload(f"{self._num_queued} requests wait, max_queue is {self.limits.max_queue}")
                self._hoping.add(room)
            room.wait(_LOOK_AGAIN_S)
            check()

    def submit(self, place: Place, request: Request, *, waits: bool = False, check: Check = always) -> None:
        """Put a request into its place.

        Args:
            place: Taken for it.
            request: The request.
            waits: Wait for room where its tokens are too many beside those that wait.
            check: As in `reserve`.

        Raises:
            OverloadError: The prompts that wait have too many tokens.
            DeadlineError: Its time is over.
            UsageError: The model is closed.
            EngineError: The engine has failed before.
        """
        lookup = self._lookup(request)
        sequence = Sequence(request, next(self._numbers), self._tokenizer, lookup)
        most = self.limits.max_queue_tokens
        room = Wakeup()
        while True:
            with self._lock:
                self._check_open(has_place=True)
                _check_deadline(request, "before it was queued")
                if not self._queued_tokens or self._queued_tokens + request.num_tokens <= most:
                    self._queued_tokens += request.num_tokens
                    self._arrived.append(sequence)
                    place.leave()
                    self._changed.wake()
                    return
                if not waits:
                    raise self._overload(
                        f"prompts of {self._queued_tokens} tokens wait, this one has {request.num_tokens}, "
                        f"max_queue_tokens is {most}"
                    )
                self._hoping.add(room)
            room.wait(_LOOK_AGAIN_S)
            check()

    def check_open(self, *, has_place: bool = False) -> None:
        """Raise if a request would not be taken any more.

        Args:
            has_place: It has its place in the queue, and is still taken while the model answers what it had accepted.

        Raises:
            UsageError: The model was closed.
            EngineError: The engine has failed.
        """
        self._check_open(has_place=has_place)

    def call(self, work: Callable[[], _T], *, is_vision: bool = False) -> _T:
        """Run something on the session between two steps, and wait for it.

        Args:
            work: To be run.
            is_vision: It runs the vision tower alone: then beside the steps, where a session can.

        Raises:
            Exception: What it raises, and as `reserve`.
        """
        job = _Job(work, is_vision=is_vision)
        with self._lock:
            self._check_open()
            self._jobs.append(job)
        self._changed.wake()
        return job.wait()

    def encode_ahead(
        self,
        images: Items[ProcessedImage],
        ahead: dict[bytes, Future[Encoded]],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Give the vision tower segments of a prompt that is not complete yet, and return at once.

        Args:
            images: Of one grid, as many as one call takes.
            ahead: Gets their embeddings by digest, for `Request.ahead`. Segments that it holds, or whose embeddings are
                kept, are passed over, and all of them where a window slides.
            is_wanted: Asked when their turn has come; if not, they are left out.
        """
        if self.limits.window is not None:
            return  # most images of a long chat are not run again
        wanted = {each.digest: each for each in images if each.digest not in ahead}
        wanted = {digest: each for digest, each in wanted.items() if digest not in self._steps.vision_cache}
        if not wanted:
            return
        futures: dict[bytes, Future[Encoded]] = {digest: Future() for digest in wanted}

        def work() -> None:
            if is_wanted():
                found = self._steps.encode_ahead(list(wanted.values()))
                for future, embeds in zip(futures.values(), found, strict=True):
                    future.set_result(embeds)

        def end() -> None:
            for future in futures.values():
                future.cancel()  # those without a result
            self._changed.wake()

        job = _Job(work, is_vision=True, on_end=end)
        with self._lock:
            self._check_open(has_place=True)
            self._jobs.append(job)
        ahead.update(futures)
        self._changed.wake()

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
                "dropped_rows": steps.dropped_rows,
                "vision_cache": {name: getattr(vision, name) for name in _VISION_COUNTS},
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
        self._changed.wake()
        if self._thread is threading.current_thread():
            return False
        limit_s = timeout_s if drains and timeout_s is not None and timeout_s < threading.TIMEOUT_MAX else None
        self._thread.join(limit_s)
        if self._thread.is_alive() and drains:
            return self.close(drains=False)
        return True

    def stop(self) -> None:
        """End the thread after its step; for what runs when a model is dropped or Python ends."""
        if self._is_forked:
            return
        self._is_draining = self._is_stopped = True
        self._changed.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    @property
    def _is_forked(self) -> bool:
        """Whether this is a fork of the process: the thread is not here, and may have left the lock closed."""
        return os.getpid() != self._pid

    @property
    def _num_queued(self) -> int:
        return len(self._places) + len(self._arrived) + len(self._waiting)

    def _tell_of_room(self) -> None:
        """Wake who waits for room in the queue; under the lock."""
        hoping, self._hoping = self._hoping, set()
        for each in hoping:
            each.wake()

    def _check_open(self, *, has_place: bool = False) -> None:
        """Raise if no request is taken any more; one that has its place already still is while the others end."""
        if self._failure is not None:
            raise EngineError(
                f"the engine has failed and takes no more requests: {self._failure.message}",
                remedy="open the engine again, in a new process if it runs on a GPU",
            )
        if self._is_stopped or (self._is_draining and not has_place):
            raise _closed()

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
        ids, window = request.prepared.prompt.input_ids, self.limits.window
        if window is not None:
            ids = ids[-window.reach :]  # a history without end is not searched as a whole
        return PromptLookup(ids, num_tokens, never, self.limits.draft_cost) if num_tokens > 0 else None

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
        while not self._is_stopped and self._failure is None:
            with self._lock:
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
        if self._jobs:  # one, so that those that decode wait for no more
            self._run_job(self._jobs.popleft())
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

    def _run_job(self, job: _Job[Any]) -> None:
        self._steps.counters.vision_calls += job.is_vision
        if not job.is_vision or not self._steps.encode_beside(job.run, lambda: job.fail(_closed())):
            job.run()

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
                self._tell_of_room()
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
                    self._tell_of_room()
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
            self._tell_of_room()
        for sequence in sequences:
            steps.counters.ended("failed")
            sequence.request.pieces.fail(type(error)(error.message, remedy=error.remedy))
        for job in jobs:
            job.fail(type(error)(error.message, remedy=error.remedy))
        steps.close()


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
