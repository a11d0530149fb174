"""Weight formats: how the weight of one product is stored, and which kernel reads it.

A target's file in `configs/targets/` lists for each precision which weights get which format, first match wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import TargetError

BLOCKWISE, ROWWISE, FLOAT8, NVFP4, FLOAT = "blockwise", "rowwise", "float8", "nvfp4", "float32"
FLOAT8_WEIGHTS = "float8_weights"
_KINDS = (BLOCKWISE, ROWWISE, FLOAT8, FLOAT8_WEIGHTS, NVFP4, FLOAT)
_IN_CONFIG = "mend the format in the target's file in configs/targets"
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is stored.

    Attributes:
        kind: `blockwise` (bits, one scale and zero point for each block of a row), `rowwise` (int8, one scale for each
            row; the activations are quantised to 8 bits), `float8` (E4M3, one scale for each row; the activations are
            E4M3 too, by a scale that calibration finds), `float8_weights` (E4M3, one scale for each block of a row; the
            activations stay as they are), `nvfp4` (E2M1, an E4M3 scale for each 16 weights of a row, and
            one scale for all of these) or `float32`.
        bits: 4 or 8, for blockwise.
        block: Weights of a block, for blockwise and float8_weights; the last block of a row may be padded, or shorter.
        activations: `tensor` or `token`, for rowwise: one scale for all activations of a call, or one for each token.
        symmetric: For blockwise: no zero points, since the kernel has none.
    """

    kind: str
    bits: int = 0
    block: int = 0
    activations: str = "tensor"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise TargetError(f"weight format {self.kind!r}, expected one of {', '.join(_KINDS)}", remedy=_IN_CONFIG)
        if self.kind == BLOCKWISE and (self.bits not in (4, 8) or self.block not in BLOCK_SIZES):
            raise TargetError(
                f"blockwise format of {self.bits} bits in blocks of {self.block}: no kernel reads it",
                remedy=f"choose 4 or 8 bits and a block of {', '.join(map(str, BLOCK_SIZES))}",
            )
        if self.kind == FLOAT8_WEIGHTS and self.block not in BLOCK_SIZES:
            raise TargetError(
                f"float8 in blocks of {self.block}: no kernel reads it",
                remedy=f"choose a block of {', '.join(map(str, BLOCK_SIZES))}",
            )
        if self.activations not in ("tensor", "token"):
            raise TargetError(f"activations {self.activations!r}, expected tensor or token", remedy=_IN_CONFIG)

    def __str__(self) -> str:
        if self.kind == BLOCKWISE:
            return f"int{self.bits}, block {self.block}" + (", symmetric" if self.symmetric else "")
        return {
            ROWWISE: f"int8, one scale a row, activations by {self.activations}",
            FLOAT8: "float8 (E4M3), one scale a row, activations too",
            FLOAT8_WEIGHTS: f"float8 (E4M3), block {self.block}",
            NVFP4: "float4 (E2M1), block 16, scales in float8",
            FLOAT: "float32",
        }[self.kind]

    @property
    def has_scale_per_token(self) -> bool:
        """Whether each token's activations have a scale of their own."""
        return self.activations == "token"


@dataclass(frozen=True)
class WeightFormats:
    """Which weight gets which format.

    Attributes:
        rules: Patterns of checkpoint keys, with their format; the first that matches counts.
    """

    rules: tuple[tuple[tuple[str, ...], WeightFormat], ...] = ()

    @classmethod
    def from_rules(cls, rules: Sequence[Mapping[str, Any]]) -> WeightFormats:
        """Read the rules of one precision from a targets file.

        Raises:
            TargetError: A format that no kernel reads.
        """
        parsed = []
        for rule in rules:
            values = dict(rule)
            patterns = tuple(values.pop("match"))
            parsed.append((patterns, WeightFormat(**values)))
        return cls(tuple(parsed))

    def format_of(self, key: str) -> WeightFormat:
        """Return the format of a weight by its checkpoint key; float32 where no rule matches."""
        for patterns, weight_format in self.rules:
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
                return weight_format
        return WeightFormat(FLOAT)

    def has_products_in(self, kind: str) -> bool:
        """Say whether a rule gives a kind to weights other than experts, which are rounded on their own."""
        return any(
            weight_format.kind == kind and not all(".experts." in pattern for pattern in patterns)
            for patterns, weight_format in self.rules
        )
