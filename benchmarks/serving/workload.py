"""What `python -m benchmarks serving` measures, and an engine opened so that the calls of its session are timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.contract import DecoderInputs, FloatArray, VisionInputs, VisualEmbeds
    from runtime.model import Qwen3VLModel
    from runtime.session import KVCache, Session

VISION, PREFILL, DECODE = "vision", "prefill", "decode"


@dataclass(frozen=True)
class Workload:
    """Sizes of the measurements; each part takes those that it needs.

    Attributes:
        engine: Engine of the large shape.
        demo: Engine of the demo checkpoint, whose steps are so short that what is around them shows.
        threads: Threads of an engine.
        batches: Sequences of a decode step.
        pasts: Rows that each has in the cache.
        repeats: Timed rounds.
        clients: Requests at once.
        prompt_tokens: Tokens of a prompt's text.
        new_tokens: Tokens of an answer.
        image_side: Side of the image that arrives beside others, in pixels.
        long_tokens: Tokens of the text beside it.
        minutes: How long the engine is overloaded.
        overload: Offered requests over those that the engine can answer.
        capacity_s: Seconds in which that is measured.
    """

    engine: str
    demo: str
    threads: int = 2
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    pasts: tuple[int, ...] = (32, 300, 1000)
    repeats: int = 5
    clients: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 64
    image_side: int = 896
    long_tokens: int = 512
    minutes: float = 5.0
    overload: float = 10.0
    capacity_s: float = 5.0


@dataclass(frozen=True)
class TimedCall:
    """One call of a session.

    Attributes:
        kind: vision, prefill or decode.
        start_s, end_s: By `time.perf_counter`.
        batch: Sequences.
        num_tokens: New tokens of each; patches of a call of the vision tower.
    """

    kind: str
    start_s: float
    end_s: float
    batch: int
    num_tokens: int

    @property
    def taken_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass
class TimedSession:
    """A session that notes when each of its calls began and ended.

    Attributes:
        session: The session.
        calls: The calls so far, by their ends.
    """

    session: Session
    calls: list[TimedCall] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name == "session":
            raise AttributeError(name)
        return getattr(self.session, name)

    def vision(self, inputs: VisionInputs) -> VisualEmbeds:
        start = time.perf_counter()
        embeds = self.session.vision(inputs)
        self._note(VISION, start, *inputs.pixel_values.shape[:2])
        return embeds

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        start = time.perf_counter()
        logits = self.session.prefill(inputs, cache, slot)
        self._note(PREFILL, start, *inputs.input_ids.shape)
        return logits

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        start = time.perf_counter()
        logits = self.session.decode(inputs, cache, slot)
        self._note(DECODE, start, *inputs.input_ids.shape)
        return logits

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> Any:
        start = time.perf_counter()
        top = self.session.decode_top(inputs, cache, slot)  # type: ignore[attr-defined]
        self._note(DECODE, start, *inputs.input_ids.shape)
        return top

    def of(self, kind: str) -> list[TimedCall]:
        """Return the calls of one kind."""
        return [call for call in self.calls if call.kind == kind]

    def _note(self, kind: str, start: float, batch: int, num_tokens: int) -> None:
        self.calls.append(TimedCall(kind, start, time.perf_counter(), batch, num_tokens))


def opened(folder: str, threads: int, max_context: int = 2048, **serving: Any) -> tuple[Qwen3VLModel, TimedSession]:
    """Open an engine with options of `Qwen3VLModel.from_engine`, and return it with its session."""
    from runtime.manifest import Manifest
    from runtime.memory import machine_bytes
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Preparation
    from runtime.scheduling.plan import plan_limits
    from runtime.serving_options import ServingOptions
    from runtime.session import SessionOptions, open_session

    path = Path(folder)
    manifest = Manifest.read(path)
    session = TimedSession(open_session(path, manifest, SessionOptions(threads)))
    limits = plan_limits(manifest, ServingOptions.checked(**serving), max_context, None)
    preparation = Preparation.from_folder(path, manifest.model).for_engine(manifest.capabilities)
    model = Qwen3VLModel(
        manifest, session, preparation, max_context, machine_bytes(), limits=limits, source=folder, threads=threads
    )
    return model, session
