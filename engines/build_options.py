"""What a user chooses when an engine is compiled for fixed sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.errors import UsageError

# Patches of 16 x 16 pixels: 512 x 512, 1024 x 1024 and 2048 x 2048 pixels.
DEFAULT_PATCH_BUCKETS = (1024, 4096, 16384)


@dataclass(frozen=True)
class BuildOptions:
    """Sizes and switches of a compiled engine.

    Attributes:
        max_context: Capacity T of the KV cache, in tokens.
        max_batch: Most sequences of a decode step, and slots of a KV cache.
        prefill_chunk: Most new tokens of one call.
        patch_buckets: Most patches of one image, one optimisation profile of the vision tower for each, ascending.
        compute_capabilities: GPUs that the engine runs on, such as "8.6"; empty for all that the library offers, or
            for the one of this machine where a library builds for no other.
        strip_weights: Leave the weights out of the plan; they are refitted from the lowered graph when it is opened.
        weight_streaming: Let the session keep part of the weights in host memory.
        version_compatible: Let newer versions of the library open the plan.
        hardware_compatible: Let newer GPUs run it, slower.
    """

    max_context: int = 4096
    max_batch: int = 4
    prefill_chunk: int = 512
    patch_buckets: tuple[int, ...] = DEFAULT_PATCH_BUCKETS
    compute_capabilities: tuple[str, ...] = field(default=())
    strip_weights: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False

    @staticmethod
    def buckets_up_to(max_patches: int) -> tuple[int, ...]:
        """Return the default buckets below `max_patches`, and it."""
        return (*(bucket for bucket in DEFAULT_PATCH_BUCKETS if bucket < max_patches), max_patches)

    def check(self, max_positions: int, merge_size: int) -> None:
        """Raise unless a model of this many positions and this spatial merge can be built so.

        Raises:
            UsageError: A size is out of range.
        """
        for name, value, low, high in (
            ("max_context", self.max_context, 2, max_positions),
            ("max_batch", self.max_batch, 1, 1024),
            ("prefill_chunk", self.prefill_chunk, 2, self.max_context),
        ):
            if not low <= value <= high:
                raise UsageError(
                    f"{name} = {value}, expected {low} to {high}",
                    remedy=f"choose a {name} in that range",
                )
        buckets, unit = self.patch_buckets, merge_size**2
        if not buckets or any(bucket % unit or bucket < unit for bucket in buckets):
            raise UsageError(
                f"patch buckets {list(buckets)}: expected multiples of {unit}, at least one",
                remedy="a patch is 16 x 16 pixels: 4096 patches are 1024 x 1024 pixels",
            )
        if list(buckets) != sorted(set(buckets)):
            raise UsageError(
                f"patch buckets {list(buckets)}: expected ascending sizes, none twice",
                remedy=f"give {sorted(set(buckets))}",
            )
