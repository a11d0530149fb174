"""Limits of control groups: both versions, nested groups, and containers that see another tree than their host."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cgroup import cpu_quotas, memory_limits

NONE_OF_VERSION_1 = 9223372036854771712


def write(mount: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.portable
@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, []),
        ("0::/", {"memory.max": "1000"}, [1000]),
        ("0::/", {"memory.max": "max"}, []),
        ("0::/", {"memory.max": "odd"}, []),
        ("0::/a/b.slice", {"a/memory.max": "5000", "a/b.slice/memory.max": "max"}, [5000]),
        ("0::/a/b", {"a/memory.max": "5000", "a/b/memory.max": "700", "c/memory.max": "1"}, [700, 5000]),
        ("0::/host/only", {"memory.max": "1000"}, [1000]),
        ("0::/../../up", {"memory.max": "1000"}, [1000]),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": str(NONE_OF_VERSION_1)}, [NONE_OF_VERSION_1]),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "800"}, [800]),
        ("4:memory:/host/only", {"memory/memory.limit_in_bytes": "900"}, [900]),
        ("no such line", {"memory.max": "1000"}, [1000]),
    ],
)
def test_memory(membership: str, files: dict[str, str], expected: list[int], tmp_path: Path) -> None:
    write(tmp_path, files)
    (tmp_path / "membership").write_text(membership)
    assert sorted(set(memory_limits(tmp_path, tmp_path / "membership"))) == expected


@pytest.mark.portable
@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/", {"cpu.max": "250000 100000"}, [2.5]),
        ("0::/", {"cpu.max": "odd"}, []),
        ("0::/", {"cpu.max": "1 0"}, []),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"}, [0.5, 4.0]),
        (
            "3:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            [3.0],
        ),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, []),
    ],
)
def test_processors(membership: str, files: dict[str, str], expected: list[float], tmp_path: Path) -> None:
    write(tmp_path, files)
    (tmp_path / "membership").write_text(membership)
    assert sorted(set(cpu_quotas(tmp_path, tmp_path / "membership"))) == expected


@pytest.mark.portable
def test_a_system_without_groups_has_no_limits(tmp_path: Path) -> None:
    assert (memory_limits(tmp_path / "none", tmp_path / "none"), cpu_quotas(tmp_path, tmp_path / "none")) == ([], [])
