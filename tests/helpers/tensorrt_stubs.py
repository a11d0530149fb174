"""Write names and parameters of TensorRT's Python API, as type stubs of the package index have them, to a test's data.

    pip download --no-deps tensorrt-stubs==10.13.0.35.1 && unzip tensorrt_stubs-*.whl -d stubs
    PYTHONPATH=tests python -m helpers.tensorrt_stubs stubs/tensorrt_bindings/tensorrt.pyi 10.13.0.35.1

The package itself is no dependency of the tests: it requires `tensorrt`, which is of no use without a GPU and fetches
gigabytes from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "tensorrt_stubs.json"
_LINE = re.compile(
    r"^(?P<indent> *)(?:class (?P<cls>\w+)|def (?P<method>\w+)\((?P<given>.*)\)(?: ->.*)?:$|(?P<name>\w+):)"
)


def read(text: str) -> dict[str, dict[str, list[list[str]]]]:
    """Return the members of each class by name, of methods the parameters of each overload; `=` marks a default.

    Line by line, since one of the generated signatures is not valid Python. Nested classes are joined by a dot.
    """
    classes: dict[str, dict[str, list[list[str]]]] = {}
    path: list[str] = []
    in_text = False
    for line in text.splitlines():
        if line.count('"""') % 2:
            in_text = not in_text
            continue
        match = None if in_text or '"""' in line else _LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // 4
        if match["cls"]:
            path = [*path[:depth], match["cls"]]
            if depth:
                classes[".".join(path[:depth])][match["cls"]] = []
            classes[".".join(path)] = {}
        elif depth and depth <= len(path):
            members = classes[".".join(path[:depth])]
            name = match["method"] or match["name"]
            if name.startswith("__") and name != "__init__":
                continue
            if match["method"]:
                members.setdefault(name, []).append(parameters(match["given"]))
            else:
                members.setdefault(name, [])
    return classes


def parameters(given: str) -> list[str]:
    """Return the names of parameters but self; `=` after those that have a default."""
    parts, depth = [""], 0
    for character in given:
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    names = []
    for part in map(str.strip, parts):
        name = re.match(r"\*{0,2}\w+", part)
        if name is not None and name[0] not in ("self", "this"):
            names.append(name[0] + ("=" if re.search(r"(?<![<>=!])=(?!=)", part) else ""))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stubs", type=Path)
    parser.add_argument("version")
    given = parser.parse_args()
    classes = read(given.stubs.read_text(encoding="utf-8"))
    about = "names and parameters of tensorrt-stubs, MIT licence, Copyright (c) sync.dev"
    values = {"about": about, "version": given.version, "classes": classes}
    OUTPUT.write_text(json.dumps(values, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
