"""Build an engine folder: lower both graphs, stream the weights, write the manifest last, then move into place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.build_options import BuildOptions
from engines.bundle import DECODER, PREFILL, Bundle
from engines.decode_plan.build import add_plan
from engines.decode_plan.options import NO_PLAN, PlanOptions
from engines.external_data import weight_bytes, write_model
from engines.lower import lower
from engines.output import output_folder
from engines.passes.add_window_queries import SCORES_WINDOW, AddWindowQueriesPass
from engines.passes.fold_static_shapes import fix_capacity
from engines.progress import SILENT, Progress, Stage
from engines.quantised_kernels import kernels_of
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from engines.quantize.formats import WeightFormats
from engines.target import Target
from runtime import __version__
from runtime.contract import TOKEN_SCORES
from runtime.errors import UsageError
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME, FileRecord, Manifest
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
            f"{target.name} is not built for fixed sizes, so the options of compiled engines would change nothing",
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
    progress: Progress = SILENT,
    cache: CacheQuantization | None = None,
    options: BuildOptions | None = None,
    plan: PlanOptions = NO_PLAN,
    kv_scores: bool = False,
) -> Manifest:
    """Build `output`; until it is complete, what was there before stays.

    Args:
        bundle: What to lower; it stays as it is.
        target: What to build for.
        output: The engine folder.
        with_weights: False writes the lowered graphs alone, which nothing can open.
        runnable: False names the manifest `lowered.json`: lowered graphs, which only `qwen3vl verify` runs.
        progress: Told of each stage of the work when it begins, and of the weights as they are written.
        cache: Store the KV cache in fewer bits. Not without weights: the engine may be opened to find the scales.
        options: Sizes of an engine that is compiled for fixed ones.
        plan: Of decode steps on a GPU, for a target that takes one.
        kv_scores: Let the decoder give the queries that rows of the KV cache are judged by.

    Raises:
        UsageError: `output` holds something that is no engine, or an option is out of range.
        TargetError: The target's compiler refuses a graph.
        CapacityError: The disk has too little room, or this process may not write files of that size.
    """
    bundle.check()
    sizes = _checked_sizes(target, options, bundle)
    progress.report(Stage.LOWERING, f"lowering the graphs for {target.name}")
    graphs = _lowered(bundle, target, sizes, kv_scores=kv_scores)
    num_bytes = sum(bytes_of_graphs := [weight_bytes(graph) if with_weights else 0 for graph in graphs.values()])
    # A plan holds the weights once more, and lies beside the graph that it is made of until it is complete.
    compiles = target.compile is not None and with_weights and runnable
    with output_folder(output, 2 * num_bytes if compiles else num_bytes, max(bytes_of_graphs)) as folder:
        progress.report(Stage.WRITING, f"writing {output}{_size(num_bytes) if with_weights else ''}")
        files = _written(graphs, folder, partial(progress.advance, total_bytes=num_bytes), with_weights=with_weights)
        compiled: Mapping[str, Any] = {}
        if target.compile is not None and compiles:
            progress.report(Stage.COMPILING, f"compiling for {target.name}")
            made = target.compile(folder, graphs, bundle.config, sizes)
            files, compiled = {**made.files, **(files if made.keeps_graphs else {})}, made.capabilities
        planned = add_plan(folder, graphs[DECODER], target, bundle.config, plan, progress)
        files |= planned | bundle.write_assets(folder)
        optional = _optional(bundle, has_plan=bool(planned), kv_scores=kv_scores)
        more = {**compiled, "kernels": _kernels(graphs), **optional}
        manifest = _manifest(bundle, target, target.capabilities(bundle.config, sizes) | more, files)
        if cache is not None:
            progress.report(Stage.QUANTISING_CACHE, cache.work)
            manifest = quantize_cache(folder, manifest, cache, target)
        if with_weights:
            manifest.write(folder, MANIFEST_NAME if runnable else LOWERED_NAME)
    return manifest


def _checked_sizes(target: Target, options: BuildOptions | None, bundle: Bundle) -> BuildOptions:
    check_options(target, options, bundle.config)
    return options or BuildOptions()


def _lowered(bundle: Bundle, target: Target, sizes: BuildOptions, *, kv_scores: bool) -> dict[str, ir.Model]:
    """Return what the target runs: copies of the bundle's graphs, lowered, and perhaps a second decoder."""

    def lowered(name: str, formats: WeightFormats) -> ir.Model:
        model = bundle.graphs[name].clone()
        if name == DECODER and target.compile is not None:
            fix_capacity(model, sizes.max_context)
        return lower(model, target, bundle.config, target.passes(formats))

    second = {} if target.prefill_formats is None else {PREFILL: lowered(DECODER, target.prefill_formats)}
    graphs = second | {name: lowered(name, target.formats) for name in bundle.graphs}
    if kv_scores:
        for name in graphs.keys() & {DECODER, PREFILL}:
            AddWindowQueriesPass(bundle.config, SCORES_WINDOW)(graphs[name])
    return graphs


def _written(
    graphs: Mapping[str, ir.Model], folder: Path, advance: Callable[[int], None], *, with_weights: bool
) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for name, model in graphs.items():
        files |= write_model(model, folder / f"{name}.onnx", with_weights=with_weights, advance=advance)
    return files


def _optional(bundle: Bundle, *, has_plan: bool, kv_scores: bool) -> dict[str, Any]:
    """Return the capabilities that an engine may lack."""
    values = {"decode_plan": has_plan, TOKEN_SCORES: bundle.has_token_scores}
    found: dict[str, Any] = {name: True for name, is_there in values.items() if is_there}
    return found | ({"kv_scores": SCORES_WINDOW} if kv_scores else {})


def _kernels(graphs: Mapping[str, ir.Model]) -> list[str]:
    """Return the kernels that the runtime proves before it opens the engine."""
    return sorted(set().union(*map(kernels_of, graphs.values())))


def _size(num_bytes: int) -> str:
    return f", {num_bytes / 1e6:,.1f} MB of weights"


def _manifest(
    bundle: Bundle, target: Target, capabilities: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> Manifest:
    versions = {name: metadata.version(name) for name in target.libraries} | {_OWN_DISTRIBUTION: __version__}
    return Manifest(
        target=target.name,
        session=target.session,
        capabilities=capabilities,
        model=bundle.config,
        versions={**bundle.versions, **versions},
        source=bundle.source,
        files=files,
    )
