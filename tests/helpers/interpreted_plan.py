"""The true decode plan of an engine, whose kernels run in Triton's interpreter on the host device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from engines.decode_plan.compile import Code, Job
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.steps import make_steps
from engines.decode_plan.write import write_plan
from engines.kernels.launch import GPUS
from helpers.host_kernels import host_code
from runtime.decode_plan import PLAN_CAPABILITY
from runtime.manifest import Manifest

# As many multiprocessors as a small GPU would have: each program takes more, so that fewer have to be interpreted.
GPU = dataclasses.replace(GPUS[89], num_sms=4)


def host_codes(jobs: list[Job]) -> dict[Job, Code]:
    """Return what stands for machine code: which function to interpret."""
    return {
        job: Code(
            job.function,
            0,
            "12.9",
            host_code(
                f"engines.kernels.triton.{job.module}",
                job.function,
                dict(job.types),
                dict(job.constants) | {"ASM": 0, "PDL": 0},
                f"{job.sm // 10}.{job.sm % 10}",
            ),
        )
        for job in jobs
    }


def add_interpreted_plan(folder: Path) -> Path:
    """Give an engine a decode plan as the exporter makes it, but for the code."""
    manifest = Manifest.read(folder)
    model = ir.load(folder / "decoder.onnx")
    decoder = read_decoder(model, manifest.model)
    records = write_plan(folder, model, decoder, {GPU.sm: make_steps(decoder, GPU)}, host_codes)
    files, capabilities = {**manifest.files, **records}, {**manifest.capabilities, PLAN_CAPABILITY: True}
    dataclasses.replace(manifest, files=files, capabilities=capabilities).write(folder)
    return folder
