"""List the kernels that onnxruntime-gpu's wheel registers for CUDA, on a machine without a GPU.

    python -m venv gpu && gpu/bin/pip install "onnxruntime-gpu[cuda,cudnn]"
    python scripts/list_ort_cuda_kernels.py gpu/bin/python > configs/ort_cuda_kernels.toml

The wheel lists its kernels itself, once the CUDA provider is loaded and made, and the TensorRT provider too, since it
makes all of them. That takes CUDA's libraries from PyPI, a driver and TensorRT. Of the last two the providers call a
handful of functions, none of which matters to the listing, so they are stood in for: a C compiler makes libraries that
answer "done" and know no device. No kernel can run in that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# The calls that onnxruntime-gpu 1.31.1 makes until its kernels are listed. Another version that makes more of them ends
# with "cannot list", and the name in ONNX Runtime's message belongs here.
STAND_INS = """
#include <stddef.h>
int cuTensorMapEncodeTiled(void) { return 999; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaGetDeviceProperties(void *properties, int device) { return 0; }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = *total = 1ul << 34; return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = 0; return 0; }
int getInferLibVersion(void) { return 101400; }
void *getPluginRegistry(void) { return 0; }
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
"""
LIBRARIES = ("libcuda.so.1", "libnvinfer.so.10", "libnvonnxparser.so.10")
LISTING = """
import json, onnxruntime
onnxruntime.preload_dlls()
from onnxruntime.capi import onnxruntime_pybind11_state as binding
kernels = [
    (k.domain, k.op_name, *k.version_range, k.type_constraints)
    for k in binding.get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"
]
schemas = [
    (s.domain, s.name, s.since_version, [i.typeStr for i in s.inputs], [o.typeStr for o in s.outputs])
    for s in binding.get_all_operator_schema()
]
print(json.dumps({"version": onnxruntime.__version__, "kernels": kernels, "schemas": schemas}))
"""
OPEN_END = (1 << 31) - 1
# ONNX versions that no graph of this project imports any more: kernels that end before it are left out.
OLDEST_OPSET = 24
# The domains that lowered graphs use; ONNX Runtime's own operators in ONNX's domain have no schema in onnx.
DOMAINS = ("", "com.microsoft")

Kernel = tuple[int, int, dict[str, tuple[str, ...]]]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    listed = list_kernels(sys.argv[1])
    print(HEADER.format(version=listed["version"]))
    for domain in DOMAINS:
        kernels: dict[str, list[Kernel]] = {}
        for kernel_domain, op, first, last, constraints in listed["kernels"]:
            if kernel_domain == domain and last >= (OLDEST_OPSET if domain == "" else 1):
                types = {name: tuple(t[len("tensor(") : -1] for t in found) for name, found in constraints.items()}
                kernels.setdefault(op, []).append((first, last, types))
        print(f'\n[kernels."{domain}"]')
        for op in sorted(kernels):
            print(f"{op} = {json.dumps([text_of(kernel) for kernel in merge(kernels[op])])}")
        print(f'\n[operators."{domain}"]')
        own = {
            name: f"{' '.join(inputs)} -> {' '.join(outputs)}"
            for schema_domain, name, _, inputs, outputs in listed["schemas"]
            if schema_domain == domain and name in kernels and (domain or name in OWN_OPERATORS)
        }
        for name in sorted(own):
            print(f'{name} = "{own[name]}"')
    return 0


HEADER = """\
# Kernels of ONNX Runtime's CUDA provider: what `check_placement` holds every node of an ort-cuda-* graph against.
# Written by scripts/list_ort_cuda_kernels.py; do not edit.
#
# kernels: "first version-last version, type parameter=element types, …"; an open range has no last version.
# operators: type parameters of the inputs and outputs of ONNX Runtime's own operators; onnx knows all others.
wheel = "onnxruntime-gpu {version}\""""
OWN_OPERATORS = ("SimplifiedLayerNormalization",)


def list_kernels(python: str) -> dict[str, list]:
    """Let onnxruntime-gpu make its CUDA provider in a child process, without a GPU, and say what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stand_ins.c"
        source.write_text(STAND_INS)
        for name in LIBRARIES:
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", str(source), "-o", str(Path(folder) / name)],
                check=True,
            )
        environment = {
            **os.environ,
            "ORT_DISABLE_TELEMETRY": "1",  # which it reads when it is imported
            # The stand-ins come before the libraries of the same name.
            "LD_LIBRARY_PATH": folder,
            "LD_PRELOAD": str(Path(folder) / LIBRARIES[0]),
        }
        found = subprocess.run([python, "-c", LISTING], env=environment, capture_output=True, text=True)
    if found.returncode != 0:
        raise SystemExit(f"{python}: cannot list its kernels (exit {found.returncode})\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def merge(kernels: list[Kernel]) -> list[Kernel]:
    """Join kernels that differ in one type parameter alone, which loses nothing; to the end."""
    merged = sorted(kernels, key=repr)
    for index, (first, last, types) in enumerate(merged):
        for other_first, other_last, other in merged[index + 1 :]:
            if (first, last, types.keys()) != (other_first, other_last, other.keys()):
                continue
            differing = [name for name in types if types[name] != other[name]]
            if len(differing) <= 1:
                joined = {name: tuple(sorted({*found, *other[name]})) for name, found in types.items()}
                rest = [k for k in merged if k not in ((first, last, types), (other_first, other_last, other))]
                return merge([*rest, (first, last, joined)])
    return merged


def text_of(kernel: Kernel) -> str:
    first, last, types = kernel
    versions = f"{first}-{'' if last == OPEN_END else last}"
    return " ".join([versions, *(f"{name}={','.join(found)}" for name, found in sorted(types.items()))])


if __name__ == "__main__":
    raise SystemExit(main())
