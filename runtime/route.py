"""Which engine runs what: vision tower and prompts may each have an engine other than the one that decodes.

All engines are of one checkpoint, which their manifests say; what a target makes of it differs. One engine may run both
other parts, and is opened once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from runtime.arguments import folder_path
from runtime.contract import TOKEN_SCORES
from runtime.errors import UsageError
from runtime.generation import PREFILL_CHUNK
from runtime.manifest import FileRecord, Manifest
from runtime.memory import OF_OTHERS, STAGING_ROW_BYTES, cache_bytes
from runtime.moved_rows import FLOATS
from runtime.preparation import (
    GENERATION,
    PREPROCESSOR,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    VIDEO_PREPROCESSOR,
)
from runtime.routed_session import RoutedEngine, RoutedSession
from runtime.session import DECODE, PARTS, PREFILL, VISION, Session, SessionOptions, is_on_gpu, open_session
from runtime.urls import check_local
from runtime.vision_inputs import PIXELS

_OPTIONS = {VISION: "vision_engine", PREFILL: "prefill_engine"}
# What prompts are made with; an engine of an earlier version lacks some.
_SHARED_FILES = (TOKENIZER, TOKENIZER_SETTINGS, TEMPLATE, PREPROCESSOR, VIDEO_PREPROCESSOR)
# Capabilities that are about one part.
_OF_VISION = (PIXELS, TOKEN_SCORES)
_OF_PREFILL = ("prefill_chunk", "logits_chunk", "prefill_min_tokens")
_OF_MEMORY = ("device", "precision", "custom_ops")
RUN_ALL_PARTS = frozenset({"tensorrt"})
"""Kinds of sessions whose graphs share one workspace, so that they open all or none."""
_BUILD_BOTH = "build both engines of one checkpoint with this version: qwen3vl-export MODEL --target …"


class RouteKeywords(TypedDict, total=False):
    """Engines that run a part in place of the one that is opened, as keyword arguments.

    Attributes:
        vision_engine: Folder of the engine that runs the vision tower.
        prefill_engine: Folder of the engine that runs prompts; the rows of the KV cache are then moved.
    """

    vision_engine: str | Path | None
    prefill_engine: str | Path | None


@dataclass(frozen=True)
class Route:
    """Engines of one checkpoint, each with what it runs; the first decodes."""

    engines: tuple[RoutedEngine, ...]

    @classmethod
    def read(cls, folder: Path, *, check: bool = False, vision_engine: Any = None, prefill_engine: Any = None) -> Route:
        """Read the manifests of an engine and of others that a caller names, and check their files and that they fit.

        Args:
            folder: The engine that decodes.
            check: Compare the hashes of the weight files too.
            vision_engine: As in `RouteKeywords`.
            prefill_engine: As in `RouteKeywords`.

        Raises:
            UsageError: The engines are of different checkpoints, or cannot work together.
            EngineError: A folder is no engine, or a file of it is missing or altered.
        """
        manifest = _checked_manifest(folder, check=check)
        # By real path, so that a folder with two names is one engine.
        named: dict[Path, tuple[Path, set[str]]] = {}
        for part, value in ((VISION, vision_engine), (PREFILL, prefill_engine)):
            if value is not None:
                other = _other_folder(_OPTIONS[part], value, folder)
                named.setdefault(other.resolve(), (other, set()))[1].add(part)
        others = []
        for other, its_parts in named.values():
            engine = RoutedEngine(other, _checked_manifest(other, check=check), frozenset(its_parts))
            _check_fits(RoutedEngine(folder, manifest, PARTS), engine)
            others.append(engine)
        taken = frozenset[str]().union(*(each.parts for each in others))
        return cls((RoutedEngine(folder, manifest, PARTS - taken), *others))

    @property
    def manifest(self) -> Manifest:
        """What all of them are together to who prepares prompts and plans memory.

        It is the manifest of the engine that decodes, with the capabilities of others for their parts, and those files
        of all engines on its device that are opened.
        """
        first = self.engines[0].manifest
        if len(self.engines) == 1:
            return first
        capabilities = dict(first.capabilities)
        vision, prefill = self._of(VISION).manifest, self._of(PREFILL).manifest
        _take(capabilities, vision.capabilities, _OF_VISION)
        if prefill is not first:
            _take(capabilities, prefill.capabilities, _OF_PREFILL)
            if is_on_gpu(first) and not is_on_gpu(prefill):
                capabilities.setdefault("prefill_chunk", PREFILL_CHUNK)
            capabilities.pop("kv_scores", None)  # the queries would be of the other engine's cache
            # Rows of an answer are not those that a prompt would have: see `runtime.scheduling.steps`.
            capabilities.setdefault("prefill_min_tokens", 1)
            if is_on_gpu(prefill) == is_on_gpu(first):
                capabilities[STAGING_ROW_BYTES] = cache_bytes(prefill.model, prefill.capabilities, 1)
        capabilities[OF_OTHERS] = {
            part: {name: each.manifest.capabilities[name] for name in _OF_MEMORY if name in each.manifest.capabilities}
            for each in self.engines[1:]
            for part in sorted(each.parts)
        }
        files = {
            f"{'+'.join(sorted(each.parts))}/{name}": record
            for each in self.engines
            if is_on_gpu(each.manifest) == is_on_gpu(first)
            for name, record in _opened_files(each).items()
        }
        return replace(first, capabilities=capabilities, files=files)

    def open(self, options: SessionOptions) -> Session:
        """Open all engines, each for its parts.

        Options that are about a device or about decode steps are for the engine that decodes; `threads` and
        `huge_pages` are for all on the processor.

        Raises:
            EngineError, CapacityError, UsageError: As `runtime.session.open_session`.
        """
        first = self.engines[0]
        if len(self.engines) == 1:
            return open_session(first.folder, first.manifest, options)
        sessions: dict[str, Session] = {}
        on_gpu = []
        for engine in self.engines:
            given = replace(options, parts=engine.parts)
            if engine is not first and is_on_gpu(engine.manifest):
                given = SessionOptions(decode_plan=False, parts=engine.parts)
            elif engine is not first:
                given = SessionOptions(options.threads, options.huge_pages, parts=engine.parts)
            session = open_session(engine.folder, engine.manifest, given)
            sessions |= dict.fromkeys(engine.parts, session)
            on_gpu += [session] if is_on_gpu(engine.manifest) else []
        return RoutedSession(sessions[DECODE], sessions[PREFILL], sessions[VISION], self.engines, on_gpu=on_gpu)

    def _of(self, part: str) -> RoutedEngine:
        return next(each for each in self.engines if part in each.parts)


def possible_routes(folder: Path, other: Path) -> list[dict[str, Any]]:
    """Return the ways in which another engine can run parts for one, as arguments of `from_engine`; for who measures.

    Raises:
        UsageError: It can run none.
        EngineError: One of the folders is no engine, or is damaged.
    """
    refusal: UsageError | None = None
    found = []
    for parts in ((VISION,), (PREFILL,), (VISION, PREFILL)):
        options: dict[str, Any] = {_OPTIONS[part]: other for part in parts}
        try:
            Route.read(folder, **options)
        except UsageError as error:
            refusal = error
        else:
            found.append(options)
    if refusal is not None and not found:
        raise refusal
    return found


def take_route(keywords: RouteKeywords) -> RouteKeywords:
    """Take what is about a route out of a caller's keywords."""
    vision, prefill = keywords.pop("vision_engine", None), keywords.pop("prefill_engine", None)
    return RouteKeywords(vision_engine=vision, prefill_engine=prefill)


def parts_of(engines: Sequence[RoutedEngine]) -> dict[str, dict[str, str]]:
    """Return folder and target of the engine that runs each part, as plain data."""
    found = {
        part: {"engine": str(each.folder), "target": each.manifest.target} for each in engines for part in each.parts
    }
    return dict(sorted(found.items()))


def describe(session: object) -> dict[str, dict[str, str]]:
    """Return `parts_of` the engines of a session; empty where one engine runs all."""
    return parts_of(session.engines) if isinstance(session, RoutedSession) else {}


def other_engines(session: object) -> list[tuple[str, str]]:
    """Return the options that the engines of a session were named by, and their folders."""
    engines = session.engines[1:] if isinstance(session, RoutedSession) else ()
    return [(_OPTIONS[part], str(each.folder)) for each in engines for part in sorted(each.parts)]


def _checked_manifest(folder: Path, *, check: bool) -> Manifest:
    manifest = Manifest.read(folder)
    manifest.check(folder, full=check)
    manifest.require(folder, PREPROCESSOR, TOKENIZER, GENERATION)
    return manifest


def _other_folder(option: str, value: Any, folder: Path) -> Path:
    """Return the folder that an option names.

    Raises:
        UsageError: It is no path, or that of the engine itself.
    """
    text = folder_path(option, value)
    check_local(text, "engine")
    other = Path(text)
    if other.resolve() == folder.resolve():
        raise UsageError(
            f"{option}: {other} is the engine that decodes, so it changes nothing", remedy=f"leave {option} out"
        )
    return other


def _check_fits(first: RoutedEngine, other: RoutedEngine) -> None:
    """Raise unless an engine can run its parts for another one.

    Raises:
        UsageError: It cannot; the message names both.
    """
    ours, theirs = first.manifest, other.manifest
    if reason := _difference(ours, theirs):
        names = " and ".join(f"{each.folder} (of {each.manifest.source.get('name')})" for each in (first, other))
        raise UsageError(f"{names} are not engines of one checkpoint: {reason}", remedy=_BUILD_BOTH)
    if theirs.session in RUN_ALL_PARTS:
        raise UsageError(
            f"{other.folder} is of {theirs.target}, whose sessions run all parts of an engine or none",
            remedy="name an engine for ONNX Runtime, or open this one alone",
        )
    if PREFILL in other.parts and (reason := _cache_misfit(ours, theirs)):
        raise UsageError(
            f"rows cannot move from the KV cache of {other.folder} to that of {first.folder}: {reason}",
            remedy="build both with the same --kv-cache and the same prompts for its scales, or both without",
        )


def _difference(ours: Manifest, theirs: Manifest) -> str:
    """Return why two engines are not of one checkpoint; empty if they are."""
    digests = ours.source.get("weights_sha256"), theirs.source.get("weights_sha256")
    if None in digests:
        return "one was built by a version that did not write a digest of the weights"
    if digests[0] != digests[1]:
        return "the weights differ"
    if ours.model != theirs.model:
        return "their models have different shapes"
    differing = [name for name in _SHARED_FILES if _hash(ours.files.get(name)) != _hash(theirs.files.get(name))]
    return f"{', '.join(differing)} differ" if differing else ""


def _hash(record: FileRecord | None) -> str | None:
    return None if record is None else record.sha256


def _cache_misfit(ours: Manifest, theirs: Manifest) -> str:
    """Return why rows of one cache cannot be those of another; empty if they can."""
    types = str(theirs.capabilities["cache_dtype"]), str(ours.capabilities["cache_dtype"])
    if FLOATS.issuperset(types):
        return ""
    if types[0] != types[1]:
        return f"the one holds {types[0]}, the other {types[1]}"
    if theirs.capabilities.get("cache_layer_bits") != ours.capabilities.get("cache_layer_bits"):
        return "their layers are kept in different kinds"
    scales = [_hash(each.files.get(str(each.capabilities.get("cache_scales")))) for each in (theirs, ours)]
    return "" if scales[0] == scales[1] and scales[0] else "their codes have different scales"


def _take(capabilities: dict[str, Any], others: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        capabilities.pop(name, None)
        if name in others:
            capabilities[name] = others[name]


def _opened_files(engine: RoutedEngine) -> dict[str, FileRecord]:
    """Return the files of an engine without those of graphs that stay closed."""
    files, parts = engine.manifest.files, engine.parts
    has_prefill = "prefill_min_tokens" in engine.manifest.capabilities
    closed = [] if VISION in parts or engine.manifest.session in RUN_ALL_PARTS else ["vision."]
    if DECODE not in parts and (has_prefill or PREFILL not in parts):
        closed.append("decoder.")
    if PREFILL not in parts:
        closed.append("prefill.")
    return {name: record for name, record in files.items() if not name.startswith(tuple(closed))}
