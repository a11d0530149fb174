"""Compile launches of decode kernels to PTX, in a process of its own: the tests' own process interprets kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from engines.decode_plan.compile import Job
from engines.kernels.launch import Gpu, Launch


def ptx_of(launches: Sequence[Launch], gpu: Gpu) -> list[str]:
    """Return the text of each launch's kernel."""
    jobs = json.dumps([Job.of(launch, gpu).to_dict() for launch in launches])
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": cache,
            "TRITON_DISABLE_LINE_INFO": "1",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        command = [sys.executable, "-P", "-m", "helpers.compiled"]
        done = subprocess.run(command, input=jobs, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    texts: list[str] = json.loads(done.stdout)
    return texts


def main() -> None:
    """Answer a list of jobs."""
    from engines.decode_plan.worker import compiled

    print(json.dumps([compiled(job).asm["ptx"] for job in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
