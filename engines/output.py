"""The output folder: written beside its place, and moved there when it is complete."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from engines.bundle import BUNDLE_MANIFEST_NAME, DECODER, PREFILL, VISION
from engines.external_data import check_disk_space
from runtime.errors import UsageError
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME

# Graphs, tokenizer and manifest; the largest seen is a tokenizer of 11 MB.
_SMALL_FILES_BYTES = 64 << 20
_GRAPHS = frozenset({f"{VISION}.onnx", f"{DECODER}.onnx"})
_OWN_NAMES = (
    _GRAPHS
    | {f"{PREFILL}.onnx", *(f"{graph}.onnx.data" for graph in (VISION, DECODER, PREFILL)), "cache_scales.npy"}
    | {f"{VISION}.plan", f"{DECODER}.plan"}
    | {MANIFEST_NAME, LOWERED_NAME, BUNDLE_MANIFEST_NAME}
    | {"config.json", "generation_config.json", "preprocessor_config.json"}
    | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
)


def check_output(output: Path) -> None:
    """Raise, before any work, if `output` is not a place for an engine.

    Raises:
        UsageError: It is a file, a link to nothing, a folder of something else, or cannot be made.
    """
    try:
        if output.is_symlink() and not output.exists():
            raise UsageError(f"{output}: a link to nothing", remedy="remove it, or choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not _is_ours(output):
            raise UsageError(
                f"{output}: exists and is neither an engine nor empty, so it is not overwritten",
                remedy="choose another --output, or remove it yourself",
            )
    except OSError as error:
        raise UsageError(f"{output}: cannot be made ({error.strerror})", remedy="choose another --output") from error


@contextlib.contextmanager
def output_folder(output: Path, weight_bytes: int) -> Iterator[Path]:
    """Give an empty folder beside `output` that takes its place when the block ends without an error.

    Raises:
        UsageError: `output` is not a place for an engine.
        CapacityError: The disk has too little room for `weight_bytes`.
    """
    output = output.absolute()
    check_output(output)
    check_disk_space(output.parent, weight_bytes + _SMALL_FILES_BYTES)
    with _interruptible(), tempfile.TemporaryDirectory(prefix=".qwen3vl-", dir=output.parent) as temporary:
        fresh, old = Path(temporary) / "new", Path(temporary) / "old"
        fresh.mkdir()
        yield fresh
        try:
            if output.exists():
                output.rename(old)
            fresh.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise


def _is_ours(folder: Path) -> bool:
    """Whether everything in the folder is ours to delete: empty, or graphs or a manifest of ours and no other name.

    The small files alone are those of any Hugging Face folder.
    """
    if not folder.is_dir():
        return False
    names = {entry.name for entry in os.scandir(folder)}
    has_mark = bool(names & {MANIFEST_NAME, LOWERED_NAME, BUNDLE_MANIFEST_NAME}) or names >= _GRAPHS
    return not names or (has_mark and names <= _OWN_NAMES)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a SIGTERM unwind the stack as Ctrl-C does, so that the half-written folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
