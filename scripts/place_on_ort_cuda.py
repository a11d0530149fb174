"""Let ONNX Runtime itself place the graphs of ort-cuda-* engines, on a machine without a GPU.

    python scripts/place_on_ort_cuda.py gpu/bin/python ENGINE [ENGINE …]

`check_placement` holds a graph as it is written against a listing, by rules read in ONNX Runtime's source. This asks
the wheel: it optimises the graph, gives each node to a provider, inserts copies, decides whether the graph can be
captured as a CUDA graph, and only then needs a device, where it fails. What it decided stands in its log. Exit code 1:
it decided otherwise than `check_placement`. Set up `gpu` as in scripts/list_ort_cuda_kernels.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from list_ort_cuda_kernels import without_gpu

ROOT = Path(__file__).resolve().parent.parent
CAPTURED, REFUSED = "will use the graph capture feature as requested", "cannot use the graph capture feature"
OPENING = """
import sys
import onnxruntime as ort
ort.preload_dlls()
options = ort.SessionOptions()
options.log_severity_level = 0
provider = ("CUDAExecutionProvider", {"enable_cuda_graph": sys.argv[2]})
ort.InferenceSession(sys.argv[1], options, providers=[provider], enable_fallback=0)
"""


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    agrees = True
    with without_gpu() as environment:
        for engine in sys.argv[2:]:
            for graph in ("decoder", "vision"):
                path = Path(engine) / f"{graph}.onnx"
                log = open_graph(sys.argv[1], path, environment, capture=True)
                if REFUSED in log:
                    log = open_graph(sys.argv[1], path, environment, capture=False)
                agrees &= report(path, log)
    return 0 if agrees else 1


def open_graph(python: str, path: Path, environment: dict[str, str], *, capture: bool) -> str:
    command = [python, "-c", OPENING, str(path), str(int(capture))]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    return found.stdout + found.stderr


def report(path: Path, log: str) -> bool:
    """Print what ONNX Runtime decided and what `check_placement` says; return whether they agree."""
    import onnx_ir as ir

    from engines.cuda_kernels import KernelListing, check_placement

    # Each provider with the number of its nodes, and behind that their operators and names if there are several.
    totals = dict(re.findall(r"(?:Node\(s\)|All nodes) placed on \[(\w+)\]\. Number of nodes: (\d+)", log))
    if "CUDAExecutionProvider" not in totals:
        raise SystemExit(f"{path}: ONNX Runtime did not get as far as placing nodes\n{log[-2000:]}")
    on_cpu = nodes_of("CPUExecutionProvider", log)
    expected = check_placement(ir.load(path), KernelListing.load())
    # Its optimisations may join or drop shape computations, so it may have fewer on the CPU.
    copies = set(re.findall(r"Add Memcpy\w+ (?:before|after) (\S+) for", log))
    agrees = on_cpu.keys() <= {node.name for node in expected.cpu} and copies == {v.name for v in expected.copies}
    print(
        f"{path}: {totals['CUDAExecutionProvider']} nodes on CUDA, {len(on_cpu)} on the CPU "
        f"({dict(Counter(on_cpu.values()))}), copies {sorted(copies)}, "
        f"{'can' if CAPTURED in log else 'cannot'} be captured as a CUDA graph; "
        f"check_placement: {len(expected.cuda)}, {len(expected.cpu)}, {sorted(str(v.name) for v in expected.copies)}"
        f"{'' if agrees else '  <- they differ'}"
    )
    return agrees


def nodes_of(provider: str, log: str) -> dict[str, str]:
    """Return the operators of a provider's nodes by name."""
    _, _, rest = log.partition(f"Node(s) placed on [{provider}]")
    listed, _, _ = rest.partition("Node(s) placed on [")
    found = re.findall(r"VerifyEachNodeIsAssignedToAnEp\]   (\w+) \((.*)\)$", listed, re.MULTILINE)
    return {name: operator for operator, name in found}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
