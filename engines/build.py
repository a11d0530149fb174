"""Build an engine folder: lower both graphs, stream the weights, write the manifest last, then move into place."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType

from engines.bundle import BUNDLE_MANIFEST_NAME, DECODER, PREFILL, VISION, Bundle
from engines.external_data import Progress, advance_of, check_disk_space, weight_bytes, write_model
from engines.lower import lower
from engines.target import Target
from runtime import __version__
from runtime.errors import UsageError
from runtime.manifest import MANIFEST_NAME, FileRecord, Manifest, sha256_of

_OWN_DISTRIBUTION = "qwen3vl-export"
# Graphs, tokenizer and manifest; the largest seen is a tokenizer of 11 MB.
_SMALL_FILES_BYTES = 64 << 20
_OWN_FILES = frozenset(
    {MANIFEST_NAME, BUNDLE_MANIFEST_NAME, "config.json", "generation_config.json", "preprocessor_config.json"}
    | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    | {f"{graph}.onnx{suffix}" for graph in (VISION, DECODER, PREFILL) for suffix in ("", ".data")}
)


def build_engine(
    bundle: Bundle,
    target: Target,
    output: Path,
    *,
    with_weights: bool = True,
    runnable: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Build `output`; until it is complete, what was there before stays.

    Args:
        bundle: Its graphs are consumed: they are lowered in place.
        target: What to build for.
        output: The engine folder.
        with_weights: False writes the lowered graphs alone, which nothing can open.
        runnable: False leaves the manifest out: a folder of lowered graphs to look at.
        progress: Called while the weights are written.

    Raises:
        UsageError: `output` holds something that is no engine.
        CapacityError: The disk has too little room.
    """
    bundle.check()
    graphs = {}
    if target.prefill_passes is not None:
        copy = bundle.graphs[DECODER].clone()  # weights are references, so they are not copied
        graphs[PREFILL] = lower(copy, target, bundle.config, target.prefill_passes())
    for name, model in bundle.graphs.items():
        graphs[name] = lower(model, target, bundle.config, target.passes())
    num_bytes = sum(map(weight_bytes, graphs.values())) if with_weights else 0
    advance = advance_of(progress, num_bytes)
    with output_folder(output, num_bytes) as folder:
        files: dict[str, FileRecord] = {}
        for name, model in graphs.items():
            files |= write_model(model, folder / f"{name}.onnx", with_weights=with_weights, advance=advance)
        for name, contents in bundle.assets.items():
            (folder / name).write_bytes(contents)
            files[name] = FileRecord(len(contents), sha256_of(folder / name))
        versions = {name: metadata.version(name) for name in target.libraries} | {_OWN_DISTRIBUTION: __version__}
        manifest = Manifest(
            target=target.name,
            session=target.session,
            capabilities=target.capabilities,
            model=bundle.config,
            versions={**bundle.versions, **versions},
            source=bundle.source,
            files=files,
        )
        if with_weights and runnable:
            manifest.write(folder)
    return manifest


@contextlib.contextmanager
def output_folder(output: Path, weight_bytes: int) -> Iterator[Path]:
    """Give an empty folder beside `output` that takes its place when the block ends without an error.

    Raises:
        UsageError: `output` is a file, or a folder of something else.
        CapacityError: The disk has too little room for `weight_bytes`.
    """
    output = output.absolute()
    if output.exists() and not _is_ours(output):
        raise UsageError(
            f"{output}: exists and is neither an engine nor empty, so it is not overwritten",
            remedy="choose another --output, or remove it yourself",
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.parent}: cannot be made ({error.strerror})") from error
    check_disk_space(output.parent, weight_bytes + _SMALL_FILES_BYTES)
    with _interruptible(), tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        yield fresh
        old = Path(temporary) / "old"
        if output.exists():
            output.rename(old)
        try:
            fresh.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    # Every name must be one we write: whatever else lies in the folder would be deleted with it.
    return all(entry.name in _OWN_FILES for entry in os.scandir(folder))


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
