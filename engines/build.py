"""Build an engine folder: lower both graphs, stream the weights, write the manifest last, then move into place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.build_options import BuildOptions
from engines.bundle import DECODER, PREFILL, Bundle
from engines.external_data import Progress, advance_of, weight_bytes, write_model
from engines.kernels import kernels_of
from engines.lower import lower
from engines.output import output_folder
from engines.passes.fold_static_shapes import fix_capacity
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from engines.target import Target
from runtime import __version__
from runtime.errors import UsageError
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME, FileRecord, Manifest, sha256_of
from runtime.model_config import ModelConfig

_OWN_DISTRIBUTION = "qwen3vl-export"


def check_options(target: Target, options: BuildOptions | None, config: ModelConfig) -> None:
    """Raise unless the target takes a model of this shape, and the options that were given for it.

    Raises:
        UsageError: An option is out of range, or the target has no sizes to choose.
        TargetError: The target's kernels do not take the shape, or its compiler not an option.
    """
    if target.check_model is not None:
        target.check_model(config)
    if target.compile is not None:
        (options or BuildOptions()).check(config.text.max_positions, config.vision.spatial_merge_size)
    elif options is not None:
        raise UsageError(
            f"{target.name} is built for no fixed sizes, so options of compiled engines change nothing",
            remedy="leave them out; the runtime takes max_context when it opens the engine",
        )
    if target.check_options is not None and options is not None:
        target.check_options(options)


def build_engine(
    bundle: Bundle,
    target: Target,
    output: Path,
    *,
    with_weights: bool = True,
    runnable: bool = True,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda _: None,
    cache: CacheQuantization | None = None,
    options: BuildOptions | None = None,
) -> Manifest:
    """Build `output`; until it is complete, what was there before stays.

    Args:
        bundle: Its graphs are consumed: they are lowered in place.
        target: What to build for.
        output: The engine folder.
        with_weights: False writes the lowered graphs alone, which nothing can open.
        runnable: False names the manifest `lowered.json`: lowered graphs to look at, which only `qwen3vl verify` runs.
        progress: Called while the weights are written.
        report: Told of each stage of the work when it begins.
        cache: Store the KV cache in few bits. Not without weights: the engine is opened to find the scales.
        options: Sizes of an engine that is compiled for fixed ones.

    Raises:
        UsageError: `output` holds something that is no engine, or an option is out of range.
        TargetError: The target's compiler refuses a graph.
        CapacityError: The disk has too little room, or this process may not write files of that size.
    """
    bundle.check()
    check_options(target, options, bundle.config)
    sizes = options or BuildOptions()
    if target.compile is not None:
        fix_capacity(bundle.graphs[DECODER], sizes.max_context)
    report(f"lowering the graphs for {target.name}")
    graphs = {}
    if target.prefill_formats is not None:
        copy = bundle.graphs[DECODER].clone()  # weights are references, so they are not copied
        graphs[PREFILL] = lower(copy, target, bundle.config, target.passes(target.prefill_formats))
    for name, model in bundle.graphs.items():
        graphs[name] = lower(model, target, bundle.config, target.passes(target.formats))
    sizes_of_graphs = [weight_bytes(graph) if with_weights else 0 for graph in graphs.values()]
    num_bytes = sum(sizes_of_graphs)
    advance = advance_of(progress, num_bytes)
    # A plan holds the weights once more, and lies beside the graph that it is made of until it is complete.
    compiles = target.compile is not None and with_weights and runnable
    with output_folder(output, 2 * num_bytes if compiles else num_bytes, max(sizes_of_graphs)) as folder:
        files: dict[str, FileRecord] = {}
        report(f"writing {output}, {num_bytes / 1e6:,.1f} MB of weights" if with_weights else f"writing {output}")
        for name, model in graphs.items():
            files |= write_model(model, folder / f"{name}.onnx", with_weights=with_weights, advance=advance)
        compiled: Mapping[str, Any] = {}
        if target.compile is not None and compiles:
            report(f"compiling for {target.name}")
            made = target.compile(folder, graphs, bundle.config, sizes)
            files, compiled = {**made.files, **(files if made.keeps_graphs else {})}, made.capabilities
        for name, contents in bundle.assets.items():
            (folder / name).write_bytes(contents)
            files[name] = FileRecord(len(contents), sha256_of(folder / name))
        versions = {name: metadata.version(name) for name in target.libraries} | {_OWN_DISTRIBUTION: __version__}
        kernels = sorted(set().union(*map(kernels_of, graphs.values())))
        manifest = Manifest(
            target=target.name,
            session=target.session,
            capabilities={**target.capabilities(bundle.config, sizes), **compiled, "kernels": kernels},
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
