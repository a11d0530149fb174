"""What of a file is mapped into this process, by /proc (Linux alone)."""

from __future__ import annotations

import re
from pathlib import Path


def mapping(path: Path) -> dict[str, int]:
    """Sums over all mappings of a file in this process, in bytes, by the names of proc(5)."""
    sizes: dict[str, int] = {}
    is_ours = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(f" {path}")
        elif is_ours and line.endswith(" kB"):
            name, size, _ = line.split()
            sizes[name.rstrip(":")] = sizes.get(name.rstrip(":"), 0) + (int(size) << 10)
    return sizes
