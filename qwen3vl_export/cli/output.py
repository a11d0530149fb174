"""What the commands print: answers, tables and JSON on stdout, notes and statistics on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runtime.errors import UsageError
from runtime.files import read_small_file
from runtime.piece import REASONING
from runtime.shown import CONTROL, columns, escape_controls

_DIM, _UNDIM = "\x1b[2m", "\x1b[22m"

if TYPE_CHECKING:
    from runtime.answer import Generation, Stats
    from runtime.decode_plan_report import DecodeReport
    from runtime.logprobs import Likelihood
    from runtime.manifest import Manifest
    from runtime.piece import Piece
    from runtime.stream import Stream


def print_stream(stream: Stream, *, hides_thinking: bool = False) -> Generation:
    """Print an answer as it comes and end its line, also when it is interrupted.

    To a pipe or a file goes the answer as it is. On a terminal control characters, which a model can be made to write
    by the picture that it reads, are escaped, except for line feeds and tabs. Thoughts go to stderr, dimmed on a
    terminal; a call of a function is a line of JSON on stdout.
    """
    printed = _Printed(hides_thinking)
    try:
        for piece in stream:
            printed.add(piece)
    except BaseException:
        stream.close()
        printed.end(is_whole=False)
        raise
    printed.end()
    assert stream.result is not None
    return stream.result


class _Printed:
    """What was printed of an answer."""

    def __init__(self, hides_thinking: bool) -> None:
        self._hides_thinking = hides_thinking
        self._is_thinking = False
        self._has_text = self._is_mid_line = False

    def add(self, piece: Piece) -> None:
        """Print a piece."""
        if piece.kind == REASONING:
            if not self._hides_thinking:
                text = escape_controls(piece, keeps_layout=True)
                print(f"{_DIM}{text}{_UNDIM}" if is_terminal(sys.stderr) else text, end="", file=sys.stderr, flush=True)
                self._is_thinking = True
            return
        self._end_thought()
        text = (
            str(piece)
            if piece.call is None
            else ("\n" if self._is_mid_line else "") + json.dumps(piece.call.to_message(), ensure_ascii=False) + "\n"
        )
        print(escape_controls(text, keeps_layout=True) if is_terminal(sys.stdout) else text, end="", flush=True)
        self._has_text, self._is_mid_line = True, piece.call is None

    def end(self, *, is_whole: bool = True) -> None:
        """End the line, if there is one; that of a whole answer always."""
        self._end_thought()
        if (is_whole and not self._has_text) or self._is_mid_line:
            print(flush=True)

    def _end_thought(self) -> None:
        if self._is_thinking:
            print(file=sys.stderr, flush=True)
        self._is_thinking = False


def answer_json(generation: Generation) -> dict[str, Any]:
    """Return what `--json` shows of an answer."""
    shown = ("text", "token_ids", "finish_reason", "reasoning", "malformed_tool_calls")
    values = {name: getattr(generation, name) for name in shown}
    calls = [call.to_message() for call in generation.tool_calls]
    return {**values, "tool_calls": calls, "stats": generation.stats.to_dict()}


def read_tools(path: Path | None) -> Any:
    """Return what a file with definitions of functions holds; None without a file.

    Raises:
        UsageError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return json.loads(read_small_file(path, error=UsageError))
    except (ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, UsageError) else f"{path}: {error}"
        raise UsageError(f"--tools {reason}", remedy="pass a file with a JSON list of functions") from error


def cached_text(stats: Stats) -> str:
    """Say what was found in the cache, such as `31 of 47 prompt tokens, 1 image`; nothing if nothing was."""
    parts = [f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens"] if stats.cached_tokens else []
    if stats.cached_images:
        parts.append(f"{stats.cached_images} image{'s' if stats.cached_images > 1 else ''}")
    return ", ".join(parts)


def print_stats(stats: Stats) -> None:
    """Print times, speed and cache size on stderr."""

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ms"

    rows = [
        ("prompt", f"{stats.prompt_tokens} tokens, {stats.visual_tokens} of them visual"),
        ("answer", f"{stats.new_tokens} tokens"),
        ("preprocess", milliseconds(stats.preprocess_s)),
        ("queue", milliseconds(stats.queue_s)),
        ("vision", milliseconds(stats.vision_s)),
        ("prefill", milliseconds(stats.prefill_s)),
        ("time to first token", milliseconds(stats.ttft_s)),
        ("time per token", milliseconds(stats.tpot_s)),
        ("speed", f"{stats.tokens_per_s:.1f} tokens/s"),
        ("peak cache", _size(stats.peak_cache_bytes)),
    ]
    if cached := cached_text(stats):
        rows.insert(1, ("found in cache", cached))
    rows = [row for row in rows if row != ("queue", milliseconds(0))]
    if stats.pruned_tokens:
        total = stats.visual_tokens + stats.pruned_tokens
        rows.append(("visual tokens", f"{stats.visual_tokens} of {total} kept"))
    if stats.evicted_rows:
        kept = stats.prompt_tokens - stats.evicted_rows
        rows.append(("rows of the prompt", f"{kept} of {stats.prompt_tokens} kept"))
    if stats.drafted_tokens:
        rows.append(("prompt lookup", f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted"))
    for line in columns(rows):
        note(line)


PROFILES, KERNELS = "profiles", "kernels"
_ROWS_OF_OWN = (PROFILES, KERNELS)


def route_text(runs: Mapping[str, Mapping[str, str]]) -> str:
    """Return which engine runs each part (`runtime.route.parts_of`)."""
    return ", ".join(f"{part} {each['engine']} ({each['target']})" for part, each in runs.items())


def manifest_text(manifest: Manifest) -> str:
    """Return what `qwen3vl inspect` shows of an engine."""
    text, vision = manifest.model.text, manifest.model.vision
    decoder = (
        f"{text.num_layers} layers, hidden {text.hidden_size}, {text.num_heads} heads on {text.num_kv_heads} "
        f"key-value heads of {text.head_dim}, vocabulary {text.vocab_size}"
        f"{', tied head' if text.tie_word_embeddings else ''}"
    )
    tower = (
        f"{vision.depth} layers, hidden {vision.hidden_size}, {vision.num_heads} heads, patch {vision.patch_size}, "
        f"DeepStack after layers {', '.join(map(str, vision.deepstack_layers)) or 'none'}"
    )
    rows = [
        ("target", manifest.target),
        ("decoder", decoder),
        ("vision", tower),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        *((f"source {name}", _plain(value)) for name, value in manifest.source.items()),
        *_kernel_rows(manifest.capabilities.get(KERNELS)),
        *((f"can {name}", _plain(value)) for name, value in manifest.capabilities.items() if name not in _ROWS_OF_OWN),
        *_profile_rows(manifest.capabilities.get(PROFILES, {})),
    ]
    files = [
        (f"  {name}", f"{record.num_bytes} bytes", "weights" if record.is_weights else "", record.sha256)
        for name, record in sorted(manifest.files.items())
    ]
    total = sum(record.num_bytes for record in manifest.files.values())
    summary = f"files      {len(files)}, {_size(total)}, of it weights {_size(manifest.weight_bytes)}; SHA-256:"
    return "\n".join([*columns(rows), summary, *columns(files)])


def decode_text(report: DecodeReport) -> str:
    """Return what `qwen3vl inspect` says of the kernels of decode steps on a GPU."""
    brings = "no own kernels: ONNX Runtime's"
    if report.compute_capabilities:
        sizes = ", ".join(map(str, report.batches))
        brings = f"own kernels for compute capability {', '.join(report.compute_capabilities)}; batches {sizes}"
    here = {"own": "own kernels", "onnxruntime": "ONNX Runtime's", None: "nothing"}[report.here]
    return f"{brings}; here: {here}{f' ({report.reason})' if report.reason else ''}"


def _kernel_rows(kernels: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Yield the kernels of quantised numbers that a CPU engine uses, by who wrote them."""
    from runtime.native import OPERATORS

    if kernels is None:
        return
    own = [name for name in kernels if name in OPERATORS]
    theirs = [name for name in kernels if name not in OPERATORS]
    yield "own kernels", ", ".join(own) or "none"
    yield "ONNX Runtime's", ", ".join(theirs) or "none of quantised numbers"


def _profile_rows(profiles: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Yield the largest shape of each graph's first input, profile by profile; --json has all shapes."""
    for graph, entries in profiles.items():
        for profile in entries:
            first = next(iter(profile["max"]))
            yield f"profile {graph} {profile['name']}", f"{first} {profile['min'][first]} to {profile['max'][first]}"


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 20:
        return f"{num_bytes / (1 << 10):.1f} KiB"
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / (1 << 30):.2f} GiB"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_json_value)


def _json_value(value: Any) -> Any:
    """Return what json has no form for: numpy scalars and arrays, paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def print_json(value: Any) -> None:
    """Print one JSON value on a line of stdout; control characters and lone surrogates in JSON's escapes."""
    # json.dumps leaves those beyond U+007E as they are. They occur in strings only.
    text = json.dumps(value, ensure_ascii=False, default=_json_value)
    print(CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)


def print_text(text: str) -> None:
    """Print a table or a report on stdout. Control characters, which a manifest may quote, are escaped."""
    print(escape_controls(text, keeps_layout=True), flush=True)


def answer_details(generation: Generation) -> dict[str, Any]:
    """Return what an answer has only if it was asked for, as plain data: log probabilities and several answers."""
    details: dict[str, Any] = {}
    if generation.logprobs is not None:
        details["logprobs"] = [
            _likelihood(each) | {"top": [_likelihood(other) for other in each.top]} for each in generation.logprobs
        ]
    if generation.choices:
        details["choices"] = [
            {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
            for each in generation.choices
        ]
    return details


def _likelihood(noted: Likelihood) -> dict[str, Any]:
    return {
        "token_id": noted.token_id,
        "text": noted.text,
        "bytes": list(noted.token_bytes),
        "logprob": noted.logprob,
    }


def note(text: str) -> None:
    """Print one line on stderr; control characters are escaped."""
    print(escape_controls(text, keeps_layout=True), file=sys.stderr, flush=True)


def is_terminal(file: TextIO) -> bool:
    """Whether a standard file is a terminal; one that is closed is none."""
    return not file.closed and file.isatty()


def read_stdin() -> str:
    """Return all of stdin as a prompt, without the line feed at its end.

    Raises:
        UsageError: It is empty or no UTF-8.
    """
    try:
        # Python's own decoding may let bytes that are no UTF-8 pass as surrogates.
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not UTF-8 text: {error}", remedy="convert it, or pass an image with --image"
        ) from error
    if not text.strip():
        raise UsageError("PROMPT is missing, and stdin is empty", remedy='give one, such as "Describe the image."')
    return text.removesuffix("\n").removesuffix("\r")
