"""Build an engine folder: lower both graphs, stream the weights, write the manifest last, then move into place."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from engines.bundle import DECODER, PREFILL, Bundle
from engines.external_data import Progress, advance_of, weight_bytes, write_model
from engines.lower import lower
from engines.output import output_folder
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from engines.target import Target
from runtime import __version__
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME, FileRecord, Manifest, sha256_of

_OWN_DISTRIBUTION = "qwen3vl-export"


def build_engine(
    bundle: Bundle,
    target: Target,
    output: Path,
    *,
    with_weights: bool = True,
    runnable: bool = True,
    progress: Progress | None = None,
    cache: CacheQuantization | None = None,
) -> Manifest:
    """Build `output`; until it is complete, what was there before stays.

    Args:
        bundle: Its graphs are consumed: they are lowered in place.
        target: What to build for.
        output: The engine folder.
        with_weights: False writes the lowered graphs alone, which nothing can open.
        runnable: False names the manifest `lowered.json`: lowered graphs to look at, which only `qwen3vl verify` runs.
        progress: Called while the weights are written.
        cache: Store the KV cache in few bits. Not without weights: the engine is opened to find the scales.

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
        if cache is not None:
            manifest = quantize_cache(folder, manifest, cache, target)
        if with_weights:
            manifest.write(folder, MANIFEST_NAME if runnable else LOWERED_NAME)
    return manifest
