"""What an engine takes, planned before it is opened, and the KV caches of the sessions.

`KVCache` is the protocol, and `SlidingCache` that of caches that serve a `SlidingWindow`. Of the forms, `OrtKVCache`
needs the extra [cpu], `OrtDeviceCache` [cuda], `EagerCache` [export].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.eager import EagerCache
    from runtime.cache_types import CacheType, cache_types
    from runtime.device_cache import DeviceKVCache
    from runtime.memory import cache_bytes, check_fits, logits_bytes, machine_bytes
    from runtime.memory_plan import Facts, MemoryPlan, Planner, Work
    from runtime.ort_cache import OrtDeviceCache
    from runtime.session import KVCache
    from runtime.sessions.ort_cpu import OrtKVCache
    from runtime.sliding_window import SlidingCache, SlidingWindow

__all__ = [
    "CacheType",
    "DeviceKVCache",
    "EagerCache",
    "Facts",
    "KVCache",
    "MemoryPlan",
    "OrtDeviceCache",
    "OrtKVCache",
    "Planner",
    "SlidingCache",
    "SlidingWindow",
    "Work",
    "cache_bytes",
    "cache_types",
    "check_fits",
    "logits_bytes",
    "machine_bytes",
]

_SOURCES = {
    "qwen3vl_export.eager": ["EagerCache"],
    "runtime.cache_types": ["CacheType", "cache_types"],
    "runtime.device_cache": ["DeviceKVCache"],
    "runtime.memory": ["cache_bytes", "check_fits", "logits_bytes", "machine_bytes"],
    "runtime.memory_plan": ["Facts", "MemoryPlan", "Planner", "Work"],
    "runtime.session": ["KVCache"],
    "runtime.sessions.ort_cpu": ["OrtKVCache"],
    "runtime.sliding_window": ["SlidingCache", "SlidingWindow"],
    "runtime.ort_cache": ["OrtDeviceCache"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
