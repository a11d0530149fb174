"""The limits of the control groups that this process is in: containers, slices of systemd, jobs of a batch system.

A process is in one group of each hierarchy, and every group above it limits it too
(https://docs.kernel.org/admin-guide/cgroup-v2.html; https://docs.kernel.org/admin-guide/cgroup-v1/cgroups.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limits(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> list[int]:
    """Return the bytes that each group allows its processes together, of those that set a limit."""
    limits = []
    for folder in _folders("memory", mount, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdecimal():  # "max" is none
                limits.append(int(text))
    return limits


def cpu_quotas(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> list[float]:
    """Return the processors' time that each group allows its processes together, in processors, where it is limited."""
    quotas = []
    for folder in _folders("cpu", mount, membership):
        old = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        for text in (_read(folder / "cpu.max"), old):
            fields = text.split()  # "max" or -1 is no limit
            if len(fields) == 2 and all(field.isdecimal() for field in fields) and int(fields[1]) > 0:
                quotas.append(int(fields[0]) / int(fields[1]))
    return quotas


def _folders(controller: str, mount: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups, from the innermost to the root, for versions 2 and 1.

    The root is always among them: in a container whose groups have no namespace of their own, `membership` names a
    place of the host that is not mounted there.
    """
    paths = {mount: PurePosixPath("/"), mount / controller: PurePosixPath("/")}
    for line in _read(membership).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[mount] = PurePosixPath(path)
        elif controller in controllers.split(","):
            for name in {controllers, controller}:
                paths[mount / name] = PurePosixPath(path)
    for base, inner in paths.items():
        for group in (inner, *inner.parents):
            yield base.joinpath(*[part for part in group.parts if part not in ("/", "..")])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # there is none, or none that may be read
        return ""
